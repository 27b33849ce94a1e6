"""Inner steps of layers that learn while they read: their losses, and how far the weights go."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _trees, layers
from ttt_jax.layers import _inputs, inner_losses, memories, retentions
from ttt_jax.layers.memories import Memory
from ttt_jax.layers.retentions import Retention

_KEEP = retentions.keep()
_EPSILON = 1e-6


class InnerSteps(NamedTuple):
    """What the chunks of a sequence do to a layer's weights; arrays ``[chunks]``.

    Attributes:
      before: mean inner loss of the chunk's tokens at the weights with which it begins.
      after: the same at the weights with which the next one begins. Above ``before`` the step is
        too large.
      gradient_norm: of the gradient of ``before``.
      change: Euclidean norm of the difference of both weights.
      weight_norm: Euclidean norm of the weights with which the chunk begins.
      deviation: what the layer norm inside the memory divides by, mean over the tokens; None
        without one. Near 1e-3 (the root of its epsilon) it multiplies gradients by 1,000.
    """

    before: jax.Array
    after: jax.Array
    gradient_norm: jax.Array
    change: jax.Array
    weight_norm: jax.Array
    deviation: jax.Array | None


@_arguments.checked(
    layer=_arguments.function(5, "(q, k, v, rates, state) -> (out, state)"),
    rows=_arguments.sequence(),
    loss=_arguments.function(2, "(prediction, target) -> scalar"),
    chunk_size=_arguments.count(),
)
def inner_steps(
    layer: Callable[..., Any],
    rows: Any,
    state: layers.FastState,
    *,
    memory: Memory,
    loss: Callable[[Any, Any], jax.Array] = inner_losses.squared,
    retention: Retention = _KEEP,
    chunk_size: int = 1,
    within: Memory | None = None,
) -> InnerSteps:
    """The inner loss before and after each chunk of a fast-weight layer, and how far weights go.

    For one head of one sequence; the layer reads it chunk by chunk, each from the state after the
    one before. A rest of less than a chunk changes no weights and is left out.

    Args:
      layer: ``(q, k, v, rates, state) -> (out, state)``, as :func:`ttt_jax.layers.fast_weight` with
        its other arguments bound by ``functools.partial``.
      rows: ``(q [T, d], k [T, d], v [T, ...], rates)``, what the layer takes.
      state: before the first token.
      memory: of the layer.
      loss: of the layer.
      retention: of the layer.
      chunk_size: of the layer.
      within: for a memory of :func:`ttt_jax.layers.memories.residual`, the one inside, whose output
        is normalized; None leaves ``deviation`` out.

    Returns:
      :class:`InnerSteps` over ``T // chunk_size`` chunks.

    Raises:
      TypeError: an argument of another type.
      ValueError: rows that are no four, or fewer tokens than a chunk has.

    Examples:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> from ttt_jax import layers
      >>> memory = layers.memories.linear()
      >>> layer = functools.partial(layers.fast_weight, memory=memory)
      >>> q = k = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> rows = (q, k, jnp.array([[1.0], [1.0]]), layers.Rates(jnp.array([0.5, 0.5])))
      >>> steps = inner_steps(layer, rows, layers.fast_state((jnp.zeros((2, 1)),)), memory=memory)
      >>> print(steps.before, steps.after)
      [0.5   0.125] [0.125   0.03125]
    """
    if len(rows) != 4:
        raise ValueError(f"rows must be (q, k, v, rates); got {len(rows)} of them.")
    q, k, v, rates = rows
    tokens = _checks.leading_size("q of diagnostics.inner_steps", q)
    chunks = tokens // chunk_size
    if not chunks:
        raise ValueError(
            f"rows must have a whole chunk of tokens; got T = {tokens} with chunk_size="
            f"{chunk_size}."
        )

    def split(leaf: jax.Array) -> jax.Array:
        return leaf[: chunks * chunk_size].reshape(chunks, chunk_size, *leaf.shape[1:])

    def of_steps(leaf: jax.Array | None) -> jax.Array | None:
        # A row for each token, or for each chunk.
        if leaf is None or leaf.shape[0] == tokens:
            return None if leaf is None else split(leaf)
        return leaf[:chunks, None]

    gate = jax.tree.map(split, rates.gate)
    steps = of_steps(rates.retain), of_steps(rates.momentum)

    def measured(state: Any, x: Any) -> Any:
        (q, k, v), gate, (retain, momentum) = x
        own = layers.Rates(gate, retain, momentum, rates.scale)
        end = layer(q, k, v, own, state)[1]

        def value(weights: Any) -> jax.Array:
            each = lambda k, v: loss(memory.predict(weights, k), v)  # noqa: E731
            return jax.vmap(each)(k, v).mean()

        start, last = (retention.link(held.weights) for held in (state, end))
        before, gradient = jax.value_and_grad(value)(start)
        deviation = None
        if within is not None:
            outputs = jax.vmap(lambda k: within.read(start, k))(k)
            deviation = jnp.sqrt(outputs.var(-1) + _EPSILON).mean()
        change = jax.tree.map(jnp.subtract, last, start)
        sizes = [_trees.norm(tree) for tree in (gradient, change, start)]
        made = InnerSteps(before, value(last), sizes[0], sizes[1], sizes[2], deviation)
        return end, made

    parts = jax.tree.map(split, (q, k, v)), gate, steps
    return jax.lax.scan(measured, _begun(layer, state, parts, rates.scale), parts)[1]


def _begun(layer: Any, state: Any, parts: Any, scale: Any) -> Any:
    """A state laid out as the layer returns it: it may remember tokens that it had none of."""
    (q, k, v), gate, (retain, momentum) = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(
        lambda: layer(q, k, v, layers.Rates(gate, retain, momentum, scale), state)[1]
    )
    if _trees.same_structure(shapes, state):
        return state

    # As many tokens as the layer keeps, with a gate of 0.
    def first(leaf: jax.Array, shape: Any) -> jax.Array:
        return jnp.repeat(leaf[:1], shape.shape[0], 0)

    keys, values, gates = shapes.recent
    return state._replace(
        recent=(
            jax.tree.map(first, k, keys),
            jax.tree.map(first, v, values),
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), gates),
        )
    )


@_arguments.checked(
    k=_inputs.table,
    v=_inputs.table,
    gate=_inputs.vector,
    scale=_inputs.positions,
    state=_inputs.arrays(_inputs.LINEAR, _inputs.MLP),
    norm=_inputs.arrays(("gamma", "beta")),
)
def ttt_steps(
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    state: tuple[jax.Array, ...],
    norm: tuple[jax.Array, jax.Array],
) -> InnerSteps:
    """:func:`inner_steps` of TTT-Linear or TTT-MLP, from what the layer takes.

    Args:
      k: ``[T, d]``, as of :func:`ttt_jax.layers.ttt_linear`, like all others.
      v: ``[T, d]``.
      gate: ``[T]``.
      scale: ``[chunk_size]``.
      state: ``(W, b)``, or ``(W1, b1, W2, b2)``.
      norm: ``(gamma, beta)``.

    Returns:
      :class:`InnerSteps`, ``deviation`` among them.

    Raises:
      TypeError: an argument of another type.
      ValueError: shapes that do not fit, or fewer tokens than a chunk has.
    """
    _inputs.check_shapes(_inputs.Rows(k, k, v, gate), scale, norm)
    _inputs.check_weights("state", state, k.shape[1])
    linear = len(state) == 2
    within = memories.linear(bias=True) if linear else memories.mlp(state[0].shape[1])
    memory, chunk = memories.residual(within, norm), scale.shape[0]

    def layer(q: Any, k: Any, v: Any, rates: Any, state: Any) -> Any:
        return layers.fast_weight(q, k, v, rates, state, memory=memory, chunk_size=chunk)

    rows = (k, k, v, layers.Rates(gate, scale=scale))
    start = layers.fast_state(tuple(state))
    return inner_steps(layer, rows, start, memory=memory, chunk_size=chunk, within=within)

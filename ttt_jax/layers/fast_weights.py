"""One layer for all memories: what is trained, on which loss, by what, and when it is read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttt_jax import _arguments, _contract, _varying
from ttt_jax.layers import _scans, inner_losses, retentions
from ttt_jax.layers.memories import Memory
from ttt_jax.layers.retentions import Retention

__all__ = ["FastState", "Rates", "fast_state", "fast_weight"]

_SGD = optax.sgd(1.0)
_KEEP = retentions.keep()


class Rates(NamedTuple):
    """What a network gives a fast-weight layer beside queries, keys and values.

    Attributes:
      gate: ``[T]``, the step size of each token; or a tree of them, laid out as the weights.
      retain: ``[S, ...]``, the rate of retention of each inner step; None for 1. S is T where a
        token is a step, and the number of chunks, begun ones too, where a chunk is.
      momentum: ``[S]``, for :func:`inner_optimizers.momentum`; None for an optimizer without.
      scale: ``[chunk_size]``, which part of what the chunk has changed the token at a position
        reads; None for all. The next chunk begins with what the last position read.
    """

    gate: Any
    retain: jax.Array | None = None
    momentum: jax.Array | None = None
    scale: jax.Array | None = None


class FastState(NamedTuple):
    """What a fast-weight layer has learned.

    Attributes:
      weights: before the link of the retention; a pytree.
      optimizer: the state of the inner optimizer.
      kept: what the retention remembers of the initial weights.
    """

    weights: Any
    optimizer: Any
    kept: Any


class _Rule(NamedTuple):
    memory: Memory
    loss: Callable[[Any, Any], jax.Array]
    retention: Retention
    optimizer: optax.GradientTransformationExtraArgs
    reads: str
    step: str


class _Chunk(NamedTuple):
    """Tokens of a chunk; rates of steps are given to each of their tokens."""

    q: jax.Array
    k: Any
    v: Any
    gate: Any
    steps: dict[str, jax.Array]


def _floating(place: str, name: str, value: Any) -> Any:
    leaves = jax.tree.leaves(value)
    arrays = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    if not leaves or not arrays or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise TypeError(
            f"{name} must be a pytree of floating arrays; got {_contract.described(value)}."
        )
    return value


@_arguments.checked(weights=_floating)
def fast_state(
    weights: Any,
    *,
    retention: Retention = _KEEP,
    optimizer: optax.GradientTransformation = _SGD,
) -> FastState:
    """The state of :func:`fast_weight` before the first token.

    Args:
      weights: of ``memory.init``, or learned in the outer loop; a pytree of floating arrays.
      retention: as that of the layer.
      optimizer: as that of the layer.

    Raises:
      TypeError: weights that are no floating arrays.
    """
    return FastState(weights, optimizer.init(weights), retention.init(weights))


@_arguments.checked(
    q=_arguments.array(2, kinds="f", like="[T, d]"),
    k=_arguments.array(2, kinds="f", like="[T, d]"),
    loss=_arguments.function(2, "(prediction, target) -> scalar"),
    chunk_size=_arguments.count(),
    remat=_arguments.count(0),
)
def fast_weight(
    q: jax.Array,
    k: jax.Array,
    v: Any,
    rates: Rates,
    state: FastState,
    *,
    memory: Memory,
    loss: Callable[[Any, Any], jax.Array] = inner_losses.squared,
    retention: Retention = _KEEP,
    optimizer: optax.GradientTransformation = _SGD,
    reads: str = "after",
    step: str = "token",
    chunk_size: int = 1,
    remat: int = 4,
) -> tuple[jax.Array, FastState]:
    """A network that is trained on tokens as they are read, each choice an argument of its own.

    For one head of one sequence. With the weights ``theta`` at the beginning of a chunk (after
    their decay, where the retention says so), each of its tokens has the gradient
    ``g_s = d loss(predict(theta, k_s), v_s) / d theta``, and an inner step is

        ``theta <- after(decay(theta, retain) + optimizer(gate_s * g_s))``

    for each token, or with ``step="chunk"`` once for the sum over the chunk. A token's output is
    ``read(theta, q_t)``.

    ============== =========== =============== ============ ========== ======= ========
    layer          memory      loss            retention    optimizer  reads   chunk
    ============== =========== =============== ============ ========== ======= ========
    linear att.    linear      dot_product     keep         SGD        after   1
    DeltaNet       linear      squared         keep         SGD        after   1
    Gated DeltaNet linear      squared         decay        SGD        after   1
    KDA            linear      squared         decay, rows  SGD        after   1
    Mesa           ridge       sums            decay        SGD        after   1
    TTT-Linear     residual    squared         keep         SGD        after   16
    TTT-MLP        residual    squared         keep         SGD        after   16
    Titans         mlp         squared         decay, late  momentum   before  16 - 2,048
    Moneta         mlp         power(3)        power_norm   SGD        after   any
    Yaad           mlp         huber           decay, late  SGD        after   any
    Memora         linear      squared         kl           SGD        after   any
    LaCT           swiglu      dot_product     norms        orthogonal before  2,048 up
    ============== =========== =============== ============ ========== ======= ========

    SGD has a learning rate of 1, as the gates are the step sizes; TTT layers have ``Rates.scale``,
    and LaCT ``step="chunk"``. :func:`ttt_linear` and :func:`ttt_mlp` give the same results in
    products of matrices.

    **Fails** where a gate is too large for the loss: errors then grow from step to step. The outer
    gradient reaches values only through losses whose mixed derivative is not zero.

    **Cost:** with ``step="token"`` the gradients of a chunk's tokens are all held,
    ``chunk_size`` times the weights, and steps follow each other; with ``"chunk"`` one gradient
    for each chunk (for each leaf, where gates are a tree).

    Args:
      q: ``[T, d]``, T at least 1.
      k: ``[T, d]``.
      v: ``[T, d]``, or any tree of targets ``[T, ...]`` that the loss takes.
      rates: step sizes, and what else the rule needs.
      state: of :func:`fast_state`, or the one returned after a multiple of ``chunk_size`` tokens.
      memory: of :mod:`memories`, or a :class:`memories.Memory` of your own.
      loss: ``(prediction, target) -> scalar`` of one token; of :mod:`inner_losses`, or your own.
      retention: of :mod:`retentions`.
      optimizer: an optax transformation; :mod:`inner_optimizers` has two more.
      reads: ``"before"``: weights at the beginning of the chunk. ``"after"``: weights after the
        token's own step; with ``step="chunk"`` after that of the whole chunk, so that a token sees
        those after it in the chunk.
      step: ``"token"`` or ``"chunk"``.
      chunk_size: tokens whose gradients are taken at the same weights.
      remat: chunks between two states that are kept for the backward pass; 0 keeps everything.

    Returns:
      ``out [T, ...]``, and the state after the last whole chunk.

    Raises:
      TypeError: an argument of another type.
      ValueError: T is 0, lengths that do not fit, an unknown choice, or a decay before the
        gradients of several steps.

    References:
      Behrouz et al., `MIRAS <https://arxiv.org/abs/2504.13173>`_, 2025, section 3, and the
      publications that the parts name.
    """
    extended = optax.with_extra_args_support(optimizer)
    rule = _Rule(memory, loss, retention, extended, reads, step)
    tokens = q.shape[0]
    count = -(-tokens // chunk_size) if step == "chunk" else tokens
    _check(rule, (q, k, v), rates, count, chunk_size)
    _check_gate(rates.gate, state.weights)
    q, k, v, rates, state = _varying.along((q, k, v, rates, state), (q, k, v, rates, state))
    steps = {
        name: rate if step == "token" else jnp.repeat(rate, chunk_size, 0)[:tokens]
        for name in ("retain", "momentum")
        if (rate := getattr(rates, name)) is not None
    }
    groups, size = _scans.groups(-(-tokens // chunk_size), remat)
    missing = groups * size * chunk_size - tokens
    # What fills the last chunks is finite where the tokens are: its gradients are not used.
    rows = jax.tree.map(
        lambda leaf: jnp.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1)), mode="edge"),
        _Chunk(q, k, v, rates.gate, steps),
    )
    real = jnp.arange(tokens + missing) < tokens
    rows = rows._replace(gate=jax.tree.map(lambda gate: jnp.where(real, gate, 0), rows.gate))
    apply = _by_token if step == "token" else _by_chunk

    def body(held: tuple[FastState, jax.Array], chunk: _Chunk) -> Any:
        before, first = held
        after, out = apply(rule, before, chunk, rates.scale)
        whole = first + chunk_size <= tokens
        new = jax.tree.map(lambda a, b: jnp.where(whole, a, b), after, before)
        return (new, first + chunk_size), out

    (last, _), out = _scans.scan(body, (state, jnp.int32(0)), rows, chunk=chunk_size, remat=remat)
    return out[:tokens], last


def _check(rule: _Rule, rows: Any, rates: Rates, steps: int, chunk_size: int) -> None:
    for name, options in (("reads", ("before", "after")), ("step", ("token", "chunk"))):
        if getattr(rule, name) not in options:
            raise ValueError(f"{name} must be one of {options}; got {getattr(rule, name)!r}.")
    q, k, v = rows
    if not q.shape[0]:
        raise ValueError(f"q must have at least one token; got shape {q.shape}.")
    if k.shape != q.shape:
        raise ValueError(f"k must have shape {q.shape}, as q; got {k.shape}.")
    for name, tree in (("v", v), ("rates.gate", rates.gate)):
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
        if not shapes or any(shape[:1] != q.shape[:1] for shape in shapes):
            raise ValueError(
                f"{name} must have T = {q.shape[0]} rows, as q; got "
                f"{_contract.described(tree)}, shapes {shapes}."
            )
    for name in ("retain", "momentum"):
        rate = getattr(rates, name)
        if rate is not None and rate.shape[:1] != (steps,):
            raise ValueError(
                f"rates.{name} must have {steps} rows, one for each inner step; got shape "
                f"{rate.shape}."
            )
    if rates.scale is not None and rates.scale.shape != (chunk_size,):
        raise ValueError(
            f"rates.scale must have shape {(chunk_size,)}, a factor for each position of a chunk; "
            f"got {rates.scale.shape}."
        )
    if rule.retention.first and rule.step == "token" and chunk_size > 1:
        raise ValueError(
            "retention decays before the gradient, which only one step of a chunk can follow; got "
            f"chunk_size={chunk_size} with step='token'. Use chunk_size=1, step='chunk' or "
            "retentions.decay(first=False)."
        )


def _check_gate(gate: Any, weights: Any) -> None:
    found: Any = jax.tree.structure(gate)
    if found != jax.tree.structure(weights) and not jax.tree_util.all_leaves([gate]):
        raise ValueError(
            "rates.gate must be one array [T], or a tree of them laid out as the weights; got "
            f"{found} for {jax.tree.structure(weights)}."
        )


def _decayed(rule: _Rule, state: FastState, steps: dict[str, jax.Array]) -> Any:
    if "retain" not in steps:
        return state.weights
    return rule.retention.decay(state.weights, steps["retain"], state.kept)


def _stepped(
    rule: _Rule, state: FastState, gradient: Any, steps: dict[str, jax.Array]
) -> FastState:
    """One inner step; rates ``[...]`` of this step alone."""
    more = {name: rate for name, rate in steps.items() if name == "momentum"}
    updates, optimizer = rule.optimizer.update(gradient, state.optimizer, state.weights, **more)
    weights = optax.apply_updates(_decayed(rule, state, steps), updates)
    return FastState(rule.retention.after(weights, state.kept), optimizer, state.kept)


def _differentiated(rule: _Rule, state: FastState, steps: dict[str, jax.Array]) -> Any:
    """The weights at which gradients are taken."""
    base = _decayed(rule, state, steps) if rule.retention.first else state.weights
    return rule.retention.link(base)


def _weighed(gate: Any, gradient: Any) -> Any:
    """A token's gradient times its step size, or each leaf times its own."""
    if jax.tree_util.all_leaves([gate]):
        return jax.tree.map(lambda leaf: gate.astype(leaf.dtype) * leaf, gradient)
    return jax.tree.map(lambda leaf, own: own.astype(leaf.dtype) * leaf, gradient, gate)


def _mix(start: Any, end: Any, part: jax.Array) -> Any:
    return jax.tree.map(lambda a, b: a + part.astype(a.dtype) * (b - a), start, end)


def _by_token(
    rule: _Rule, state: FastState, chunk: _Chunk, scale: jax.Array | None
) -> tuple[FastState, jax.Array]:
    """A chunk whose tokens are a step each, all of gradients at its beginning."""
    first = {name: rate[0] for name, rate in chunk.steps.items()}
    weights = _differentiated(rule, state, first)

    def gradient(k: jax.Array, v: Any) -> Any:
        return jax.grad(lambda w: rule.loss(rule.memory.predict(w, k), v))(weights)

    gradients = jax.vmap(gradient)(chunk.k, chunk.v)
    start = state.weights
    parts = jnp.ones(chunk.q.shape[0], jnp.float32) if scale is None else scale

    def seen(held: FastState, part: jax.Array) -> Any:
        return held.weights if scale is None else _mix(start, held.weights, part)

    def one(held: FastState, x: Any) -> Any:
        q, gate, of_token, steps, part = x
        held = _stepped(rule, held, _weighed(gate, of_token), steps)
        used = seen(held, part) if rule.reads == "after" else start
        return held, rule.memory.read(rule.retention.link(used), q)

    xs = (chunk.q, chunk.gate, gradients, chunk.steps, parts)
    end, out = jax.lax.scan(one, state, xs)
    return end._replace(weights=seen(end, parts[-1])), out


def _by_chunk(
    rule: _Rule, state: FastState, chunk: _Chunk, scale: jax.Array | None
) -> tuple[FastState, jax.Array]:
    """A chunk that is one step."""
    steps = {name: rate[0] for name, rate in chunk.steps.items()}
    weights = _differentiated(rule, state, steps)

    def total(w: Any, gate: jax.Array) -> jax.Array:
        losses = jax.vmap(lambda k, v: rule.loss(rule.memory.predict(w, k), v))(chunk.k, chunk.v)
        return (gate.astype(losses.dtype) * losses).sum()

    if jax.tree_util.all_leaves([chunk.gate]):
        gradient = jax.grad(total)(weights, chunk.gate)
    else:
        gradient = _of_each_leaf(total, weights, chunk.gate)
    end = _stepped(rule, state, gradient, steps)

    def seen(part: jax.Array | None) -> Any:
        return end.weights if part is None else _mix(state.weights, end.weights, part)

    def read(q: jax.Array, part: jax.Array | None) -> jax.Array:
        used = state.weights if rule.reads == "before" else seen(part)
        return rule.memory.read(rule.retention.link(used), q)

    out = jax.vmap(read, (0, None if scale is None else 0))(chunk.q, scale)
    return end._replace(weights=seen(None if scale is None else scale[-1])), out


def _of_each_leaf(total: Callable[[Any, jax.Array], jax.Array], weights: Any, gates: Any) -> Any:
    """The gradient of each leaf, of the losses with the leaf's own step sizes."""
    leaves, structure = jax.tree.flatten(weights)

    def gradient(index: int, gate: jax.Array) -> jax.Array:
        def alone(leaf: jax.Array) -> jax.Array:
            every = [*leaves[:index], leaf, *leaves[index + 1 :]]
            return total(jax.tree.unflatten(structure, every), gate)

        return jax.grad(alone)(leaves[index])

    made = [gradient(index, gate) for index, gate in enumerate(jax.tree.leaves(gates))]
    return jax.tree.unflatten(structure, made)

"""One layer for all memories: what is trained, on which loss, by what, and when it is read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttt_jax import _arguments, _contract, _varying
from ttt_jax.layers import _inputs, _scans, _segments, inner_losses, retentions
from ttt_jax.layers._forms import boundaries, choose
from ttt_jax.layers._inner_steps import (
    Chunk,
    FastState,
    Rates,
    Rule,
    begun,
    by_chunk,
    by_token,
    check,
    check_state,
)
from ttt_jax.layers.memories import Memory
from ttt_jax.layers.retentions import Retention

__all__ = ["FastState", "Rates", "fast_state", "fast_weight"]

_SGD = optax.sgd(1.0)
_KEEP = retentions.keep()


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
    window=_arguments.count(),
    segments=_inputs.numbers,
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
    window: int = 1,
    segments: jax.Array | None = None,
    remat: int = 4,
) -> tuple[jax.Array, FastState]:
    """A network that is trained on tokens as they are read, each choice an argument of its own.

    For one head of one sequence. With the weights ``theta`` at the beginning of a chunk (after
    their decay, where the retention says so), each of its tokens has the gradient
    ``g_s = d loss(predict(theta, k_s), v_s) / d theta``, and an inner step is

        ``theta <- after(decay(theta, retain) + optimizer(gate_s * g_s))``

    for each token, or with ``step="chunk"`` once for the sum over the chunk; with a ``window`` the
    gradients of the tokens before are in the sum. A token's output is ``read(theta, q_t)``.

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
    Memora         mlp         squared         kl           SGD        after   any
    LaCT           swiglu      dot_product     norms        orthogonal before  2,048 up
    ATLAS          mlp         squared         decay, late  orthogonal after   any
    OmegaNet       mlp         squared         decay, late  SGD        after   any
    ============== =========== =============== ============ ========== ======= ========

    SGD has a learning rate of 1, as the gates are the step sizes; TTT layers have ``Rates.scale``,
    LaCT ``step="chunk"``, ATLAS and OmegaNet a ``window``; with the orthogonal updates goes a
    momentum. ATLAS reads keys and queries through polynomial features, which are the caller's to
    apply; Yaad's published loss switches at the norm of the error, ``huber`` at each entry.
    :func:`ttt_linear` and :func:`ttt_mlp` give the same results in products of matrices.

    **Fails** where a gate is too large for the loss: errors then grow from step to step. The outer
    gradient reaches values only through losses whose mixed derivative is not zero.

    **Cost:** with ``step="token"`` the gradients of a chunk's tokens are all held,
    ``chunk_size`` times the weights, and steps follow each other; with ``"chunk"`` one gradient
    for each chunk (for each leaf, where gates are a tree). With ``segments`` and chunks of more
    than one token, about three times that, as chunks begin anywhere.

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
      window: how many tokens, itself among them, the loss of a step is summed over.
      segments: int ``[T]``; where the number changes another sequence begins, from ``state`` and
        with a chunk of its own. Rates of steps then have T rows whatever a step is, of which that
        of a chunk's first token counts; ``step="chunk"`` needs ``reads="before"``. None for one
        sequence.
      remat: chunks between two states that are kept for the backward pass; 0 keeps everything.

    Returns:
      ``out [T, ...]``, and the state after the last whole chunk (of the last segment).

    Raises:
      TypeError: an argument of another type.
      ValueError: T is 0, lengths that do not fit, an unknown choice, or a decay before the
        gradients of several steps.

    References:
      Behrouz et al., `MIRAS <https://arxiv.org/abs/2504.13173>`_, 2025, section 3, and the
      publications that the parts name.
    """
    extended = optax.with_extra_args_support(optimizer)
    rule = Rule(memory, loss, retention, extended, reads, step, window)
    tokens = q.shape[0]
    check(rule, (q, k, v), rates, segments, chunk_size)
    check_state(rule, state, rates.gate)
    state = begun(state, (k, v, rates.gate), window)
    given = (q, k, v, rates, state)
    q, k, v, rates, state = _varying.along(given, (*given, segments))
    of_tokens = step == "token" or segments is not None
    steps = {
        name: rate if of_tokens else jnp.repeat(rate, chunk_size, 0)[:tokens]
        for name in ("retain", "momentum")
        if (rate := getattr(rates, name)) is not None
    }
    rows, apply = Chunk(q, k, v, rates.gate, steps), by_token if step == "token" else by_chunk
    if segments is not None and chunk_size > 1:
        sizes = chunk_size, remat
        return _segments.run(rule, apply, state, rows, rates.scale, segments, sizes)
    groups, size = _scans.groups(-(-tokens // chunk_size), remat)
    missing = groups * size * chunk_size - tokens
    # What fills the last chunks is as the last token, so that every gradient is finite where that
    # one's is: a gate of 0 makes a step of 0, at which the norm of an optimizer has no derivative.
    rows = jax.tree.map(
        lambda leaf: jnp.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1)), mode="edge"), rows
    )
    if step == "chunk":
        # Nor may it be a part of the step of a chunk that has tokens.
        index = jnp.arange(tokens + missing)
        zero = (index >= tokens) & (index < -(-tokens // chunk_size) * chunk_size)
        rows = rows._replace(gate=jax.tree.map(lambda gate: jnp.where(zero, 0, gate), rows.gate))
    begins = None if segments is None else _scans.padded(boundaries(segments), tokens + missing)

    def body(held: tuple[FastState, jax.Array], x: tuple[Chunk, jax.Array | None]) -> Any:
        (before, first), (chunk, begin) = held, x
        if begin is not None:
            before = choose(begin[0], state, before)
        after, out = apply(rule, before, chunk, rates.scale)
        new = choose(first + chunk_size <= tokens, after, before)
        return (new, first + chunk_size), out

    start = state, jnp.int32(0)
    (last, _), out = _scans.scan(body, start, (rows, begins), chunk=chunk_size, remat=remat)
    return out[:tokens], last

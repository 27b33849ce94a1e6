"""TTT-Linear and TTT-MLP token by token: a cache in the middle of a chunk."""

import jax
import jax.numpy as jnp

from ttt_jax import _arguments
from ttt_jax.layers import _forms, _inputs, _kernel
from ttt_jax.layers._forms import Rows, TTTCache
from ttt_jax.layers._net import Weights

__all__ = ["ttt_cache", "ttt_decode", "ttt_prefill"]

_RULES = {
    "scale": _inputs.positions,
    "cache": _inputs.cache,
    "norm": _inputs.arrays(("gamma", "beta")),
}
_number = _arguments.array(0, kinds="f")
_vector = _arguments.array(1, kinds="f", like="[d]")


@_arguments.checked(state=_inputs.arrays(_inputs.LINEAR, _inputs.MLP))
def ttt_cache(state: Weights) -> TTTCache:
    """The cache of a layer that has read nothing, or whole chunks alone.

    Args:
      state: ``(W [d, d], b [d])`` or ``(W1 [d, h], b1 [h], W2 [h, d], b2 [d])``: the initial
        weights, or the state that :func:`ttt_linear` or :func:`ttt_mlp` returned after a multiple
        of ``chunk_size`` tokens.

    Returns:
      A :class:`TTTCache` at the beginning of a chunk; float32, or float64 as the state.

    Raises:
      TypeError: no tuple of two or four arrays.
      ValueError: shapes that do not fit.
    """
    width = state[0].shape[0] if state[0].ndim else 0
    _inputs.check_weights("state", state, width)
    double = any(leaf.dtype == jnp.float64 for leaf in state)
    return _forms.fresh(tuple(x.astype(jnp.float64 if double else jnp.float32) for x in state))


@_arguments.checked(q=_vector, k=_vector, v=_vector, gate=_number, **_RULES)
def ttt_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    cache: TTTCache,
    norm: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, TTTCache]:
    """One token of :func:`ttt_linear` or :func:`ttt_mlp`, whichever the cache is of.

    A sequence read so, token by token, has the outputs of the whole. Inside a chunk the weights of
    its beginning and the sums of its gradients are held apart, as the factor of the position that
    reads scales all of them anew.

    **Cost:** reading and writing the cache, twice the size of the state; ``10 d^2`` multiplications
    and additions for TTT-Linear.

    Args:
      q: ``[d]``.
      k: ``[d]``.
      v: ``[d]``.
      gate: a number, the step size of this token.
      scale: ``[chunk_size]``.
      cache: of :func:`ttt_cache`, :func:`ttt_prefill` or the call before.
      norm: ``(gamma [d], beta [d])``.

    Returns:
      ``out [d]`` in the dtype of q, k and v, and the cache after the token.

    Raises:
      TypeError: an argument of another type.
      ValueError: shapes that do not fit.

    References:
      Sun et al., `Learning to (Learn at Test Time) <https://arxiv.org/abs/2407.04620>`_, 2024,
      Eqs. 4-7: the primal form.
    """
    rows = Rows(q, k, v, gate)
    _inputs.check_shapes(rows, scale, norm)
    _inputs.check_weights("cache", cache.weights, q.shape[0])
    wide, shared, (held,) = _inputs.widened(rows, scale, norm, cache)
    new, out = _forms.advance(held, wide, shared)
    return out.astype(shared.operand), new


PREFILL_FORMS = ("auto", "dual", "kernel")
# Chunks from which the kernels are taken: one more may be made in XLA at the end.
_LEAST_CHUNKS = 4


@_arguments.checked(
    q=_inputs.table,
    k=_inputs.table,
    v=_inputs.table,
    gate=_inputs.vector,
    length=None,
    remat=_arguments.count(0),
    **_RULES,
)
def ttt_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    cache: TTTCache,
    norm: tuple[jax.Array, jax.Array],
    *,
    length: int | jax.Array | None = None,
    form: str = "auto",
    remat: int = 4,
) -> tuple[jax.Array, TTTCache]:
    """Many tokens of :func:`ttt_linear` or :func:`ttt_mlp` from a cache on, chunk by chunk.

    The same as T calls of :func:`ttt_decode`: after a prompt of any length, in the middle of a
    chunk as well, the cache is where the next token goes on.

    **Cost:** about twice that of :func:`ttt_linear` with ``form="dual"``, as the chunks of tokens
    need not begin where the windows that are computed at once do. With a cache between two chunks,
    as after :func:`ttt_cache`, kernels make all whole chunks of the tokens at the cost of
    :func:`ttt_linear`, and XLA the rest of them; from a cache in the middle of a chunk on XLA makes
    all. Which it is, is decided as the program runs, once for all heads and sequences that are
    mapped over: one in the middle of a chunk has XLA make all of them.

    Args:
      q: ``[T, d]``, T at least 1.
      k: ``[T, d]``.
      v: ``[T, d]``.
      gate: ``[T]``.
      scale: ``[chunk_size]``.
      cache: of :func:`ttt_cache`, :func:`ttt_decode` or a call before.
      norm: ``(gamma [d], beta [d])``.
      length: how many of the T tokens there are in truth, where padding follows them; may be
        traced. None for all.
      form: ``"dual"`` in XLA; ``"kernel"``, see :func:`ttt_linear`; ``"auto"`` takes the kernels
        for 4 chunks of tokens or more, where they run and were compared. What they make is
        differentiable once, in reverse mode; choose ``"dual"`` for second derivatives.
      remat: see :func:`ttt_linear`.

    Returns:
      ``out [T, d]`` in the dtype of q, k and v, of no meaning for padding, and the cache after the
      last token that is no padding.

    Raises:
      TypeError: an argument of another type.
      ValueError: T is 0, shapes that do not fit, or that the kernels do not take; a length out of
        range; an unknown form.
      NotImplementedError: ``form="kernel"`` where there are none.

    References:
      Sun et al., `Learning to (Learn at Test Time) <https://arxiv.org/abs/2407.04620>`_, 2024.
    """
    rows = Rows(q, k, v, gate)
    if form not in PREFILL_FORMS:
        raise ValueError(f"form of ttt_prefill must be one of {PREFILL_FORMS}; got {form!r}.")
    _inputs.check_shapes(rows, scale, norm)
    _inputs.check_weights("cache", cache.weights, q.shape[1])
    count = None if length is None else _inputs.count_of("length", length, q.shape[0])
    return prefilled(rows, scale, _kernel.Start(cache, count), norm, form=form, remat=remat)


def prefilled(
    rows: Rows,
    scale: jax.Array,
    start: _kernel.Start,
    norm: tuple[jax.Array, jax.Array],
    *,
    form: str,
    remat: int,
) -> tuple[jax.Array, TTTCache]:
    """:func:`ttt_prefill` of arguments that were checked.

    Raises:
      ValueError: sizes that the kernels do not take.
      NotImplementedError: no kernels here.
    """
    cache, count = start
    if form == "auto" and rows.gate.shape[0] < _LEAST_CHUNKS * scale.shape[0]:
        form = "dual"
    form = _kernel.form_of(form, rows, scale, (cache.weights, norm), None)
    if form == "kernel":
        return _kernel.run_on(rows, scale, start, norm, remat)
    return _kernel.dual_on(rows, scale, cache, norm, count, remat)

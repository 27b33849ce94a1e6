"""Attention of packed sequences: every token sees one span of its row."""

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments
from ttt_jax.kernels.attention.forms import FORMS, sparse_kernel
from ttt_jax.kernels.attention.limits import fits_sparse
from ttt_jax.kernels.attention.masked import attend_masked
from ttt_jax.kernels.attention.sight import NEVER, Sight

# The kernel's cache holds something; nothing of it is seen.
_SLOTS = 16


def attend_spans(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    form: str,
    scale: float | None = None,
) -> jax.Array:
    """Returns ``softmax(scale query key^T, where first <= place of the key <= last) value``.

    Causal sequences side by side have ``first`` at their begin and ``last`` at the token itself; a
    prefix that sees itself in both directions has ``last`` at its end.

    Args:
      query: ``[N, T, H, D]``.
      key: ``[N, T, K, D]``; K divides H, and head h of the queries reads head ``h // (H / K)``.
      value: ``[N, T, K, D]``.
      first: int32 ``[N, T]``, place of the first key that each query sees.
      last: int32 ``[N, T]``, of the last one; smaller than ``first`` where nothing is seen, and the
        result is then a finite value without meaning.
      form: ``"xla"`` or ``"fused"``, a kernel that reads what is seen by a query of the block;
        see :func:`~ttt_jax.kernels.attention.cached.attend_cached`.
      scale: of the scores; ``None`` for ``1 / sqrt(D)``.

    Returns:
      ``[N, T, H, D]`` of the dtype of ``value``.
    """
    query = _arguments.array("query", query, 4)
    key = _arguments.array("key", key, 4)
    value = _arguments.array("value", value, 4)
    first = _arguments.array("first", first, 2)
    last = _arguments.array("last", last, 2)
    _arguments.choice("form", form, FORMS)
    tokens, size = query.shape[1], query.shape[-1]
    place = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None], first.shape)
    if form == "fused" and fits_sparse(tokens, size) and sparse_kernel() is not None:
        scale = size**-0.5 if scale is None else scale
        empty = jnp.zeros((key.shape[0], _SLOTS, *key.shape[2:]), key.dtype)
        never = jnp.full((key.shape[0], _SLOTS), NEVER, jnp.int32)
        rows = jnp.where(last < first, -1, last), first - 1
        sight = Sight(rows, (place, place), (never, never))
        return sparse_kernel().attend(scale, query, key, value, empty, empty, sight)
    mask = (place[:, None] >= first[:, :, None]) & (place[:, None] <= last[:, :, None])
    return attend_masked(query, key, value, mask, form=form, scale=scale)

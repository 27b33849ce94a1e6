"""Attention of one new token per sequence to a cache of all layers, read where it lies."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments, shared_outputs
from ttt_jax.kernels.attention.forms import FORMS, decoding_kernel
from ttt_jax.kernels.attention.limits import HEAD_SIZES

_LOWEST = -1e30


def attend_token(
    token: tuple[jax.Array, jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    layer: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    *,
    form: str,
    scale: float | None = None,
) -> jax.Array:
    """Returns ``softmax(scale query [held key, key]^T) [held value, value]``, one query a sequence.

    The layer is an argument, as a slice of the cache made before the call would be copied. The
    fused form reads the slots that are seen and no others, so that a short sequence in a long
    cache, and one that is done, cost what they hold.

    Args:
      token: query, key and value of the new token, each ``[N, H, D]``. It sees itself.
      cache: keys and values, each ``[L, N, S, H, D]``.
      layer: int32 scalar, which of the L is read.
      begin: int32 ``[N]``, the first slot that is seen, at least 0.
      end: int32 ``[N]``, one past the last one, at most S; not larger than ``begin`` where none is.
      form: ``"xla"``, to which slots that are not seen must be finite, or ``"fused"``, which is the
        same for a D that is not in ``limits.HEAD_SIZES``; see
        :func:`~ttt_jax.kernels.attention.forms.form_of`.
      scale: of the scores; ``None`` for ``1 / sqrt(D)``.

    Returns:
      ``[N, H, D]`` of the dtype of the query.
    """
    query, key, value = (_arguments.array("token", each, 3) for each in token)
    keys, values = (_arguments.array("cache", each, 5) for each in cache)
    begin = _arguments.array("begin", begin, 1)
    end = _arguments.array("end", end, 1)
    _arguments.choice("form", form, FORMS)
    size = query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    operands = (query, key, value), (keys, values), jnp.asarray(layer, jnp.int32), begin, end
    if form == "fused" and size in HEAD_SIZES and decoding_kernel() is not None:
        result: jax.Array = _fused(scale, *operands)
        return result
    return products(scale, *operands)


def products(
    scale: float, token: Any, cache: Any, layer: jax.Array, begin: jax.Array, end: jax.Array
) -> jax.Array:
    """:func:`attend_token` in sums of products of XLA, over all slots.

    No dots, whose operands would be copied into another order of axes.
    """
    dtype = token[0].dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    held = (jax.lax.dynamic_index_in_dim(each, layer, 0, keepdims=False) for each in cache)
    keys, values = (each.astype(wide) for each in held)
    query, key, value = (each.astype(wide) for each in token)
    slots = jnp.arange(keys.shape[1])[None]
    seen = (slots >= begin[:, None]) & (slots < end[:, None])
    before = jnp.where(seen[:, :, None], (query[:, None] * keys).sum(-1) * scale, _LOWEST)
    itself = (query * key).sum(-1) * scale
    most = jnp.maximum(before.max(1), itself)
    weights, own = jnp.exp(before - most[:, None]), jnp.exp(itself - most)
    mixed = (weights[..., None] * values).sum(1) + own[..., None] * value
    mixed = mixed / (weights.sum(1) + own)[..., None]
    return mixed.astype(dtype)


def _fused_forward(scale: float, *operands: Any) -> tuple[jax.Array, Any]:
    return decoding_kernel().attend(scale, *operands), operands


def _fused_backward(scale: float, operands: Any, dout: jax.Array) -> tuple[Any, ...]:
    token, cache, *places = operands
    backward = jax.vjp(lambda *arrays: products(scale, *arrays, *places), token, cache)[1]
    return (*backward(dout), None, None, None)


_fused = jax.custom_vjp(lambda scale, *operands: _fused_forward(scale, *operands)[0], (0,))
_fused.defvjp(_fused_forward, _fused_backward, **shared_outputs.DECLARED)

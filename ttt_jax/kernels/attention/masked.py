"""Attention under a mask, with fewer heads of keys than of queries: for decoders with caches."""

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments
from ttt_jax.kernels.attention.forms import FORMS

# Finite, so that a query which sees nothing (padding) has no NaN in its gradient.
_UNSEEN = -1e30
# cuDNN's rules (jax 0.11): a head size it takes, an even number of tokens for gradients.
_HEAD_SIZE_MULTIPLE, _MOST_HEAD_SIZE = 8, 256


def attend_masked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    form: str,
    scale: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Returns ``softmax(scale query key^T, where mask) value``; softmax in float32.

    Args:
      query: ``[N, T, H, D]``.
      key: ``[N, S, K, D]``; K divides H, and head h of the queries reads head ``h // (H / K)``.
      value: ``[N, S, K, D]``.
      mask: bool ``[N or 1, T, S]``, True where a query sees a key; None for causal attention,
        S = T. A query that sees nothing gets a finite value without meaning.
      form: ``"xla"``, or ``"fused"`` for cuDNN's flash attention where it takes the sizes; see
        :func:`~ttt_jax.kernels.attention.form_of`.
      scale: of the scores; ``None`` for ``1 / sqrt(D)``.
      window: of causal attention, how many tokens, itself among them, a token sees; None for all.

    Returns:
      ``[N, T, H, D]`` of the dtype of ``value``.

    Raises:
      ValueError: a window beside a mask.

    References:
      Ainslie et al., `GQA <https://arxiv.org/abs/2305.13245>`_, 2023.
    """
    query = _arguments.array("query", query, 4)
    key = _arguments.array("key", key, 4)
    value = _arguments.array("value", value, 4)
    _arguments.choice("form", form, FORMS)
    if window is not None:
        _arguments.integer("window", window, 1)
    if window is not None and mask is not None:
        raise ValueError("attend_masked takes a window or a mask, got both: cut it in the mask.")
    tokens, size = query.shape[1], query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    even = tokens % 2 == 0 and key.shape[1] % 2 == 0
    if form == "fused" and even and size % _HEAD_SIZE_MULTIPLE == 0 and size <= _MOST_HEAD_SIZE:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if mask is None else _over_heads(mask, query.shape[2]),
            is_causal=mask is None,
            scale=scale,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    if mask is None:
        mask = _causal(tokens, key.shape[1], window)
    return _grouped_products(query, key, value, mask, scale)


def _causal(tokens: int, keys: int, window: int | None) -> jax.Array:
    mask = jnp.tril(jnp.ones((1, tokens, keys), bool))
    return mask if window is None else jnp.triu(mask, 1 - window)


def _over_heads(mask: jax.Array, heads: int) -> jax.Array:
    """``[N, H, T, S]``: jax's rule for vmap (0.11) refuses a mask that heads share."""
    return jnp.broadcast_to(mask[:, None], (len(mask), heads, *mask.shape[1:]))


def _grouped_products(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float
) -> jax.Array:
    batch, tokens, heads, size = query.shape
    groups = key.shape[2]
    query = (query * jnp.asarray(scale, query.dtype)).reshape(
        batch, tokens, groups, heads // groups, size
    )
    scores = jnp.einsum("ntkgd,nskd->nkgts", query, key)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = jnp.where(mask[:, None, None], scores, _UNSEEN)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    mixed = jnp.einsum("nkgts,nskd->ntkgd", weights, value)
    return mixed.reshape(batch, tokens, heads, size)

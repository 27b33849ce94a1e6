"""Logits of hidden states, with a backward pass in the compute dtype."""

from typing import Any

import jax
import jax.numpy as jnp


def _products(x: jax.Array, head: jax.Array) -> jax.Array:
    # float64 stays so.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(
        x, head, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=wide
    )


of = jax.custom_vjp(_products)
"""``[N, T, width], [V, width] -> float32 [N, T, V]``: a head's products, summed in float32."""


def _forward(x: jax.Array, head: jax.Array) -> Any:
    # Not by the rule itself, which has no forward mode: this is differentiated once more.
    return _products(x, head), (x, head)


def _backward(kept: Any, cotangent: jax.Array) -> Any:
    # In the compute dtype: as a float32 product it is several times as slow on matrix units.
    x, head = kept
    narrow = cotangent.astype(x.dtype)
    rows, flat = narrow.reshape(-1, narrow.shape[-1]), x.reshape(-1, x.shape[-1])
    return narrow @ head, (rows.T @ flat).astype(head.dtype)


of.defvjp(_forward, _backward)

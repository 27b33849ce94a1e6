"""Logits of hidden states, with a backward pass in the compute dtype."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def of(x: jax.Array, head: jax.Array, dtype: Any) -> jax.Array:
    """A head's products, summed in float32: ``[N, T, width], [V, width] -> [N, T, V]``."""
    return _products(x, head, dtype)


def _products(x: jax.Array, head: jax.Array, dtype: Any) -> jax.Array:
    # float64 stays so.
    wide = x.dtype if x.dtype == jnp.float64 else dtype
    return jax.lax.dot_general(
        x, head, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=wide
    )


def _forward(x: jax.Array, head: jax.Array, dtype: Any) -> Any:
    # Not by the rule itself, which has no forward mode: this is differentiated once more.
    return _products(x, head, dtype), (x, head)


def _backward(dtype: Any, kept: Any, cotangent: jax.Array) -> Any:
    del dtype
    # In the compute dtype: as a float32 product it is several times as slow on matrix units.
    x, head = kept
    narrow = cotangent.astype(x.dtype)
    rows, flat = narrow.reshape(-1, narrow.shape[-1]), x.reshape(-1, x.shape[-1])
    return narrow @ head, (rows.T @ flat).astype(head.dtype)


of.defvjp(_forward, _backward)

"""Rotation of the pairs of a vector by angles of their own (Su et al., 2021)."""

import jax
import jax.numpy as jnp


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array, *, neighbors: bool) -> jax.Array:
    """Pairs ``(a, b)`` become ``(a cos - b sin, a sin + b cos)``.

    The other one of a pair is had by reversing an axis of two: the transpose of that is a reversal
    too, while that of a slice is a padding, which is slow on a GPU.

    Args:
      x: ``[..., D]``, of the dtype of the products.
      cos: of every pair's angle, ``[..., D / 2]``.
      sin: as ``cos``.
      neighbors: pairs are (0, 1), (2, 3), ...; else (i, i + D / 2).

    Returns:
      ``[..., D]``.
    """
    half = x.shape[-1] // 2
    axis = x.ndim if neighbors else x.ndim - 1
    pairs = x.reshape(*x.shape[:-1], *((half, 2) if neighbors else (2, half)))
    cos, sin = (jnp.expand_dims(part, -1 if neighbors else -2) for part in (cos, sin))
    shape = [1] * sin.ndim
    shape[-1 if neighbors else -2] = 2
    signed = jnp.array([-1, 1], x.dtype).reshape(shape) * sin
    return (pairs * cos + jax.lax.rev(pairs, (axis,)) * signed).reshape(x.shape)

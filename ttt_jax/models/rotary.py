"""Rotary position embeddings in both layouts of pairs (Su et al., 2021)."""

import jax
import jax.numpy as jnp

from ttt_jax.layers import _pairs


def angles(positions: jax.Array, size: int, base: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every pair's angle, float32.

    Args:
      positions: integers ``[..., T]``.
      size: D, of a head; even.
      base: of the geometric series of frequencies, ``base ** (-2 i / D)``.

    Returns:
      Two arrays ``[..., T, D / 2]``.
    """
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: jax.Array, turn: tuple[jax.Array, jax.Array], *, interleaved: bool = False
) -> jax.Array:
    """Rotates the pairs of every head by their angles.

    Args:
      x: ``[N, T, H, D]``.
      turn: of :func:`angles`, each ``[N or 1, T, D / 2]``.
      interleaved: pairs are (0, 1), (2, 3), ... as in Llama's own files, instead of (i, i + D / 2)
        as in Hugging Face's.

    Returns:
      ``[N, T, H, D]`` of the dtype of ``x``; the products are float32 at least.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = (part[:, :, None] for part in turn)
    return _pairs.turned(wide, cos, sin, neighbors=interleaved).astype(x.dtype)

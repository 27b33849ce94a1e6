"""Rotary position embeddings in both layouts of pairs (Su et al., 2021)."""

import jax
import jax.numpy as jnp


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
    cos, sin = (part[:, :, None] for part in turn)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    half = x.shape[-1] // 2
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide[..., :half], wide[..., half:]
    first, second = first * cos - second * sin, first * sin + second * cos
    if interleaved:
        return jnp.stack([first, second], -1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate([first, second], -1).astype(x.dtype)

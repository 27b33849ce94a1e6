"""Scans over chunks that keep the carry every few chunks and compute the rest again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _scans, _varying


def padded(x: jax.Array, length: int) -> jax.Array:
    """``x [T, ...]`` with zeros up to ``length`` rows."""
    return jnp.pad(x, ((0, length - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def groups(chunks: int, remat: int) -> tuple[int, int]:
    """How many groups of how many chunks hold them all, with as few empty ones as possible."""
    if remat == 0:
        return 1, chunks
    count = -(-chunks // remat)
    return count, -(-chunks // count)


def scan(
    step: Callable[[Any, Any], Any], start: Any, rows: Any, *, chunk: int, remat: int
) -> tuple[Any, jax.Array]:
    """``jax.lax.scan`` of ``step`` over chunks of rows.

    Args:
      step: ``(carry, rows of one chunk) -> (carry, out [chunk, ...])``.
      start: the carry of the first chunk.
      rows: leaves ``[T, ...]``; zeros fill the last chunks.
      chunk: rows of a chunk.
      remat: after how many chunks a carry is kept for the backward pass, which computes what is
        between again; 0 keeps everything.

    Returns:
      The last carry, and the outputs ``[T, ...]``.
    """
    (length,) = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    count, size = groups(-(-length // chunk), remat)

    def split(leaf: jax.Array) -> jax.Array:
        full = padded(leaf, count * size * chunk)
        return full.reshape(count * size, chunk, *leaf.shape[1:])

    chunks = jax.tree.map(split, rows)
    if remat:
        carry, out = _scans.grouped(step, start, chunks, every=size, each=False)
    else:
        carry, out = _varying.scan(step, start, chunks)
    return carry, out.reshape(-1, *out.shape[2:])[:length]

"""Which blocks of keys the kernel of :mod:`.cached_kernel` reads, from positions."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels.attention.cached import Reach, sees


class Tiles(NamedTuple):
    """Rows of queries and of keys per step, warps and pipeline stages; measured on an H200."""

    queries: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """Which blocks of keys a block of queries reads.

    Attributes:
      order: int32 ``[N, T / queries, ceil(S / keys)]``, blocks of the cache: first those that all
        queries see wholly, then those that they see in part.
      whole: int32 ``[N, T / queries]``, how many are seen wholly, and need no mask.
      held: int32 ``[N, T / queries]``, how many are read.
      own: int32 ``[N, T / queries]``, how many blocks of the chunk are, from its first.
    """

    order: jax.Array
    whole: jax.Array
    held: jax.Array
    own: jax.Array


def block_pairs(
    reach: Reach, keys: jax.Array, rows: int, columns: int
) -> tuple[jax.Array, jax.Array]:
    """Where queries of a block see a key of another, and where all see all.

    Two of bool ``[N, T / rows, ceil(S / columns)]``.
    """
    seen = sees(reach.queries[:, :, None], keys[:, None], reach.window, reach.sinks)
    batch, tokens, slots = seen.shape
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, -slots % columns)))
    seen = seen.reshape(batch, tokens // rows, rows, -1, columns)
    return seen.any((2, 4)), seen.all((2, 4))


def last_of(pairs: jax.Array) -> jax.Array:
    """One past the last true place of the last axis; 0 without one."""
    places = jnp.arange(1, pairs.shape[-1] + 1, dtype=jnp.int32)
    return jnp.where(pairs, places, 0).max(-1)


def blocks_of(reach: Reach, tiles: Tiles) -> Blocks:
    """The blocks that each block of queries reads."""
    held, whole = block_pairs(reach, reach.held, tiles.queries, tiles.keys)
    own, _ = block_pairs(reach, reach.queries, tiles.queries, tiles.keys)
    rank = jnp.where(whole, 0, jnp.where(held, 1, 2))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    count = functools.partial(jnp.sum, axis=-1, dtype=jnp.int32)
    return Blocks(order, count(whole), count(held), last_of(own))


def fitting(tiles: Tiles, tokens: int) -> Tiles:
    """Tiles that divide the chunk: its length is a multiple of 16."""
    rows = math.gcd(tiles.queries, tokens)
    return tiles._replace(queries=rows, keys=min(tiles.keys, math.gcd(tiles.keys, tokens)))

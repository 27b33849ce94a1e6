"""Which keys a query sees, in two comparisons, and which blocks of them a kernel reads."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEVER = jnp.iinfo(jnp.int32).max
"""The ``newest`` of a key that no query sees."""


class Sight(NamedTuple):
    """A query sees a key where ``newest <= upper`` and ``oldest > lower``.

    Attributes:
      rows: ``upper`` and ``lower`` of the queries, each int32 ``[N, T]``.
      own: ``newest`` and ``oldest`` of the same tokens' keys, each int32 ``[N, T]``.
      held: of the keys of a cache, each int32 ``[N, S]``.
    """

    rows: tuple[jax.Array, jax.Array]
    own: tuple[jax.Array, jax.Array]
    held: tuple[jax.Array, jax.Array]


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
      begin: int32 ``[N, T / queries]``, the first block of the tokens' own that is read.
      end: int32 ``[N, T / queries]``, one past the last one.
    """

    order: jax.Array
    whole: jax.Array
    held: jax.Array
    begin: jax.Array
    end: jax.Array


def seen(rows: tuple[jax.Array, jax.Array], keys: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Bool ``[N, T, S]``."""
    (upper, lower), (newest, oldest) = rows, keys
    return (newest[:, None] <= upper[:, :, None]) & (oldest[:, None] > lower[:, :, None])


def block_pairs(
    rows: tuple[jax.Array, jax.Array], keys: tuple[jax.Array, jax.Array], tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Where queries of a block see a key of another, and where all see all.

    Two of bool ``[N, T / tiles.queries, ceil(S / tiles.keys)]``.
    """
    pairs = seen(rows, keys)
    batch, tokens, slots = pairs.shape
    pairs = jnp.pad(pairs, ((0, 0), (0, 0), (0, -slots % tiles.keys)))
    pairs = pairs.reshape(batch, tokens // tiles.queries, tiles.queries, -1, tiles.keys)
    return pairs.any((2, 4)), pairs.all((2, 4))


def range_of(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first true place of the last axis, and one past the last; 0 and 0 without one."""
    places = jnp.arange(1, pairs.shape[-1] + 1, dtype=jnp.int32)
    end = jnp.where(pairs, places, 0).max(-1)
    return jnp.where(end > 0, jnp.argmax(pairs, axis=-1), 0).astype(jnp.int32), end


def blocks_of(sight: Sight, tiles: Tiles) -> Blocks:
    """The blocks that each block of queries reads."""
    held, whole = block_pairs(sight.rows, sight.held, tiles)
    own, _ = block_pairs(sight.rows, sight.own, tiles)
    rank = jnp.where(whole, 0, jnp.where(held, 1, 2))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    count = functools.partial(jnp.sum, axis=-1, dtype=jnp.int32)
    return Blocks(order, count(whole), count(held), *range_of(own))


def fitting(tiles: Tiles, tokens: int) -> Tiles:
    """Tiles that divide the tokens, a multiple of 16."""
    rows = math.gcd(tiles.queries, tokens)
    return tiles._replace(queries=rows, keys=min(tiles.keys, math.gcd(tiles.keys, tokens)))

"""What a decoder keeps of the tokens it has read: keys and values, or states of layers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.layers import LayerCache

EMPTY = -1
"""The position of a slot that holds nothing."""


class Cache(NamedTuple):
    """Keys before rotation, and values, of the first ``sinks`` tokens and of the last ones.

    Position p has one slot: its own number for p < ``sinks``, else ``sinks + (p - sinks) % ring``
    with ``ring = slots - sinks``. So a chunk that is read again overwrites itself.

    Attributes:
      keys: ``[L, N, S, K, D]``: layers, sequences, slots, heads, size of a head.
      values: ``[L, N, S, K, D]``.
      positions: int32 ``[N, S]``, of the token in each slot, ``EMPTY`` where there is none.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array

    @property
    def slots(self) -> int:
        """S, how many tokens it holds."""
        return self.positions.shape[-1]

    @property
    def length(self) -> jax.Array:
        """int32 ``[N]``: the position that the next token has."""
        return self.positions.max(-1) + 1


class Rows(NamedTuple):
    """What a call read, on its way into a cache.

    Attributes:
      keys: ``[L, N, T, K, D]``, before rotation.
      values: ``[L, N, T, K, D]``.
      positions: int32 ``[N, T]``.
      slots: int32 ``[N, T]``, where they go.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    slots: jax.Array


class States(NamedTuple):
    """What a decoder of TTT layers keeps, however many tokens it has read.

    Attributes:
      layers: a :class:`~ttt_jax.layers.LayerCache` whose leaves have leading axes ``[L, N]``; of no
        meaning for a sequence without tokens, which begins from the parameters.
      length: int32 ``[N]``, the position that the next token has.
      taps: the last inputs of the convolutions before the layers, ``[L, N, 3, width]``; None
        without ``pre_convolution``.
    """

    layers: LayerCache
    length: jax.Array
    taps: jax.Array | None = None


def put(cache: Any, rows: Any, kept: jax.Array | bool = True) -> Any:
    """The cache with the rows, or as it was.

    The choice is made of slots, so that nothing as large as the cache is read for it. In the place
    of rows, :class:`States` have the states after them.

    Args:
      cache: what is held.
      rows: what was read beside it.
      kept: bool scalar, whether the rows are taken in.
    """
    if isinstance(cache, States):
        return jax.tree.map(lambda new, old: jnp.where(kept, new, old), rows, cache)
    slots = jnp.where(kept, rows.slots, _outside(cache.slots, rows.slots.shape[-1]))
    keys, values = (
        jax.vmap(write, (0, None, 0))(held, slots, new)
        for held, new in ((cache.keys, rows.keys), (cache.values, rows.values))
    )
    return Cache(keys, values, write(cache.positions, slots, rows.positions))


def no_rows(cache: Any, inputs: Mapping[str, Any]) -> Any:
    """Rows of tokens ``[N, T]`` that were not read; they are not to be put anywhere.

    Args:
      cache: of which they would become part.
      inputs: with the leaf ``tokens``.
    """
    if isinstance(cache, States):
        return cache
    batch, tokens = jnp.shape(inputs["tokens"])

    def empty(held: jax.Array) -> jax.Array:
        return jnp.zeros((held.shape[0], batch, tokens, *held.shape[3:]), held.dtype)

    none = jnp.zeros((batch, tokens), jnp.int32)
    return Rows(empty(cache.keys), empty(cache.values), none, none)


def _outside(slots: int, count: int) -> jax.Array:
    # Distinct, as scatter's promise asks, and out of bounds, so that they are dropped.
    return slots + jnp.arange(count, dtype=jnp.int32)


def slots_of(positions: jax.Array, sinks: int, slots: int) -> jax.Array:
    """The slot of each position, and one past the end (never written) for a negative one.

    Args:
      positions: int32 ``[N, T]``.
      sinks: how many first tokens are kept for ever.
      slots: S of the cache.
    """
    ring = sinks + (positions - sinks) % (slots - sinks)
    places = jnp.where(positions < sinks, positions, ring)
    return jnp.where(positions < 0, _outside(slots, positions.shape[-1]), places)


def write(held: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Puts rows into their slots.

    Args:
      held: ``[N, S, ...]``.
      slots: int32 ``[N, T]``, distinct per sequence; one past the end is dropped.
      rows: ``[N, T, ...]``.
    """

    def put(held: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
        return held.at[slots].set(rows.astype(held.dtype), mode="drop", unique_indices=True)

    return jax.vmap(put)(held, slots, rows)

"""Chunks that begin anywhere, in windows of fixed size: packed segments, and caches.

A window of C tokens meets chunks of three kinds: one that an earlier window began, the next one of
the same segment, and the first ones of segments that begin in it. There is at most one of each of
the first two, so three sets of weights serve a window whatever the segments are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.layers import _net, _scans
from ttt_jax.layers._forms import Rows, Settings, TTTCache, boundaries, choose, fresh
from ttt_jax.layers._net import Weights

OPEN, NEXT, FIRST = 0, 1, 2
"""Kinds of a token's chunk: begun by an earlier window, the one after it, a segment's first."""


class Places(NamedTuple):
    """Where tokens stand; int32 ``[T]``.

    Attributes:
      position: in the chunk, from 0.
      chunk: the token that begins the chunk; negative where that was before these tokens.
      kind: of the chunk.
      real: bool, False for what fills the last window.
    """

    position: jax.Array
    chunk: jax.Array
    kind: jax.Array
    real: jax.Array


def beginnings(segments: jax.Array | None, begun: jax.Array, tokens: int) -> jax.Array:
    """Int32 ``[T]``: the token that begins the segment; ``-begun`` for the first segment."""
    index = jnp.arange(tokens, dtype=jnp.int32)
    first = jnp.broadcast_to(-begun, (tokens,))
    if segments is None:
        return first
    return jax.lax.cummax(jnp.where(boundaries(segments), index, first))


def places(
    segments: jax.Array | None, begun: jax.Array, length: jax.Array, tokens: int, chunk: int
) -> Places:
    """Places of ``tokens``, of which the first ``length`` are real.

    Args:
      segments: int ``[T]`` or None for one segment.
      begun: int32, how many tokens the first chunk has already.
      length: int32.
      tokens: T.
      chunk: tokens of a chunk, and of a window.
    """
    index = jnp.arange(tokens, dtype=jnp.int32)
    run = beginnings(segments, begun, tokens)
    position = (index - run) % chunk
    start = index - position
    # The first segment begins with what the cache holds, like a chunk that follows another.
    is_first = (run > 0) & (start == run)
    kind = jnp.where(is_first, FIRST, NEXT).astype(jnp.int32)
    kind = jnp.where(start < index - index % chunk, OPEN, kind)
    return Places(position, start, kind, index < length)


def where_rows(real: jax.Array, leaf: jax.Array) -> jax.Array:
    """``leaf [T, ...]``, zero where ``real [T]`` is False."""
    return jnp.where(real.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)


def _by_kind(kind: jax.Array, trees: list[Any]) -> Any:
    """Row by row, the leaf ``[C, ...]`` of the tree of its kind."""

    def select(*leaves: jax.Array) -> jax.Array:
        chosen = leaves[OPEN]
        for number, leaf in enumerate(leaves[1:], 1):
            chosen = jnp.where((kind == number)[:, None], leaf, chosen)
        return chosen

    return jax.tree.map(select, *trees)


def run(
    rows: Rows, cache: TTTCache, settings: Settings, at: Places, start: Weights | None
) -> tuple[jax.Array, TTTCache]:
    """Reads tokens from a cache on.

    Args:
      rows: T tokens.
      cache: what was learned before them.
      settings: what all tokens share.
      at: of the tokens.
      start: the weights of a new segment; None where there is one segment.

    Returns:
      ``out [T, d]``, and the cache after the last real token.
    """
    scale, norm, operand, remat = settings
    chunk = scale.shape[0]
    depth = len(cache.weights) // 2
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))
    # Padding learns nothing, and has no values: a nan times 0 is a nan.
    rows = Rows(*(where_rows(at.real, leaf) for leaf in rows))

    def step(held: tuple[Weights, Weights], x: tuple[Rows, Places]) -> Any:
        row, place = x
        weights, earlier = held
        parts = [_net.pieces(weights, row.k, row.v, norm, operand)]
        gate = jnp.where(place.kind == OPEN, row.gate, 0)
        grown = jax.tree.map(jnp.add, earlier, _net.sums(parts[0], gate, operand))
        # Read by those alone who come after the open chunk, when it is full.
        sets = [weights, _net.moved(weights, grown, scale[-1])]
        sets += [] if start is None else [start]
        parts += [_net.pieces(w, row.k, row.v, norm, operand) for w in sets[1:]]
        chosen = _by_kind(place.kind, parts)

        def before(layer: int, inputs: jax.Array) -> jax.Array:
            outputs = [_net.linear(w, operand)(layer, inputs) for w in sets]
            added = _net.linear(earlier, operand)(layer, inputs)
            outputs[OPEN] = outputs[OPEN] - scale[place.position][:, None] * added
            return _by_kind(place.kind, outputs)

        sees = causal & (place.chunk[:, None] == place.chunk[None])
        rates = jnp.where(sees, scale[place.position][:, None] * row.gate[None], 0)
        within = _net.attended(chosen, rates, operand)
        out = _net.read(row.q, norm, before, within, depth=depth)

        last = jnp.maximum(place.real.sum(dtype=jnp.int32) - 1, 0)
        kind = place.kind[last]
        gate = jnp.where(place.chunk == place.chunk[last], row.gate, 0)
        learned = _net.sums(chosen, gate, operand)
        new = choose(kind == OPEN, (weights, grown), (sets[NEXT], learned))
        if start is not None:
            new = choose(kind == FIRST, (start, learned), new)
        return choose(place.real[0], new, held), out

    (weights, sums), out = _scans.scan(
        step, (cache.weights, cache.sums), (rows, at), chunk=chunk, remat=remat
    )
    count = at.real.sum(dtype=jnp.int32)
    position = jnp.where(count > 0, at.position[jnp.maximum(count - 1, 0)] + 1, cache.position)
    full = position == chunk
    done = fresh(_net.moved(weights, sums, scale[-1]))
    return out, choose(full, done, TTTCache(weights, sums, position))

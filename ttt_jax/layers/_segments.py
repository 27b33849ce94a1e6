"""Packed segments in the fast-weight layer: chunks that begin anywhere, in windows of fixed size.

In a window of C tokens there begin at most one chunk that goes on with a segment, the first chunk
of the last segment that begins in it, and first chunks of segments that end in it. The last are
never whole: what they learn is read and lost. So each window takes three passes of a chunk, the
first two of them over tokens of the next window, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.layers import _scans
from ttt_jax.layers._forms import choose
from ttt_jax.layers._inner_steps import Chunk, FastState, Rule, by_token, read_before
from ttt_jax.layers._windows import beginnings

_Apply = Callable[..., tuple[FastState, jax.Array]]


class _Read(NamedTuple):
    """What a chunk's tokens read: which of two windows' tokens are its own, from which on."""

    own: jax.Array
    at: jax.Array
    out: jax.Array


def run(
    rule: Rule,
    apply: _Apply,
    start: FastState,
    rows: Chunk,
    scale: jax.Array | None,
    segments: jax.Array,
    settings: tuple[int, int],
) -> tuple[jax.Array, FastState]:
    """Reads packed segments, each from the same state.

    Args:
      rule: of the layer.
      apply: ``by_token`` or ``by_chunk``.
      start: before the first token of every segment.
      rows: T tokens.
      scale: of the layer.
      segments: int ``[T]``.
      settings: tokens of a chunk, and chunks between two kept states.

    Returns:
      ``out [T, ...]``, and the state after the last whole chunk of the last segment.
    """
    size, remat = settings
    tokens = segments.shape[0]
    groups, each = _scans.groups(-(-tokens // size), remat)
    missing = groups * each * size - tokens
    first = beginnings(segments, jnp.int32(0), tokens)
    index = jnp.arange(tokens, dtype=jnp.int32)
    begin = index - (index - first) % size
    # What fills the last window is of no chunk that begins in it.
    begin = jnp.pad(begin, (0, missing), constant_values=-1)
    first = jnp.pad(first, (0, missing), constant_values=-2)
    rows = jax.tree.map(
        lambda leaf: jnp.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1)), mode="edge"), rows
    )

    def ahead(leaf: jax.Array, fill: int | None = None) -> jax.Array:
        """The rows of the next window."""
        last = leaf[-size:] if fill is None else jnp.full_like(leaf[-size:], fill)
        return jnp.concatenate([leaf[size:], last])

    window = (rows, begin, first)
    following = (jax.tree.map(ahead, rows), ahead(begin, -1), ahead(first, -2))

    def body(held: tuple[FastState, jax.Array, jax.Array], x: Any) -> Any:
        state, late, base = held
        both, begin, first = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *x)
        place, index = begin - base, jnp.arange(2 * size)
        opens, fresh = (place == index) & (index < size), begin == first

        def read(state: FastState, which: jax.Array) -> tuple[_Read, FastState]:
            """The last of the chunks that begin there; the state after it, where it is whole."""
            at = jnp.where(which.any(), 2 * size - 1 - jnp.argmax(which[::-1]), 0)
            own = which.any() & (place == at) & (fresh == fresh[at])
            given, members = jax.tree.map(
                lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, size), (both, own)
            )
            # Tokens of others come after its own, which do not see them.
            end, out = apply(rule, state, given, scale)
            return _Read(own, at, out), choose(members.all(), end, state)

        going, after = read(state, opens & ~fresh)
        begun, new = read(start, opens & fresh)
        after = choose((opens & fresh).any(), new, after)
        ended = _ended(rule, start, x[0], base, scale)
        spread = jnp.concatenate([ended, jnp.zeros_like(ended)])
        for own, at, out in (going, begun):
            moved = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(spread), out, at, 0)
            spread = _rows_where(own, moved, spread)
        out = _rows_where(begin[:size] < base, late, spread[:size])
        return (after, spread[size:], base + size), out

    shapes = jax.eval_shape(lambda part: apply(rule, start, part, scale)[1], _head(rows, size))
    late = jnp.zeros(shapes.shape, shapes.dtype)
    given = (window, following)
    (last, *_), out = _scans.scan(body, (start, late, jnp.int32(0)), given, chunk=size, remat=remat)
    return out[:tokens], last


def _head(rows: Chunk, size: int) -> Chunk:
    return jax.tree.map(lambda leaf: leaf[:size], rows)


def _rows_where(condition: jax.Array, leaf: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(condition.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, other)


def _ended(
    rule: Rule, start: FastState, x: tuple[Chunk, jax.Array, jax.Array], base: Any, scale: Any
) -> jax.Array:
    """What tokens read whose segment begins and ends in the window; anything for the others."""
    part, begin, first = x
    own = (begin == first) & (begin >= base)
    if rule.reads == "before":
        return read_before(rule, start, part.q)
    index = base + jnp.arange(begin.shape[0], dtype=jnp.int32)
    position = jnp.where(own, index - begin, 0)
    return by_token(rule, start, part, scale, position)[1]

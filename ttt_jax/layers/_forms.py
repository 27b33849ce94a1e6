"""Executions of the TTT layers that give equal results: token by token, and chunk by chunk."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.layers import _net, _scans
from ttt_jax.layers._net import Norm, Weights


class TTTCache(NamedTuple):
    """What a head has learned, anywhere in a chunk; its size does not depend on the tokens read.

    Attributes:
      weights: those with which the chunk began, ``(W, b)`` or ``(W1, b1, W2, b2)``.
      sums: of the chunk's gradients times their gates, laid out as the weights.
      position: int32 scalar, how many tokens the chunk has.
    """

    weights: Weights
    sums: Weights
    position: jax.Array


class Rows(NamedTuple):
    """Tokens, all of the wide dtype.

    Attributes:
      q: ``[T, d]``.
      k: ``[T, d]``.
      v: ``[T, d]``.
      gate: ``[T]``.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array


class Settings(NamedTuple):
    """What all tokens share.

    Attributes:
      scale: ``[C]``, of the wide dtype.
      norm: gamma and beta, of the wide dtype.
      operand: the dtype of the products' operands.
      remat: chunks between two kept states; 0 keeps everything.
    """

    scale: jax.Array
    norm: Norm
    operand: Any
    remat: int = 0


def fresh(weights: Weights) -> TTTCache:
    """The cache at the beginning of a chunk."""
    return TTTCache(weights, jax.tree.map(jnp.zeros_like, weights), jnp.int32(0))


def choose(condition: jax.Array, tree: Any, other: Any) -> Any:
    """One of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)


def advance(cache: TTTCache, row: Rows, settings: Settings) -> tuple[TTTCache, jax.Array]:
    """One token, leaves ``[d]`` and gate ``[]``, in primal form."""
    norm, operand = settings.norm, settings.operand
    q, k, v, gate = (leaf[None] for leaf in row)
    parts = _net.pieces(cache.weights, k, v, norm, operand)
    sums = jax.tree.map(jnp.add, cache.sums, _net.sums(parts, gate, operand))
    weights = _net.moved(cache.weights, sums, settings.scale[cache.position])
    depth = len(weights) // 2
    out = _net.read(q, norm, _net.linear(weights, operand), depth=depth)[0]
    # At the last position of a chunk the weights that it reads are those of the next one.
    full = cache.position == settings.scale.shape[0] - 1
    grown = TTTCache(cache.weights, sums, cache.position + 1)
    return choose(full, fresh(weights), grown), out


def primal(
    rows: Rows, weights: Weights, settings: Settings, segments: jax.Array | None
) -> tuple[jax.Array, Weights]:
    """Token by token, from the definition; keeps the weights of every token to differentiate."""
    start = fresh(weights)
    begins = jnp.zeros(rows.gate.shape[0], bool) if segments is None else boundaries(segments)

    def step(cache: TTTCache, x: Any) -> Any:
        row, first = x
        return advance(choose(first, start, cache), row, settings)

    cache, out = jax.lax.scan(step, start, (rows, begins))
    return out, cache.weights


def boundaries(segments: jax.Array) -> jax.Array:
    """Bool ``[T]``: where another segment begins; not the first token."""
    changed = segments[1:] != segments[:-1]
    return jnp.concatenate([jnp.zeros(1, bool), changed])


def dual(rows: Rows, weights: Weights, settings: Settings) -> tuple[jax.Array, Weights]:
    """Chunk by chunk in matrix products, all chunks from the first token on."""
    scale, norm, operand, remat = settings
    chunk, length = scale.shape[0], rows.gate.shape[0]
    sees = jnp.tril(scale[:, None] * jnp.ones_like(scale)[None])
    depth = len(weights) // 2

    def step(held: tuple[Weights, jax.Array], x: Rows) -> Any:
        held_weights, first = held
        parts = _net.pieces(held_weights, x.k, x.v, norm, operand)
        before = _net.linear(held_weights, operand)
        within = _net.attended(parts, sees * x.gate[None], operand)
        out = _net.read(x.q, norm, before, within, depth=depth)
        new = _net.moved(held_weights, _net.sums(parts, x.gate, operand), scale[-1])
        # The rest of the tokens, less than a chunk, is read and not learned.
        return (choose(first + chunk <= length, new, held_weights), first + chunk), out

    (last, _), out = _scans.scan(step, (weights, jnp.int32(0)), rows, chunk=chunk, remat=remat)
    return out, last

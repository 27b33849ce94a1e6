"""The derivative of a chunk of TTT-Linear, on arrays: the backward kernels call it on their tiles.

With the names of :mod:`~ttt_jax.kernels.ttt_linear.algebra`, a chunk is

    z = k W + b,  G = the gradient of the inner losses at z,  M = rates * (q k^T + 1),
    y = q W + b - M G,  out = q + LN(y),  W' = W - (step k)^T G,  b' = b - sum step G,

and the gradients dW', db' of the next chunk's weights and dout of the outputs lead to its own:

    dy = LN's own,  dG = -M^T dy - step (k dW' + db'),  dz = H dG,
    dW = dW' + q^T dy + k^T dz,  db = db' + sum dy + sum dz.

Of these dy and the first term of dG do not depend on later chunks, and H, the second derivative of
the inner losses, on none at all: :func:`prepared` makes them for all chunks at once, and
:func:`earlier` is what remains to be done chunk by chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.kernels.ttt_linear import algebra
from ttt_jax.kernels.ttt_linear.algebra import (
    COLUMNS_COLUMNS,
    ROWS_COLUMNS,
    ROWS_ROWS,
    Chunk,
    Inner,
    Shared,
    State,
    mean,
    product,
)


class Prepared(NamedTuple):
    """What a chunk's gradients need of itself alone.

    Attributes:
      inner: its inner losses.
      output: ``[c, d]``, dy.
      pulled: ``[c, d]``, ``-M^T dy``.
    """

    inner: Inner
    output: jax.Array
    pulled: jax.Array


class Gradients(NamedTuple):
    """Of a chunk's tokens, and its share in those of what all chunks have in common.

    Attributes:
      q: ``[c, d]``.
      k: ``[c, d]``.
      v: ``[c, d]``.
      gate: ``[c]``.
      scale: ``[c]``.
      gamma: ``[d]``.
      beta: ``[d]``.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array
    scale: jax.Array
    gamma: jax.Array
    beta: jax.Array


def projected(inner: Inner, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``x [c, d]`` without its parts along one and the normalized rows; mean x, mean(unit x)."""
    center, along = mean(x), mean(inner.unit * x)
    return x - center[:, None] - inner.unit * along[:, None], center, along


def curved(inner: Inner, x: jax.Array, shared: Shared) -> jax.Array:
    """The second derivative of the inner losses with respect to z, applied to ``x [c, d]``.

    With P the projection of :func:`projected` and h, s, r as in
    :class:`~ttt_jax.kernels.ttt_linear.algebra.Inner`, the gradient is r P h; its derivative in the
    direction x is ``r^2 (P (gamma^2 P x) - s P x - unit mean(h P x)) - r mean(unit x) gradient``.
    All means of products with P x follow from those with x, in one round of reductions.
    """
    square = shared.gamma * shared.gamma
    both = inner.pull + square * inner.unit
    rest, center, along = projected(inner, x)
    # mean(gamma^2 P x), and mean((h + gamma^2 unit) P x).
    weighed = mean(square * x) - center * mean(square) - along * inner.mean_square
    mean_both = inner.mean_pull + inner.mean_square
    along_both = inner.along + inner.along_square
    crossed = mean(both * x) - center * mean_both - along * along_both
    rate = inner.rate[:, None]
    bent = (square - inner.along[:, None]) * rest
    bent = bent - weighed[:, None] - inner.unit * crossed[:, None]
    return rate * rate * bent - rate * along[:, None] * inner.gradient


def prepared(
    state: State, chunk: Chunk, dout: jax.Array, shared: Shared
) -> tuple[Prepared, jax.Array]:
    """What a chunk's gradients need of itself, and the normalized rows that were read."""
    (inner,) = algebra.learn(state, [chunk], shared)
    (z,) = algebra.outputs(state, [chunk], [inner.gradient], shared)
    unit, rate = algebra.normalized(z)
    pull = shared.gamma * dout
    output = pull - mean(pull)[:, None] - unit * mean(unit * pull)[:, None]
    output = rate[:, None] * output
    rates = algebra.overlap(chunk.q, chunk.k, shared) * algebra.rates_within(chunk, shared)
    pulled = -product(rates, output, COLUMNS_COLUMNS, shared.operand)
    return Prepared(inner, output, pulled), unit


def of_gradient(ready: Prepared, chunk: Chunk, later: State, shared: Shared) -> jax.Array:
    """dG, from the gradients of the next chunk's weights."""
    moved = product(chunk.k, later.weight, ROWS_COLUMNS, shared.operand) + later.bias
    return ready.pulled - chunk.step[:, None] * moved


def earlier(ready: Prepared, dz: jax.Array, chunk: Chunk, later: State, shared: Shared) -> State:
    """The gradients of a chunk's weights, from those of the next one's; equal rows of the bias."""
    weight = later.weight + product(chunk.q, ready.output, COLUMNS_COLUMNS, shared.operand)
    weight = weight + product(chunk.k, dz, COLUMNS_COLUMNS, shared.operand)
    size = chunk.k.shape[0]
    ones = jnp.ones((size, size), jnp.float32)
    both = product(ones, ready.output + dz, ROWS_COLUMNS, shared.operand)
    return State(weight, later.bias + both)


def scanned(ready: Prepared, chunk: Chunk, later: State, shared: Shared) -> State:
    """One chunk of the scan from the last chunk to the first, where all else was prepared."""
    dz = curved(ready.inner, of_gradient(ready, chunk, later, shared), shared)
    return earlier(ready, dz, chunk, later, shared)


def gradients(
    state: State, chunk: Chunk, dout: jax.Array, later: State, shared: Shared, whole: Any
) -> tuple[Gradients, State]:
    """All gradients of a chunk.

    Args:
      state: the weights with which the chunk began.
      chunk: its tokens.
      dout: ``[c, d]``.
      later: the gradients of the next chunk's weights.
      shared: what all chunks share.
      whole: 1 where the chunk is whole, else 0: its tokens change no weights then.
    """
    operand = shared.operand
    ready, unit = prepared(state, chunk, dout, shared)
    inner = ready.inner
    dgradient = of_gradient(ready, chunk, later, shared)
    dz = curved(inner, dgradient, shared)

    # The target is v - k, and stands in gamma (beta - target).
    doffset = inner.rate[:, None] * projected(inner, dgradient)[0]
    dtarget = -shared.gamma * doffset

    rates = algebra.rates_within(chunk, shared)
    overlap = algebra.overlap(chunk.q, chunk.k, shared)
    dmixed = -product(ready.output, inner.gradient, ROWS_ROWS, operand)
    doverlap = dmixed * rates
    moved = product(inner.gradient, later.weight, ROWS_ROWS, operand)
    # Of the steps: what the next chunk's weights and bias lose by each token.
    lost = jnp.sum(chunk.k * moved, axis=1) + jnp.sum(inner.gradient * later.bias, axis=1)

    dq = dout + product(doverlap, chunk.k, ROWS_COLUMNS, operand)
    dq = dq + product(ready.output, state.weight, ROWS_ROWS, operand)
    dk = product(doverlap, chunk.q, COLUMNS_COLUMNS, operand)
    dk = dk + product(dz, state.weight, ROWS_ROWS, operand)
    dk = dk - chunk.step[:, None] * moved - dtarget

    size = chunk.gate.shape[0]
    reader = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    learned = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    drates = jnp.where(learned <= reader, dmixed * overlap, 0.0)
    dgate = jnp.sum(drates * shared.scale[:, None], axis=0)
    dgate = dgate - whole * algebra.last(shared) * lost
    dscale = jnp.sum(drates * chunk.gate[None, :], axis=1)
    is_last = lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
    dscale = dscale - jnp.where(is_last, whole * jnp.sum(chunk.gate * lost), 0.0)

    beside = shared.beta - (chunk.v - chunk.k) + 2 * shared.gamma * inner.unit
    dgamma = jnp.sum(dout * unit + doffset * beside, axis=0)
    dbeta = jnp.sum(dout - dtarget, axis=0)
    made = Gradients(dq, dk, dtarget, dgate, dscale, dgamma, dbeta)
    return made, earlier(ready, dz, chunk, later, shared)

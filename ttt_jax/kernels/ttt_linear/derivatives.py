"""The derivative of a chunk of TTT-Linear, on arrays: the backward kernels call it on their tiles.

With the names and the layout of :mod:`~ttt_jax.kernels.ttt_linear.algebra`, a chunk is

    z = W k^T + b,  G = the gradient of the inner losses at z,  M = rates * (k q^T + 1),
    y = W q^T + b + G M,  out = q + LN(y)^T,  W' = W - (step G) k,  b' = b - sum step G,

with negative rates, and the gradients dW', db' of the next chunk's weights and dout of the outputs lead to its own:

    dy = LN's own,  dG = dy M^T - step (dW' k^T + db'),  dz = H dG,
    dW = dW' + dy q + dz k,  db = db' + sum dy + sum dz.

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
    means,
    product,
)


class Prepared(NamedTuple):
    """What a chunk's gradients need of itself alone.

    Attributes:
      inner: its inner losses.
      output: ``[d, c]``, dy.
      pulled: ``[d, c]``, ``dy M^T``.
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


def projected(inner: Inner, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x [d, c]`` without its parts along one and the normalized columns; mean(unit x)."""
    center, along = means(x, inner.unit * x)
    return x - center[None] - inner.unit * along[None], along


def curved(inner: Inner, x: jax.Array, shared: Shared) -> jax.Array:
    """The second derivative of the inner losses with respect to z, applied to ``x [d, c]``.

    With P the projection of :func:`projected` and h, s, r as in
    :class:`~ttt_jax.kernels.ttt_linear.algebra.Inner`, the gradient is r P h; its derivative in the
    direction x is ``r^2 (P (gamma^2 P x) - s P x - unit mean(h P x)) - r mean(unit x) gradient``.
    """
    square = shared.gamma * shared.gamma
    rest, along = projected(inner, x)
    weighed, crossed = means(square * rest, inner.pull * rest + square * (inner.unit * rest))
    # The gradient is written out: as a sum of its own it would be brought from another layout.
    bent = (square - inner.along[None]) * rest - inner.pull * along[None]
    bent = bent - inner.unit * (crossed - along * inner.along)[None]
    bent = bent - (weighed - along * inner.mean_pull)[None]
    return (inner.rate * inner.rate)[None] * bent


def prepared(
    state: State, chunk: Chunk, dout: jax.Array, shared: Shared
) -> tuple[Prepared, jax.Array]:
    """What a chunk's gradients need of itself; and of gamma ``[d]``, as it is at the outputs."""
    (inner,) = algebra.learn(state, [chunk], shared)
    ((z, rates),) = algebra.asked(state, [chunk], shared)
    ((unit, rate),) = algebra.normalized(
        algebra.stepped(z, rates, [inner.gradient], shared)
    )
    pull = shared.gamma * dout.T
    center, along = means(pull, unit * pull)
    output = rate[None] * (pull - center[None] - unit * along[None])
    pulled = product(output, rates[0], ROWS_ROWS, shared.operand)
    return Prepared(inner, output, pulled), jnp.sum(dout.T * unit, axis=1)


def lost(chunk: Chunk, later: State, shared: Shared) -> jax.Array:
    """``[d, c]``: how the loss grows with what each token takes from the next chunk's weights."""
    return algebra.outputs(later, chunk.k, shared)


def earlier(ready: Prepared, dz: jax.Array, chunk: Chunk, later: State, shared: Shared) -> State:
    """The gradients of a chunk's weights, from those of the next one's."""
    weight = later.weight + product(ready.output, chunk.q, ROWS_COLUMNS, shared.operand)
    weight = weight + product(dz, chunk.k, ROWS_COLUMNS, shared.operand)
    return State(weight, later.bias + jnp.sum(ready.output + dz, axis=1))


def scanned(ready: Prepared, chunk: Chunk, later: State, shared: Shared) -> State:
    """One chunk of the scan from the last chunk to the first, where all else was prepared."""
    dgradient = ready.pulled - chunk.step[None] * lost(chunk, later, shared)
    return earlier(ready, curved(ready.inner, dgradient, shared), chunk, later, shared)


class Ends(NamedTuple):
    """Of a chunk.

    Attributes:
      before: the weights with which it began.
      later: the gradients of the next chunk's weights.
      whole: 1 where it is whole, else 0: its tokens change no weights then.
    """

    before: State
    later: State
    whole: Any


def gradients(
    ready: Prepared, chunk: Chunk, dout: jax.Array, ends: Ends, shared: Shared
) -> tuple[Gradients, State]:
    """All gradients of a chunk, but of gamma what :func:`prepared` has.

    Args:
      ready: of the chunk.
      chunk: its tokens.
      dout: ``[c, d]``.
      ends: the weights and gradients between which it is.
      shared: what all chunks share.
    """
    operand, inner = shared.operand, ready.inner
    state, later, whole = ends
    gradient, taken = inner.gradient, lost(chunk, later, shared)
    dgradient = ready.pulled - chunk.step[None] * taken
    dz = curved(inner, dgradient, shared)

    # The target is v - k, and stands in gamma (beta - target).
    doffset = inner.rate[None] * projected(inner, dgradient)[0]
    dtarget = -shared.gamma * doffset

    rates = algebra.rates_within(chunk, shared)
    overlap = algebra.overlap(chunk.k, chunk.q, shared)
    dmixed = product(gradient, ready.output, COLUMNS_COLUMNS, operand)
    doverlap = dmixed * rates

    dq = dout + product(doverlap, chunk.k, COLUMNS_COLUMNS, operand)
    dq = dq + product(ready.output, state.weight, COLUMNS_COLUMNS, operand)
    dk = product(doverlap, chunk.q, ROWS_COLUMNS, operand)
    dk = dk + product(dz, state.weight, COLUMNS_COLUMNS, operand)
    dk = dk + product(gradient * -chunk.step[None], later.weight, COLUMNS_COLUMNS, operand)
    dk = dk - dtarget.T

    size = chunk.gate.shape[0]
    learned = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    reader = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    drates = -jnp.where(learned <= reader, dmixed * overlap, 0.0)
    # Of the steps: what the next chunk's weights and bias lose by each token.
    dstep = -whole * jnp.sum(gradient * taken, axis=0)
    dgate = jnp.sum(drates * shared.scale[None], axis=1) + shared.last * dstep
    dscale = jnp.sum(drates * chunk.gate[:, None], axis=0)
    is_last = lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
    dscale = dscale + jnp.where(is_last, jnp.sum(chunk.gate * dstep), 0.0)

    beside = shared.beta - chunk.target + 2 * shared.gamma * inner.unit
    dgamma = jnp.sum(doffset * beside, axis=1)
    dbeta = jnp.sum(dout.T - dtarget, axis=1)
    made = Gradients(dq, dk, dtarget.T, dgate, dscale, dgamma, dbeta)
    return made, earlier(ready, dz, chunk, later, shared)

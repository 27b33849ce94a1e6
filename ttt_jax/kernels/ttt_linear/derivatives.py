"""The derivative of a chunk of TTT-Linear, on arrays: the backward kernels call it on their tiles.

With the names and the layout of :mod:`~ttt_jax.kernels.ttt_linear.algebra`, a chunk is

    z = W k^T + b,  G = the gradient of the inner losses at z,  M = rates * (k q^T + 1),
    y = W q^T + b + G M,  out = q + LN(y)^T,  W' = W - (step G) k,  b' = b - sum step G,

with negative rates, and the gradients dW', db' of the next chunk's weights and dout of the outputs
lead to its own:

    dy = LN's own,  dG = dy M^T - step (dW' k^T + db'),  dz = H dG,
    dW = dW' + dy q + dz k,  db = db' + sum dy + sum dz.

Of these dy and the first term of dG do not depend on later chunks, and H, the second derivative of
the inner losses, on none at all: :func:`read` makes them for all chunks at once, and
:func:`scanned` is what remains to be done chunk by chunk; then :func:`learned` is for all at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.kernels.ttt_linear import algebra
from ttt_jax.kernels.ttt_linear.algebra import (
    COLUMNS_COLUMNS,
    COLUMNS_ROWS,
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
      q: ``[c, d]``, or None, as the other two.
      k: ``[c, d]``.
      v: ``[c, d]``.
      gate: ``[c]``.
      scale: ``[c]``.
      gamma: ``[d]``.
      beta: ``[d]``.
    """

    q: Any
    k: Any
    v: Any
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


def read(state: State, chunk: Chunk, dout: jax.Array, shared: Shared) -> tuple[Prepared, Gradients]:
    """What a chunk's gradients need of itself; and their share by way of its outputs.

    That share is all of the gradient of q, and none of v's, which is None.
    """
    operand = shared.operand
    inner = algebra.learn(state, chunk, shared)
    gradient = inner.gradient
    z, rates = algebra.asked(state, chunk, gradient, shared)
    unit, rate = algebra.normalized(z)
    wide = dout.T
    pull = shared.gamma * wide
    center, along = means(pull, unit * pull)
    output = rate[None] * (pull - center[None] - unit * along[None])
    pulled = product(output, rates, ROWS_ROWS, operand)

    # Features as rows here, too: these products then have the sizes of the scan's.
    dmixed = product(gradient, output, COLUMNS_COLUMNS, operand)
    doverlap = dmixed * algebra.rates_within(chunk, shared)
    dq = product(chunk.k, doverlap, COLUMNS_COLUMNS, operand)
    dq = dq + product(state.weight, output, COLUMNS_COLUMNS, operand)
    dk = product(chunk.q, doverlap, COLUMNS_ROWS, operand)
    drates = -algebra.seen(dmixed * algebra.overlap(chunk.k, chunk.q, shared))
    made = Gradients(
        q=dout + dq.T,
        k=dk.T,
        v=None,
        gate=jnp.sum(drates * shared.scale[None], axis=1),
        scale=jnp.sum(drates * chunk.gate[:, None], axis=0),
        gamma=jnp.sum(wide * unit, axis=1),
        beta=jnp.sum(wide, axis=1),
    )
    return Prepared(inner, output, pulled), made


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


def learned(
    ready: Prepared, chunk: Chunk, ends: Ends, shared: Shared
) -> tuple[Gradients, jax.Array]:
    """The share of a chunk's gradients by way of its inner losses, and dz.

    Of q there is none. All gradients are the sum of this and of what :func:`read` has.
    """
    operand, inner = shared.operand, ready.inner
    gradient, taken = inner.gradient, lost(chunk, ends.later, shared)
    dgradient = ready.pulled - chunk.step[None] * taken
    dz = curved(inner, dgradient, shared)
    # The target is v - k, and stands in gamma (beta - target).
    doffset = inner.rate[None] * projected(inner, dgradient)[0]
    dtarget = -shared.gamma * doffset

    steps = gradient * -chunk.step[None]
    dk = product(ends.before.weight, dz, COLUMNS_COLUMNS, operand)
    dk = dk + product(ends.later.weight, steps, COLUMNS_COLUMNS, operand) - dtarget
    # Of the steps: what the next chunk's weights and bias lose by each token.
    dstep = -ends.whole * jnp.sum(gradient * taken, axis=0)
    size = chunk.gate.shape[0]
    is_last = lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
    beside = shared.beta - chunk.target + 2 * shared.gamma * inner.unit
    made = Gradients(
        q=None,
        k=dk.T,
        v=dtarget.T,
        gate=shared.last * dstep,
        scale=jnp.where(is_last, jnp.sum(chunk.gate * dstep), 0.0),
        gamma=jnp.sum(doffset * beside, axis=1),
        beta=-jnp.sum(dtarget, axis=1),
    )
    return made, dz


def total(read: Gradients, learned: Gradients) -> Gradients:
    """All gradients: of q by way of the outputs alone, of v by way of the inner losses."""
    shares = zip(read, learned, strict=True)
    return Gradients(*[a if b is None else b if a is None else a + b for a, b in shares])

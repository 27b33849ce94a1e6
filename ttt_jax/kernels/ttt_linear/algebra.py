"""The algebra of a few chunks of TTT-Linear, on arrays: the kernels call it on their tiles.

All arrays are float32 but the operands of products. A chunk has c tokens of width d. The weights
and the bias have no mean over the output axis, which the gradients of the inner losses never
change; so the outputs z have a mean near zero, and ``mean(z^2) - mean(z)^2`` does not cancel. The
mean must be subtracted all the same: rounding gives z a small one, the gradients would no longer
sum to zero, and it would grow from chunk to chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-6
"""Of the LayerNorm, as published."""

# Axes over which a product of two matrices sums.
ROWS_COLUMNS, ROWS_ROWS, COLUMNS_COLUMNS = (1, 0), (1, 1), (0, 0)


class State(NamedTuple):
    """What a head has learned.

    Attributes:
      weight: ``[d, d]``.
      bias: ``[c, d]``, equal rows: its update then is a product, as that of the weight.
    """

    weight: jax.Array
    bias: jax.Array


class Chunk(NamedTuple):
    """Tokens.

    Attributes:
      q: ``[c, d]``; None where nothing is read.
      k: ``[c, d]``.
      v: ``[c, d]``.
      gate: ``[c]``, the step sizes of the inner losses.
      step: ``[c]``, those with which they change the next chunk's weights: the gates times the
        last position's factor, or 0 in a chunk that is not whole.
    """

    q: Any
    k: jax.Array
    v: jax.Array
    gate: jax.Array
    step: jax.Array


class Shared(NamedTuple):
    """What all chunks share.

    Attributes:
      scale: ``[c]``, the factor of the step size by position of the token that reads.
      gamma: ``[1, d]``.
      beta: ``[1, d]``.
      operand: the dtype of the products' operands.
    """

    scale: jax.Array
    gamma: jax.Array
    beta: jax.Array
    operand: Any


class Inner(NamedTuple):
    """The inner losses of a chunk, ``0.5 sum((LN(z) - target)^2)`` a row, at its outputs z.

    With the normalized rows ``x = (z - mean z) / deviation`` and ``h = gamma^2 x +
    gamma (beta - target)``, the gradient is ``(h - mean h - x mean(x h)) / deviation``.

    Attributes:
      unit: ``[c, d]``, x.
      pull: ``[c, d]``, h.
      rate: ``[c]``, one over the deviation.
      along: ``[c]``, mean(x h).
      mean_pull: ``[c]``, mean h.
      mean_square: ``[c]``, mean(gamma^2 x).
      along_square: ``[c]``, mean(gamma^2 x^2).
    """

    unit: jax.Array
    pull: jax.Array
    rate: jax.Array
    along: jax.Array
    mean_pull: jax.Array
    mean_square: jax.Array
    along_square: jax.Array

    @property
    def gradient(self) -> jax.Array:
        """``[c, d]``, with respect to z."""
        rest = self.pull - self.mean_pull[:, None] - self.unit * self.along[:, None]
        return self.rate[:, None] * rest


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int], operand: Any) -> jax.Array:
    """The sum over one axis of each, float32, of operands rounded to ``operand``.

    Every product of the kernels is made here: another backend of Pallas has other instructions.
    """
    exact = operand == jnp.float32
    return lax.dot_general(
        a.astype(operand),
        b.astype(operand),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def mean(x: jax.Array) -> jax.Array:
    """Of each row: ``[c, d]`` to ``[c]``."""
    return jnp.sum(x, axis=1) * (1 / x.shape[1])


def inner(z: jax.Array, target: jax.Array, shared: Shared) -> Inner:
    """The inner losses at ``z [c, d]``.

    Every mean is over z, its square or inputs alone, none over the normalized rows: one round of
    reductions, where the plain formula waits for three.
    """
    square = shared.gamma * shared.gamma
    offset = shared.gamma * (shared.beta - target)
    weighed = square * z
    center, power = mean(z), mean(z * z)
    first, second = mean(weighed), mean(weighed * z)
    crossed, shift, whole = mean(offset * z), mean(offset), mean(square)
    rate = lax.rsqrt(power - center * center + EPSILON)
    mean_square = rate * (first - center * whole)
    along_square = rate * rate * (second - 2 * center * first + center * center * whole)
    unit = (z - center[:, None]) * rate[:, None]
    return Inner(
        unit=unit,
        pull=square * unit + offset,
        rate=rate,
        along=along_square + rate * (crossed - center * shift),
        mean_pull=mean_square + shift,
        mean_square=mean_square,
        along_square=along_square,
    )


def normalized(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The normalized rows ``[c, d]``, and one over the deviations ``[c]``."""
    center = mean(z)
    rate = lax.rsqrt(mean(z * z) - center * center + EPSILON)
    return (z - center[:, None]) * rate[:, None], rate


def last(shared: Shared) -> jax.Array:
    """The factor of the last position, a scalar."""
    size = shared.scale.shape[0]
    is_last = lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
    return jnp.sum(jnp.where(is_last, shared.scale, 0.0))


def rates_within(chunk: Chunk, shared: Shared) -> jax.Array:
    """``[c, c]``: step sizes of token s (columns) for token t, 0 where t does not see it."""
    size = chunk.gate.shape[0]
    reader = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    learned = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return jnp.where(learned <= reader, shared.scale[:, None] * chunk.gate[None, :], 0.0)


def overlap(a: jax.Array, b: jax.Array, shared: Shared) -> jax.Array:
    """``a b^T + 1``: the one is of the bias."""
    return product(a, b, ROWS_ROWS, shared.operand) + 1.0


def learn(state: State, chunks: Sequence[Chunk], shared: Shared) -> list[Inner]:
    """The inner losses of chunks that follow each other, the first of which begins at ``state``.

    A later chunk begins at weights that are not made: it sees the earlier ones as tokens do within
    a chunk.
    """
    made: list[Inner] = []
    gradients: list[jax.Array] = []
    before = [
        product(chunk.k, state.weight, ROWS_COLUMNS, shared.operand) + state.bias
        for chunk in chunks
    ]
    for chunk, z in zip(chunks, before, strict=True):
        z = z - _earlier(chunk.k, chunks[: len(gradients)], gradients, shared)
        made.append(inner(z, chunk.v - chunk.k, shared))
        gradients.append(made[-1].gradient)
    return made


def _earlier(
    x: jax.Array, chunks: Sequence[Chunk], gradients: Sequence[jax.Array], shared: Shared
) -> Any:
    """What whole chunks before this one take from the outputs of ``x``."""
    taken: Any = 0.0
    for chunk, gradient in zip(chunks, gradients, strict=True):
        rates = overlap(x, chunk.k, shared) * chunk.step[None, :]
        taken = taken + product(rates, gradient, ROWS_COLUMNS, shared.operand)
    return taken


def outputs(
    state: State, chunks: Sequence[Chunk], gradients: Sequence[jax.Array], shared: Shared
) -> list[jax.Array]:
    """What the tokens of each chunk read, before the LayerNorm, ``[c, d]``."""
    read = []
    for index, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True)):
        rates = overlap(chunk.q, chunk.k, shared) * rates_within(chunk, shared)
        z = product(chunk.q, state.weight, ROWS_COLUMNS, shared.operand) + state.bias
        z = z - product(rates, gradient, ROWS_COLUMNS, shared.operand)
        read.append(z - _earlier(chunk.q, chunks[:index], gradients[:index], shared))
    return read


def read(
    state: State, chunks: Sequence[Chunk], gradients: Sequence[jax.Array], shared: Shared
) -> list[jax.Array]:
    """The outputs of the layer, ``q + LN(z)``, of each chunk."""
    made = outputs(state, chunks, gradients, shared)
    return [
        chunk.q + shared.gamma * normalized(z)[0] + shared.beta
        for chunk, z in zip(chunks, made, strict=True)
    ]


def moved(
    state: State, chunks: Sequence[Chunk], gradients: Sequence[jax.Array], shared: Shared
) -> State:
    """The weights after the chunks."""
    weight, bias = state
    for chunk, gradient in zip(chunks, gradients, strict=True):
        stepped = chunk.k * chunk.step[:, None]
        weight = weight - product(stepped, gradient, COLUMNS_COLUMNS, shared.operand)
        size = chunk.step.shape[0]
        steps = jnp.broadcast_to(chunk.step[None, :], (size, size))
        bias = bias - product(steps, gradient, ROWS_COLUMNS, shared.operand)
    return State(weight, bias)

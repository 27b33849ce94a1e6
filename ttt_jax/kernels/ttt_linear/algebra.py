"""The algebra of a chunk of TTT-Linear, on arrays: the kernels call it on their tiles.

All arrays are float32 but the operands of products. A chunk has c tokens of width d. Outputs and
gradients have features as rows and tokens as columns, ``[d, c]``, and the weights the features of
the output as rows: a product of the scan then has its left operand in registers, where the one
before left it, and tokens as the right one, which wait in shared memory. What is left of the chain
from chunk to chunk is two rounds of sums over the features.

The weights and the bias have no mean over the features of the output, which the gradients of the
inner losses never change; so the outputs z have a mean near zero, and ``mean(z^2) - mean(z)^2``
does not cancel. The mean must be subtracted all the same: rounding gives z a small one, the
gradients would no longer sum to zero, and it would grow from chunk to chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-6
"""Of the LayerNorm, as published."""

# Axes over which a product of two matrices sums.
ROWS_COLUMNS, ROWS_ROWS = (1, 0), (1, 1)
COLUMNS_COLUMNS, COLUMNS_ROWS = (0, 0), (0, 1)


class State(NamedTuple):
    """What a head has learned.

    Attributes:
      weight: ``[d, d]``, a row for each feature of the output.
      bias: ``[d]``.
    """

    weight: jax.Array
    bias: jax.Array


class Chunk(NamedTuple):
    """Tokens, as they are stored: a row each.

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

    @property
    def target(self) -> jax.Array:
        """``[d, c]``, what the inner losses are to come to."""
        return (self.v - self.k).T


class Shared(NamedTuple):
    """What all chunks share.

    Attributes:
      scale: ``[c]``, the factor of the step size by position of the token that reads.
      gamma: ``[d, 1]``; ``[d]`` outside the kernels.
      beta: as gamma.
      last: the factor of the last position, a scalar.
      operand: the dtype of the products' operands.
    """

    scale: jax.Array
    gamma: jax.Array
    beta: jax.Array
    last: jax.Array
    operand: Any


class Inner(NamedTuple):
    """The inner losses of a chunk, ``0.5 sum((LN(z) - target)^2)`` a token, at its outputs z.

    With the normalized columns ``x = (z - mean z) / deviation`` and ``h = gamma^2 x +
    gamma (beta - target)``, the gradient is ``(h - mean h - x mean(x h)) / deviation``.

    Attributes:
      unit: ``[d, c]``, x.
      pull: ``[d, c]``, h.
      rate: ``[c]``, one over the deviation.
      mean_pull: ``[c]``, mean h.
      along: ``[c]``, mean(x h).
    """

    unit: jax.Array
    pull: jax.Array
    rate: jax.Array
    mean_pull: jax.Array
    along: jax.Array

    @property
    def gradient(self) -> jax.Array:
        """``[d, c]``, with respect to z."""
        return self.rate[None] * (self.pull - self.mean_pull[None] - self.unit * self.along[None])


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


def means(*arrays: jax.Array) -> list[jax.Array]:
    """Over the features of each ``[d, c]``, so many that they are a power of two: each ``[c]``.

    One reduction for all: the warps wait for each other in every one.
    """
    parts = list(arrays)
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [jnp.stack(pair, axis=-1) for pair in zip(parts[:half], parts[half:], strict=True)]
    made = [jnp.sum(parts[0], axis=0) * (1 / arrays[0].shape[0])]
    while made[0].ndim > 1:
        halves = [jnp.unstack(part, axis=-1) for part in made]
        made = [first for first, _ in halves] + [second for _, second in halves]
    return made


class Normalized(NamedTuple):
    """Columns without mean, of mean square one.

    Attributes:
      unit: ``[d, c]``.
      rate: ``[c]``, one over the deviation.
    """

    unit: jax.Array
    rate: jax.Array


def normalized(z: jax.Array) -> Normalized:
    """Of ``z [d, c]``."""
    center, power = means(z, z * z)
    rate = lax.rsqrt(power - center * center + EPSILON)
    return Normalized((z - center[None]) * rate[None], rate)


def inner(z: jax.Array, target: jax.Array, shared: Shared) -> Inner:
    """The inner losses at ``z [d, c]``."""
    unit, rate = normalized(z)
    pull = shared.gamma * (shared.gamma * unit + (shared.beta - target))
    return Inner(unit, pull, rate, *means(pull, unit * pull))


def seen(x: jax.Array) -> jax.Array:
    """``[c, c]`` of tokens s (rows) and t, 0 where t does not see s."""
    learned = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    reader = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(learned <= reader, x, 0.0)


def rates_within(chunk: Chunk, shared: Shared) -> jax.Array:
    """``[c, c]``: minus step sizes of token s (rows) for token t, 0 where t does not see it."""
    return -seen(chunk.gate[:, None] * shared.scale[None])


def overlap(k: jax.Array, x: jax.Array, shared: Shared) -> jax.Array:
    """``k x^T + 1``: the one is of the bias."""
    return product(k, x, ROWS_ROWS, shared.operand) + 1.0


def outputs(state: State, x: jax.Array, shared: Shared) -> jax.Array:
    """``[d, c]``, of tokens ``x [c, d]`` before the LayerNorm."""
    return product(state.weight, x, ROWS_ROWS, shared.operand) + state.bias[:, None]


def learn(state: State, chunk: Chunk, shared: Shared) -> Inner:
    """The inner losses of a chunk that begins at ``state``."""
    return inner(outputs(state, chunk.k, shared), chunk.target, shared)


def asked(
    state: State, chunk: Chunk, gradient: jax.Array, shared: Shared
) -> tuple[jax.Array, jax.Array]:
    """What the queries of a chunk read, ``[d, c]``, before the LayerNorm.

    And how much of the chunk's gradients they see, ``[c, c]``: the rates, which are negative.
    """
    rates = overlap(chunk.k, chunk.q, shared) * rates_within(chunk, shared)
    z = outputs(state, chunk.q, shared)
    return z + product(gradient, rates, ROWS_COLUMNS, shared.operand), rates


def read(state: State, chunk: Chunk, gradient: jax.Array, shared: Shared) -> jax.Array:
    """The outputs of the layer, ``q + LN(z)``, of a chunk: ``[c, d]``."""
    z, _ = asked(state, chunk, gradient, shared)
    return chunk.q + (shared.gamma * normalized(z).unit + shared.beta).T


def centered(given: State) -> State:
    """Of weights with a column for each feature of the output, ours: without means."""
    weight, bias = given.weight.T, given.bias
    share = 1 / bias.shape[0]
    means_of_inputs = jnp.sum(weight, axis=0) * share
    return State(weight - means_of_inputs[None], bias - jnp.sum(bias) * share)


def moved(state: State, chunk: Chunk, gradient: jax.Array, shared: Shared) -> State:
    """The weights after a chunk. Steps go down: what is added is negative."""
    steps = gradient * -chunk.step[None]
    weight = state.weight + product(steps, chunk.k, ROWS_COLUMNS, shared.operand)
    return State(weight, state.bias + jnp.sum(steps, axis=1))

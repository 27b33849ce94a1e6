"""The algebra of a chunk of TTT-MLP, on arrays: the kernels call it on their tiles.

A chunk has c tokens of width d, a row each; the network is ``gelu(x W1 + b1) W2 + b2`` with h
hidden features. All arrays are float32 but the operands of products. :func:`chunk` goes forward;
:mod:`ttt_jax.kernels.ttt_mlp.gradient` has its derivative.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.kernels.ttt_linear.algebra import (
    COLUMNS_COLUMNS,
    EPSILON,
    ROWS_COLUMNS,
    ROWS_ROWS,
)

# Of gelu in its tanh form.
_SLOPE, _CUBE = 0.7978845608028654, 0.044715


class State(NamedTuple):
    """What a head has learned.

    Attributes:
      first: W1, transposed ``[h, d]``: its gradient then has rows enough for all warps.
      first_bias: ``[h]``.
      second: W2 ``[h, d]``.
      second_bias: ``[d]``.
    """

    first: jax.Array
    first_bias: jax.Array
    second: jax.Array
    second_bias: jax.Array


class Tokens(NamedTuple):
    """Of a chunk, or of a sequence.

    Attributes:
      q: ``[c, d]``.
      k: ``[c, d]``.
      v: ``[c, d]``.
      gate: ``[c]``, the step sizes of the inner losses.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array


class Shared(NamedTuple):
    """What all chunks share.

    Attributes:
      scale: ``[c]``, the factor of the step size by position of the token that reads.
      gamma: ``[d]``.
      beta: ``[d]``.
    """

    scale: jax.Array
    gamma: jax.Array
    beta: jax.Array


class Gelu(NamedTuple):
    """gelu in its tanh form at a point, its derivative, and the derivative of that."""

    value: jax.Array
    slope: jax.Array
    bend: jax.Array


def gelu(x: jax.Array) -> Gelu:
    """Each as the shape of ``x``; what is not used is not computed."""
    square = x * x
    inner = _SLOPE * (1.0 + 3.0 * _CUBE * square)
    bent = jnp.tanh(_SLOPE * x * (1.0 + _CUBE * square))
    half, steep = 0.5 * (1.0 + bent), 1.0 - bent * bent
    slope = half + 0.5 * x * steep * inner
    curved = 6.0 * _SLOPE * _CUBE * x - 2.0 * bent * inner * inner
    return Gelu(x * half, slope, steep * (inner + 0.5 * x * curved))


def normalized(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows ``[c, d]`` without mean, of mean square one; and one over their deviations, ``[c]``."""
    count = 1.0 / z.shape[1]
    central = z - (z.sum(1) * count)[:, None]
    rate = lax.rsqrt((central * central).sum(1) * count + EPSILON)
    return central * rate[:, None], rate


def norm_gradient(z: jax.Array, target: jax.Array, shared: Shared) -> jax.Array:
    """The gradient of ``0.5 sum((LN(z) - target)^2)`` with respect to ``z [c, d]``."""
    unit, rate = normalized(z)
    gamma, beta = shared.gamma[None], shared.beta[None]
    pull = gamma * (gamma * unit + beta - target)
    count = 1.0 / z.shape[1]
    along = ((pull * unit).sum(1) * count)[:, None]
    return rate[:, None] * (pull - (pull.sum(1) * count)[:, None] - unit * along)


def seen(x: jax.Array) -> jax.Array:
    """``[c, c]`` of readers (rows) and learned tokens, 0 where the reader does not see it."""
    reader = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    learned = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(learned <= reader, x, 0.0)


def last_of(scale: jax.Array) -> jax.Array:
    """The factor of the position that every later chunk reads from."""
    size = scale.shape[0]
    is_last = lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
    return jnp.sum(jnp.where(is_last, scale, 0.0))


Product: TypeAlias = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]
"""One of the products, with their operands' dtype."""


class Parts(NamedTuple):
    """What a chunk's outputs and its next state are made of.

    Attributes:
      key: gelu at ``k W1 + b1``, each ``[c, h]``.
      z: ``[c, d]``, the network's outputs for the keys.
      outer: ``[c, d]``, the gradient of the inner losses with respect to ``z``.
      inner: ``[c, h]``, the gradient with respect to ``k W1 + b1``.
      bent: ``[c, h]``, the derivative of ``inner`` by ``k W1 + b1`` at a fixed ``outer``.
      rates: ``[c, c]``, the step size of each token for each reader.
      weights: ``[c, c]``, how alike queries and keys are, and one more, as the biases learn, too.
      asked: gelu at what the readers ask of the first layer, each ``[c, h]``.
      second_weights: as ``weights``, of the hidden features of the readers and of the keys.
      answer: ``[c, d]``, of the network that each reader asks.
      steps: ``[c, 1]``, the step sizes by which the state changes.
    """

    key: Gelu
    z: jax.Array
    outer: jax.Array
    inner: jax.Array
    bent: jax.Array
    rates: jax.Array
    weights: jax.Array
    asked: Gelu
    second_weights: jax.Array
    answer: jax.Array
    steps: jax.Array


def parts_of(
    state: State, tokens: Tokens, shared: Shared, whole: jax.Array | float, dot: Product
) -> Parts:
    """Of a chunk; the arguments are those of :func:`chunk`."""
    q, k, v, gate = tokens
    key = gelu(dot(k, state.first, ROWS_ROWS) + state.first_bias[None])
    z = dot(key.value, state.second, ROWS_COLUMNS) + state.second_bias[None]
    outer = norm_gradient(z, v - k, shared)
    pulled = dot(outer, state.second, ROWS_ROWS)
    inner, bent = pulled * key.slope, pulled * key.bend
    rates = seen(shared.scale[:, None] * gate[None])
    weights = dot(q, k, ROWS_ROWS) + 1.0
    read = dot(q, state.first, ROWS_ROWS) + state.first_bias[None]
    asked = gelu(read - dot(weights * rates, inner, ROWS_COLUMNS))
    second_weights = dot(asked.value, key.value, ROWS_ROWS) + 1.0
    answer = dot(asked.value, state.second, ROWS_COLUMNS) + state.second_bias[None]
    answer -= dot(second_weights * rates, outer, ROWS_COLUMNS)
    steps = ((last_of(shared.scale) * whole) * gate)[:, None]
    return Parts(key, z, outer, inner, bent, rates, weights, asked, second_weights, answer, steps)


def chunk(
    state: State, tokens: Tokens, shared: Shared, whole: jax.Array | float, dot: Product
) -> tuple[State, jax.Array]:
    """The state after a chunk and its outputs ``[c, d]``, in dual form.

    Args:
      state: before the chunk.
      tokens: in float32.
      shared: of all chunks.
      whole: 1 where the chunk changes the state, else 0.
      dot: one of the products, with their operands' dtype.
    """
    parts = parts_of(state, tokens, shared, whole, dot)
    unit, _ = normalized(parts.answer)
    out = tokens.q + shared.gamma[None] * unit + shared.beta[None]
    # Added, for which the matrix units have an instruction.
    inner, outer = -parts.steps * parts.inner, -parts.steps * parts.outer
    new = State(
        state.first + dot(inner, tokens.k, COLUMNS_COLUMNS),
        state.first_bias + inner.sum(0),
        state.second + dot(parts.key.value, outer, COLUMNS_COLUMNS),
        state.second_bias + outer.sum(0),
    )
    return new, out

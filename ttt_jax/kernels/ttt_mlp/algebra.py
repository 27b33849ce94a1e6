"""The algebra of a chunk of TTT-MLP, on arrays: the kernels call it on their tiles.

A chunk has c tokens of width d, a row each; the network is ``gelu(x W1 + b1) W2 + b2`` with h
hidden features. All arrays are float32 but the operands of products. :func:`chunk` is one function
of the state, the tokens and what all chunks share; the backward kernel is its derivative.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.kernels.ttt_linear.algebra import (
    COLUMNS_COLUMNS,
    EPSILON,
    ROWS_COLUMNS,
    ROWS_ROWS,
    product,
)

# Of gelu in its tanh form.
_SLOPE, _CUBE = 0.7978845608028654, 0.044715


class State(NamedTuple):
    """What a head has learned.

    Attributes:
      first: W1 ``[d, h]``.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def differentiable(a: jax.Array, b: jax.Array, axes: tuple[int, int], operand: Any) -> jax.Array:
    """The product of TTT-Linear's kernels, whose derivative has products of rounded operands, too.

    Of its own it would have products of two dtypes, which tensor cores do not make.
    """
    return product(a, b, axes, operand)


def _forward(a: jax.Array, b: jax.Array, axes: tuple[int, int], operand: Any) -> Any:
    a, b = a.astype(operand), b.astype(operand)
    return product(a, b, axes, operand), (a, b)


def _backward(axes: tuple[int, int], operand: Any, saved: Any, pull: jax.Array) -> Any:
    a, b = saved
    other_a, other_b = 1 - axes[0], 1 - axes[1]
    made = functools.partial(product, operand=operand)
    # The axis that is summed over comes second in a row's factor and first in a column's.
    rows, columns = axes[0] == 1, axes[1] == 0
    of_a = made(pull, b, (1, other_b)) if rows else made(b, pull, (other_b, 1))
    of_b = made(a, pull, (other_a, 0)) if columns else made(pull, a, (0, other_a))
    return of_a, of_b


differentiable.defvjp(_forward, _backward)


def gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In its tanh form, and its derivative."""
    square = x * x
    bent = jnp.tanh(_SLOPE * x * (1.0 + _CUBE * square))
    half = 0.5 * (1.0 + bent)
    slope = half + 0.5 * x * (1.0 - bent * bent) * _SLOPE * (1.0 + 3.0 * _CUBE * square)
    return x * half, slope


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


def _seen(x: jax.Array) -> jax.Array:
    """``[c, c]`` of readers (rows) and learned tokens, 0 where the reader does not see it."""
    reader = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    learned = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(learned <= reader, x, 0.0)


Product: TypeAlias = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]


def chunk(
    state: State, tokens: Tokens, shared: Shared, whole: Any, dot: Product
) -> tuple[State, jax.Array]:
    """The state after a chunk and its outputs ``[c, d]``, in dual form.

    Args:
      state: before the chunk.
      tokens: in float32.
      shared: of all chunks.
      whole: 1 where the chunk changes the state, else 0.
      dot: one of the products, with their operands' dtype.
    """
    q, k, v, gate = tokens
    hidden, slope = gelu(dot(k, state.first, ROWS_COLUMNS) + state.first_bias[None])
    z = dot(hidden, state.second, ROWS_COLUMNS) + state.second_bias[None]
    outer = norm_gradient(z, v - k, shared)
    inner = dot(outer, state.second, ROWS_ROWS) * slope
    rates = _seen(shared.scale[:, None] * gate[None])

    # One more than the products, as the biases learn as well.
    read = dot(q, state.first, ROWS_COLUMNS) + state.first_bias[None]
    read -= dot((dot(q, k, ROWS_ROWS) + 1.0) * rates, inner, ROWS_COLUMNS)
    asked, _ = gelu(read)
    answer = dot(asked, state.second, ROWS_COLUMNS) + state.second_bias[None]
    answer -= dot((dot(asked, hidden, ROWS_ROWS) + 1.0) * rates, outer, ROWS_COLUMNS)
    out = q + shared.gamma[None] * normalized(answer)[0] + shared.beta[None]

    size = shared.scale.shape[0]
    is_last = lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
    steps = (jnp.sum(jnp.where(is_last, shared.scale, 0.0)) * whole) * gate
    inner, outer = steps[:, None] * inner, steps[:, None] * outer
    new = State(
        state.first - dot(k, inner, COLUMNS_COLUMNS),
        state.first_bias - inner.sum(0),
        state.second - dot(hidden, outer, COLUMNS_COLUMNS),
        state.second_bias - outer.sum(0),
    )
    return new, out

"""The derivative of a chunk of TTT-MLP, on arrays, from the gradients of what comes after it.

By hand: of what :func:`jax.vjp` makes of a chunk, sums over broadcast rows would put whole rows
into the registers of every thread. Products of rounded operands, as forward.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.kernels.ttt_linear.algebra import COLUMNS_COLUMNS, ROWS_COLUMNS, ROWS_ROWS
from ttt_jax.kernels.ttt_mlp.algebra import (
    Parts,
    Product,
    Shared,
    State,
    Tokens,
    last_of,
    normalized,
    parts_of,
    seen,
)


class Gradients(NamedTuple):
    """Of a chunk.

    Attributes:
      state: of the state before it.
      tokens: as the tokens.
      scale: ``[c]``.
      gamma: ``[c, d]``, of each row.
      beta: ``[c, d]``, of each row.
    """

    state: State
    tokens: Tokens
    scale: jax.Array
    gamma: jax.Array
    beta: jax.Array


def _mean(x: jax.Array) -> jax.Array:
    """Of each row, ``[c, 1]``."""
    return (x.sum(1) * (1.0 / x.shape[1]))[:, None]


def of_normalized(unit: jax.Array, rate: jax.Array, pull: jax.Array) -> jax.Array:
    """From the gradient of ``unit`` to that of what was normalized, ``[c, d]``."""
    return rate[:, None] * (pull - _mean(pull) - unit * _mean(pull * unit))


def of_norm_gradient(
    z: jax.Array, target: jax.Array, shared: Shared, pull: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The derivative of :func:`~ttt_jax.kernels.ttt_mlp.algebra.norm_gradient`.

    Args:
      z: ``[c, d]``.
      target: ``[c, d]``.
      shared: gamma and beta.
      pull: the gradient of its result.

    Returns:
      Of z and target, and of gamma and beta by row; each ``[c, d]``.
    """
    gamma, beta = shared.gamma[None], shared.beta[None]
    unit, rate = normalized(z)
    error = gamma * unit + beta - target
    raised = gamma * error
    along = _mean(raised * unit)
    within = raised - _mean(raised) - unit * along
    of_within = rate[:, None] * pull
    crossed = _mean(of_within * unit)
    of_raised = of_within - _mean(of_within) - unit * crossed
    of_error = gamma * of_raised
    of_unit = gamma * of_error - along * of_within - crossed * raised
    square = (rate * rate)[:, None]
    of_z = of_normalized(unit, rate, of_unit) - unit * (_mean(pull * within) * square)
    return of_z, -of_error, of_raised * error + of_error * unit, of_error


def chunk_gradient(
    state: State,
    tokens: Tokens,
    shared: Shared,
    whole: jax.Array | float,
    cotangents: tuple[State, jax.Array],
    dot: Product,
) -> Gradients:
    """Of :func:`ttt_jax.kernels.ttt_mlp.algebra.chunk`.

    Args:
      state: before the chunk.
      tokens: in float32.
      shared: of all chunks.
      whole: 1 where the chunk changes the state, else 0.
      cotangents: of the state after the chunk, and of the outputs ``[c, d]``.
      dot: one of the products, with their operands' dtype.
    """
    later, dout = cotangents
    q, k, v, _ = tokens
    parts = parts_of(state, tokens, shared, whole, dot)
    key, asked, steps = parts.key, parts.asked, parts.steps

    # Of the outputs, to what the second layer answers, and on to what was asked of the first one.
    unit, rate = normalized(parts.answer)
    answer = of_normalized(unit, rate, dout * shared.gamma[None])
    of_second = -dot(answer, parts.outer, ROWS_ROWS)
    products = of_second * parts.rates
    of_asked = dot(answer, state.second, ROWS_ROWS) + dot(products, key.value, ROWS_COLUMNS)
    read = of_asked * asked.slope
    of_weights = -dot(read, parts.inner, ROWS_ROWS)

    # The next state is this one less steps times inner, and steps times outer.
    learned = -(dot(k, later.first, ROWS_ROWS) + later.first_bias[None])
    taught = -(dot(key.value, later.second, ROWS_COLUMNS) + later.second_bias[None])
    of_steps = (learned * parts.inner).sum(1) + (taught * parts.outer).sum(1)
    of_inner = steps * learned - dot(parts.weights * parts.rates, read, COLUMNS_COLUMNS)
    of_pulled = of_inner * key.slope
    of_outer = steps * taught + dot(of_pulled, state.second, ROWS_COLUMNS)
    of_outer -= dot(parts.second_weights * parts.rates, answer, COLUMNS_COLUMNS)

    # By the gradient of the inner losses, to the network that it is one of.
    z, target, of_gamma, of_beta = of_norm_gradient(parts.z, v - k, shared, of_outer)
    hidden = dot(z, state.second, ROWS_ROWS) + dot(products, asked.value, COLUMNS_COLUMNS)
    hidden -= dot(steps * parts.outer, later.second, ROWS_ROWS)
    hidden = hidden * key.slope + of_inner * parts.bent

    of_products = of_weights * parts.rates
    of_q = dot(of_products, k, ROWS_COLUMNS) + dot(read, state.first, ROWS_COLUMNS)
    of_k = dot(of_products, q, COLUMNS_COLUMNS) + dot(hidden, state.first, ROWS_COLUMNS)
    of_k -= dot(steps * parts.inner, later.first, ROWS_COLUMNS)
    scale, gate = _of_rates(tokens, shared, parts, (of_weights, of_second, of_steps), whole)
    before = State(
        later.first + dot(read, q, COLUMNS_COLUMNS) + dot(hidden, k, COLUMNS_COLUMNS),
        later.first_bias + (read + hidden).sum(0),
        later.second
        + dot(asked.value, answer, COLUMNS_COLUMNS)
        + dot(of_pulled, parts.outer, COLUMNS_COLUMNS)
        + dot(key.value, z, COLUMNS_COLUMNS),
        later.second_bias + (answer + z).sum(0),
    )
    made = Tokens(dout + of_q, of_k - target, target, gate)
    return Gradients(before, made, scale, of_gamma + dout * unit, of_beta + dout)


def _of_rates(
    tokens: Tokens,
    shared: Shared,
    parts: Parts,
    pulls: tuple[jax.Array, jax.Array, jax.Array],
    whole: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """Of the scale and of the gates, by the rates of readers and the steps of the state."""
    of_weights, of_second, of_steps = pulls
    rates = seen(of_weights * parts.weights + of_second * parts.second_weights)
    # The last position is every later chunk's.
    is_last = lax.broadcasted_iota(jnp.int32, shared.scale.shape, 0) == len(shared.scale) - 1
    of_last = jnp.sum(of_steps * tokens.gate) * whole
    of_scale = (rates * tokens.gate[None]).sum(1) + jnp.where(is_last, of_last, 0.0)
    by_steps = last_of(shared.scale) * whole * of_steps
    return of_scale, (rates * shared.scale[:, None]).sum(0) + by_steps

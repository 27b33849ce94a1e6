"""The network inside a TTT layer: linear layers with gelu between, read through a LayerNorm.

Weights are ``(W1, b1, W2, b2, ...)``. Everything is in the wide dtype but the operands of matrix
products, which are rounded to ``operand`` first.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-6
"""Of the LayerNorm, as published."""

Weights = tuple[jax.Array, ...]
Norm = tuple[jax.Array, jax.Array]


class Piece(NamedTuple):
    """What C tokens add to one linear layer.

    Attributes:
      inputs: ``[C, i]``, what the layer was given for their keys.
      gradients: ``[C, o]``, of the inner loss with respect to the layer's outputs.
    """

    inputs: jax.Array
    gradients: jax.Array


def product(a: jax.Array, b: jax.Array, operand: Any) -> jax.Array:
    """``a @ b`` of operands in ``operand``, summed in the dtype of ``a``."""
    return jnp.matmul(a.astype(operand), b.astype(operand), preferred_element_type=a.dtype)


def layers_of(weights: Weights) -> list[tuple[jax.Array, jax.Array]]:
    """``[(W1, b1), (W2, b2), ...]``."""
    return list(zip(weights[::2], weights[1::2], strict=True))


def gelu(x: jax.Array) -> jax.Array:
    """In its tanh form."""
    return jax.nn.gelu(x, approximate=True)


def _normalized(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    centered = z - z.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centered * centered).mean(-1, keepdims=True) + EPSILON)
    return centered * scale, scale


def layer_norm(z: jax.Array, norm: Norm) -> jax.Array:
    """``gamma * (z - mean) / sqrt(variance + epsilon) + beta`` of each row ``[C, d]``."""
    gamma, beta = norm
    return gamma[None] * _normalized(z)[0] + beta[None]


def norm_gradient(z: jax.Array, target: jax.Array, norm: Norm) -> jax.Array:
    """The gradient of ``0.5 * sum((layer_norm(z) - target) ** 2)`` with respect to ``z``."""
    gamma, beta = norm
    unit, scale = _normalized(z)
    pull = gamma[None] * (gamma[None] * unit + beta[None] - target)
    along = (pull * unit).mean(-1, keepdims=True)
    return scale * (pull - pull.mean(-1, keepdims=True) - unit * along)


def pieces(weights: Weights, k: jax.Array, v: jax.Array, norm: Norm, operand: Any) -> list[Piece]:
    """Inputs and gradients of every linear layer, for the tokens' inner losses at ``weights``."""
    *hidden, (last_weight, last_bias) = layers_of(weights)
    x, inputs, pulls = k, [k], []
    for weight, bias in hidden:
        x, pull = jax.vjp(gelu, product(x, weight, operand) + bias[None])
        inputs.append(x)
        pulls.append(pull)
    z = product(x, last_weight, operand) + last_bias[None]
    gradients = [norm_gradient(z, v - k, norm)]
    # From the last layer down; the weight is the one above each activation.
    for weight, pull in zip(weights[:1:-1][1::2], reversed(pulls), strict=True):
        gradients += pull(product(gradients[-1], weight.T, operand))
    return [Piece(*pair) for pair in zip(inputs, reversed(gradients), strict=True)]


def sums(parts: Sequence[Piece], gate: jax.Array, operand: Any) -> Weights:
    """``sum_s gate_s dloss_s / dweights``, laid out as the weights."""
    made: list[jax.Array] = []
    for inputs, gradients in parts:
        steps = gate[:, None] * gradients
        made += [product(inputs.T, steps, operand), steps.sum(0)]
    return tuple(made)


def moved(weights: Weights, change: Weights, size: jax.Array) -> Weights:
    """``weights - size * change``."""
    return tuple(leaf - size * step for leaf, step in zip(weights, change, strict=True))


def read(
    q: jax.Array,
    norm: Norm,
    before: Callable[[int, jax.Array], jax.Array],
    within: Callable[[int, jax.Array], jax.Array] | None = None,
    *,
    depth: int,
) -> jax.Array:
    """``q + layer_norm(network(q))``.

    Args:
      q: ``[C, d]``.
      norm: gamma and beta.
      before: ``(layer, inputs) -> outputs`` of a linear layer at the weights before the tokens.
      within: what the tokens themselves take from these outputs, in the same form; None for
        nothing.
      depth: how many linear layers there are.
    """
    x = q
    for layer in range(depth):
        z = before(layer, x)
        if within is not None:
            z = z - within(layer, x)
        x = gelu(z) if layer + 1 < depth else z
    return q + layer_norm(x, norm)


def linear(weights: Weights, operand: Any) -> Callable[[int, jax.Array], jax.Array]:
    """``(layer, inputs) -> outputs`` at these weights."""
    pairs = layers_of(weights)

    def apply(layer: int, x: jax.Array) -> jax.Array:
        weight, bias = pairs[layer]
        return product(x, weight, operand) + bias[None]

    return apply


def attended(
    parts: Sequence[Piece], rates: jax.Array, operand: Any
) -> Callable[[int, jax.Array], jax.Array]:
    """What tokens take from the outputs of those that read, in dual form.

    Args:
      parts: of the C tokens that are learned.
      rates: ``[C, C]``, step sizes of token ``s`` for token ``t``, 0 where ``t`` does not see it.
      operand: the dtype of the products' operands.
    """

    def apply(layer: int, x: jax.Array) -> jax.Array:
        inputs, gradients = parts[layer]
        # One more than the product, as the bias learns as well.
        overlap = (product(x, inputs.T, operand) + 1) * rates
        return product(overlap, gradients, operand)

    return apply

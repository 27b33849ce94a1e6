"""Inner losses of a fast-weight layer: ``(prediction, target) -> scalar`` of one token.

The outer gradient reaches a value only where the derivative of the loss with respect to prediction
and target is not zero everywhere: absolute errors alone do not train.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ttt_jax import _arguments

__all__ = ["dot_product", "huber", "power", "squared", "sums"]

_vector = _arguments.array(1, kinds="f", like="[d]")


@_arguments.checked(prediction=_vector, target=_vector)
def squared(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """``0.5 * sum((prediction - target) ** 2)``: delta rules, TTT layers, and half of Titans'."""
    error = prediction - target
    return 0.5 * (error * error).sum()


@_arguments.checked(prediction=_vector, target=_vector)
def dot_product(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """``-sum(prediction * target)``: linear attention, LaCT."""
    return -(prediction * target).sum()


@_arguments.checked(exponent=_arguments.number(1.0, above=True))
def power(exponent: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``sum(abs(prediction - target) ** exponent)``.

    Args:
      exponent: above 1, as absolute errors do not train.

    References:
      Behrouz et al., `MIRAS <https://arxiv.org/abs/2504.13173>`_, 2025: Moneta, with 3.
    """

    def loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
        return (jnp.abs(prediction - target) ** exponent).sum()

    return loss


@_arguments.checked(prediction=_vector, target=None)
def huber(prediction: jax.Array, target: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The Huber loss, summed over the entries; the threshold comes with each target.

    ``0.5 * e ** 2`` for an error ``abs(e) <= delta`` and ``delta * (abs(e) - 0.5 * delta)`` beyond.

    Args:
      prediction: ``[d]``.
      target: ``(value [d], delta)``, delta a number above 0 for each token, or ``[d]``.

    Raises:
      TypeError: target is no pair.

    References:
      Behrouz et al., `MIRAS <https://arxiv.org/abs/2504.13173>`_, 2025: Yaad, whose switch is on
      the norm of the whole error instead of each entry.
    """
    if not isinstance(target, tuple | list) or len(target) != 2:
        raise TypeError(f"target must be a pair (value, delta); got {target!r}.")
    value, delta = target
    size = jnp.abs(prediction - value)
    inside = size <= delta
    return jnp.where(inside, 0.5 * size * size, delta * (size - 0.5 * delta)).sum()


@_arguments.checked(prediction=None, target=_vector)
def sums(prediction: tuple[jax.Array, jax.Array], target: jax.Array) -> jax.Array:
    """The loss whose steps add up ``k^T k`` and ``k^T v``, for :func:`memories.ridge`.

    Args:
      prediction: ``(k H k^T, k G [d])``.
      target: ``[d]``.

    Raises:
      TypeError: prediction is no pair.
    """
    if not isinstance(prediction, tuple | list) or len(prediction) != 2:
        raise TypeError(f"prediction must be that of memories.ridge; got {prediction!r}.")
    overlap, value = prediction
    return -overlap - (value * target).sum()

"""What a fast-weight layer keeps of its weights: ``Retention(init, decay, link, after, first)``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments

__all__ = ["Retention", "decay", "elastic", "keep", "kl", "norms", "power_norm"]


class Retention(NamedTuple):
    """How weights are kept from inner step to inner step.

    A step is ``state <- after(decay(state, rate, kept) + update, kept)``, and what is read and
    differentiated are the weights ``link(state)``.

    Attributes:
      init: ``state -> kept``, what is remembered of the initial state; ``()`` for nothing.
      decay: ``(state, rate, kept) -> state``, with the step's rate of retention.
      link: ``state -> weights``.
      after: ``(state, kept) -> state``.
      first: whether the gradient is taken after the decay.
    """

    init: Callable[[Any], Any]
    decay: Callable[[Any, jax.Array, Any], Any]
    link: Callable[[Any], Any]
    after: Callable[[Any, Any], Any]
    first: bool


def _nothing(state: Any) -> tuple[()]:
    return ()


def _itself(state: Any, *rest: Any) -> Any:
    return state


def _times(rate: jax.Array, leaf: jax.Array) -> jax.Array:
    """A rate for all of a leaf, or for each of its rows."""
    return rate.reshape(*rate.shape, *(1,) * (leaf.ndim - rate.ndim)).astype(leaf.dtype) * leaf


def _faded(state: Any, rate: jax.Array, kept: Any) -> Any:
    return jax.tree.map(lambda leaf: _times(rate, leaf), state)


def keep() -> Retention:
    """Everything is kept; rates of retention are not used."""
    return Retention(_nothing, _itself, _itself, _itself, False)


@_arguments.checked()
def decay(*, first: bool = True) -> Retention:
    """Weights are multiplied by the rate: a number for all, or one for each row ``[inputs]``.

    Args:
      first: whether the gradient is taken at the weights after their decay, as in Gated DeltaNet
        and Kimi Delta Attention; False, as in Titans, for those before.

    References:
      Yang et al., `Gated Delta Networks <https://arxiv.org/abs/2412.06464>`_, 2024, Eq. 10; Kimi
      Team, `Kimi Linear <https://arxiv.org/abs/2510.26692>`_, 2025, Eq. 1.
    """
    return Retention(_nothing, _faded, _itself, _itself, first)


@_arguments.checked()
def elastic(*, first: bool = False) -> Retention:
    """Weights are drawn back to where they began: ``initial + rate * (state - initial)``.

    Args:
      first: whether the gradient is taken after that.
    """

    def back(state: Any, rate: jax.Array, kept: Any) -> Any:
        return jax.tree.map(lambda leaf, old: old + _times(rate, leaf - old), state, kept)

    return Retention(_itself, back, _itself, _itself, first)


@_arguments.checked(total=_arguments.number(0.0, above=True))
def kl(total: float = 1.0) -> Retention:
    """Weights are positive and each row ``[..., outputs]`` has one sum: mirror descent in logits.

    ``W <- total * softmax(rate * log W - step)``. The state are logits, the weights
    ``total * softmax(state)``; gradients are those of the weights.

    Args:
      total: the sum of a row.

    References:
      Behrouz et al., `MIRAS <https://arxiv.org/abs/2504.13173>`_, 2025: Memora.
    """

    def link(state: Any) -> Any:
        return jax.tree.map(lambda leaf: total * jax.nn.softmax(leaf, -1), state)

    return Retention(_nothing, _faded, link, _itself, False)


@_arguments.checked(exponent=_arguments.number(2.0))
def power_norm(exponent: float) -> Retention:
    """Steps are summed up, and the weights are the sum over a power of its norm.

    ``A <- rate * A - step``, ``W = A / norm_q(A) ** (q - 2)`` for each leaf, with the exponent q.

    Args:
      exponent: q, at least 2, where the weights are the sum itself.

    References:
      Behrouz et al., `MIRAS <https://arxiv.org/abs/2504.13173>`_, 2025: Moneta, with 4.
    """

    def scaled(leaf: jax.Array) -> jax.Array:
        # norm ** (q - 2), as one power of the sum: its derivative is finite wherever leaf is not 0.
        total = (jnp.abs(leaf) ** exponent).sum()
        return leaf / total ** ((exponent - 2) / exponent)

    def link(state: Any) -> Any:
        return jax.tree.map(scaled, state)

    return Retention(_nothing, _faded, link, _itself, False)


@_arguments.checked(epsilon=_arguments.number(0.0))
def norms(epsilon: float = 1e-5) -> Retention:
    """After a step, what leads to each output has the norm that it began with.

    ``W[:, j] <- W[:, j] / (norm(W[:, j]) + epsilon) * norm(initial W[:, j])``.

    Args:
      epsilon: of the division.

    References:
      Zhang et al., `Test-Time Training Done Right <https://arxiv.org/abs/2505.23884>`_, 2025
      (LaCT), Algorithm 1; there a weight is ``[outputs, inputs]`` and its rows are these.
    """

    def sizes(state: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.sqrt((leaf * leaf).sum(0, keepdims=True)), state)

    def after(state: Any, kept: Any) -> Any:
        def scaled(leaf: jax.Array, size: jax.Array, due: jax.Array) -> jax.Array:
            return leaf / (size + epsilon) * due

        return jax.tree.map(scaled, state, sizes(state), kept)

    return Retention(sizes, _itself, _itself, after, False)

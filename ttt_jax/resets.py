"""Resets: when a stream goes back to its pristine state.

A reset is a :class:`~ttt_jax.Reset` applied inside the traced code after every step of a
stream. All but :func:`stochastic_restore` restore the **whole** state: weights, optimizer
moments, memory and count together (an optimizer state that survives a reset is a leak).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract, _trees
from ttt_jax.base import Info, Key, PyTree, Reset

__all__ = ["every", "never", "on_collapse", "stochastic_restore"]


def never() -> Reset:
    """Continual adaptation: the state is never restored."""

    def apply(carry: Any, state: PyTree, pristine: PyTree, output: Any, info: Info, key: Key):
        return carry, state, jnp.zeros((), bool)

    return Reset(lambda: (), apply)


@_arguments.checked()
def every(n: int | jax.Array) -> Reset:
    """Restores the pristine state after every n-th step of the stream; ``every(1)`` is episodic.

    Args:
      n: steps between resets, at least 1 (RDumb: 1000). May be traced.

    Raises:
      ValueError: ``n`` is a number below 1.

    References:
      Press et al., `RDumb <https://arxiv.org/abs/2306.05401>`_, 2023.
    """
    known = _checks.known(n)
    if known is not None:
        count = known.item() if known.ndim == 0 else n
        if not _trees.is_integer(count, 1):
            raise ValueError(f"resets.every needs n, an integer of at least 1, got {n!r}.")

    def apply(carry: Any, state: PyTree, pristine: PyTree, output: Any, info: Info, key: Key):
        count = carry + 1
        fired = count >= n
        return jnp.where(fired, 0, count), _trees.where(fired, pristine, state), fired

    return Reset(lambda: jnp.zeros((), jnp.int32), apply)


class _Average(NamedTuple):
    value: jax.Array
    started: jax.Array


@_arguments.checked()
def on_collapse(
    statistic: Callable[[Any, Info], jax.Array],
    threshold: float | jax.Array,
    *,
    decay: float | jax.Array = 0.9,
) -> Reset:
    """Restores when a moving average of ``statistic(output, info)`` falls below a threshold.

    The average starts at the first value, ``m <- decay * m + (1 - decay) * value`` after it,
    and starts anew when it fires. A value that is not finite is left out.

    Args:
      statistic: scalar health of one step, larger is healthier: the loss (SAR: entropy), the
        effective number of predicted classes, the agreement with the pristine model.
      threshold: fires when the average is below it (SAR: 0.2). May be traced.
      decay: weight of the old average, in [0, 1]. May be traced.

    Raises:
      ValueError: a known ``decay`` outside of [0, 1], or a threshold of nan.

    References:
      Niu et al., `Towards Stable Test-Time Adaptation in Dynamic Wild World
      <https://arxiv.org/abs/2302.12400>`_, 2023, Section 4 (model recovery).
    """
    _contract.require_function("statistic", statistic, "(output, info) -> scalar")
    _checks.check_number("threshold", threshold)
    _checks.check_share("decay", decay)

    def init() -> _Average:
        return _Average(jnp.zeros((), jnp.float32), jnp.zeros((), bool))

    def apply(carry: _Average, state: PyTree, pristine: PyTree, output: Any, info: Info, key: Key):
        value = jnp.asarray(statistic(output, info), jnp.float32)
        if value.shape != ():
            raise ValueError(
                f"The statistic of on_collapse must be a scalar; got shape {value.shape}."
            )
        # As wide as the carry: under jax_enable_x64 a NumPy decay would widen it.
        mixed = (decay * carry.value + (1 - decay) * value).astype(jnp.float32)
        blended = jnp.where(carry.started, mixed, value)
        usable = jnp.isfinite(value)
        average = jnp.where(usable, blended, carry.value)
        started = carry.started | usable
        fired = started & (average < threshold)
        carry = _Average(jnp.where(fired, 0.0, average), started & ~fired)
        return carry, _trees.where(fired, pristine, state), fired

    return Reset(init, apply)


@_arguments.checked()
def stochastic_restore(p: float | jax.Array) -> Reset:
    """Restores each element of the fast parameters with probability ``p`` at every step.

    Optimizer state, memory and count are kept. ``fired`` says whether any element was restored.

    Args:
      p: probability in [0, 1] (CoTTA: 0.01 on CIFAR, 0.001 on ImageNet). May be traced.

    Raises:
      ValueError: a known ``p`` outside of [0, 1].

    References:
      Wang et al., `Continual Test-Time Domain Adaptation
      <https://arxiv.org/abs/2203.13591>`_, 2022, Eqs. 7-8.
    """
    _checks.check_share("p", p)

    def apply(carry: Any, state: PyTree, pristine: PyTree, output: Any, info: Info, key: Key):
        if not hasattr(state, "fast"):
            raise TypeError(
                "stochastic_restore needs a state with fast parameters (AdapterState); got "
                f"{type(state).__name__}. Use a reset that restores the whole state."
            )
        leaves, treedef = jax.tree.flatten(state.fast)
        masks = [
            jax.random.bernoulli(
                jax.random.fold_in(key, i), jnp.asarray(p, jnp.float32), leaf.shape
            )
            for i, leaf in enumerate(leaves)
        ]
        restored = [
            jnp.where(mask, old, new)
            for mask, old, new in zip(masks, jax.tree.leaves(pristine.fast), leaves, strict=True)
        ]
        fired = jnp.stack([mask.any() for mask in masks]).any()
        return carry, state._replace(fast=jax.tree.unflatten(treedef, restored)), fired

    return Reset(lambda: (), apply)

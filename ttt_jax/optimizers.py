"""Optimizers that differ between the instances of one batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _optimizers, _trees
from ttt_jax.base import PyTree

__all__ = ["chosen"]


@_arguments.checked(index=_arguments.array(0, kinds="iu"))
def chosen(
    index: int | jax.Array, *optimizers: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimizer of this index; the state has room for each, and only its own part is used.

    With a traced index, instances of one batch adapt by different families of optimizers: build
    the predictor inside the function that is mapped. Optimizers that differ in a number alone need
    no choice, as ``optax.adam(step_size)`` takes a traced one. Under ``vmap`` all updates are
    computed and one is kept, and the state is as large as all states together.

    Args:
      index: which one, from 0; a traced one that is out of range is cut to the nearest.
      *optimizers: at least one, over the same parameters.

    Raises:
      ValueError: no optimizer, or a known index out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> def step(index):
      ...     optimizer = chosen(index, optax.sgd(0.1), optax.adam(0.1))
      ...     return optimizer.update(jnp.array(4.0), optimizer.init(jnp.array(0.0)))[0]
      >>> print(jax.vmap(step)(jnp.arange(2)).round(3))
      [-0.4 -0.1]
    """
    if not optimizers:
        raise ValueError("optimizers of optimizers.chosen must be at least one; got ().")
    known = None if isinstance(index, jax.core.Tracer) else int(index)
    if known is not None and not 0 <= known < len(optimizers):
        raise ValueError(
            f"index must be from 0 to {len(optimizers) - 1}, one of the {len(optimizers)} "
            f"optimizers; got {known}."
        )
    every = tuple(_optimizers.checked(optimizer) for optimizer in optimizers)

    def init(params: PyTree) -> tuple[PyTree, ...]:
        return tuple(optimizer.init(params) for optimizer in every)

    def update(
        updates: PyTree,
        state: tuple[PyTree, ...],
        params: PyTree = None,
        **search: Any,
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        place = jnp.clip(jnp.asarray(index if known is None else known), 0, len(every) - 1)
        made = [
            _optimizers.update(optimizer, updates, own, params, search)
            for optimizer, own in zip(every, state, strict=True)
        ]
        kept = made[0][0]
        for number, (update, _) in enumerate(made):
            kept = _trees.where(place == number, update, kept)
        states = (
            _trees.where(place == number, after, before)
            for number, ((_, after), before) in enumerate(zip(made, state, strict=True))
        )
        return kept, tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)

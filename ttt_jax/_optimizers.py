"""Calls of an optax transformation, with the sentence for one that an adapter cannot serve."""

import inspect
from collections.abc import Mapping
from typing import Any

import optax

from ttt_jax import _contract
from ttt_jax.base import PyTree


def checked(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer as one that takes further arguments, whether or not it has a use for them.

    Raises:
      TypeError: it is no optax transformation.
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(
            "optimizer must be an optax transformation such as optax.sgd(1e-3); got "
            f"{_contract.described(optimizer)}. Call a factory with its step size."
        )
    return optax.with_extra_args_support(optimizer)


def update(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    state: PyTree,
    fast: PyTree,
    search: Mapping[str, Any],
) -> tuple[PyTree, PyTree]:
    """Updates and the new state.

    Args:
      optimizer: the optimizer.
      grads: the gradient at ``fast``.
      state: its state.
      fast: the parameters.
      search: ``value``, ``grad`` and ``value_fn``, for optimizers that have a use for them.

    Raises:
      ValueError: one that needs other arguments, or parameters of a kind of its own.
    """
    try:
        return optimizer.update(grads, state, fast, **_taken(optimizer, search))
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        raise ValueError(
            f"optimizer may use {', '.join(search)} of the loss and no other argument; got one "
            f"that asks for more ({error}): choose another, or bind the argument beforehand."
        ) from error
    except AttributeError as error:
        if error.name != "fast" or error.obj is not fast:
            raise
        raise ValueError(
            "optimizer must keep one copy of the parameters; got optax.lookahead, which keeps a "
            "fast and a slow one (LookaheadParams): give the optimizer within it."
        ) from error


def _taken(
    optimizer: optax.GradientTransformationExtraArgs, search: Mapping[str, Any]
) -> Mapping[str, Any]:
    """What the update accepts: not every transformation of this kind takes any argument."""
    parameters = inspect.signature(optimizer.update).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return search
    return {name: value for name, value in search.items() if name in parameters}

"""Checks of what the kernels are given; they need jax alone, and so have their own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def array(name: str, value: Any, rank: int) -> jax.Array:
    """An array of real numbers of this rank, or lists that make one; traced ones too.

    Raises:
      TypeError: no array.
      ValueError: another rank, or another kind of number.
    """
    rule = f"{name} must be an array of real numbers with {rank} axes"
    if not hasattr(value, "dtype"):
        if not isinstance(value, list):
            raise TypeError(f"{rule}; got {value!r} of type {type(value).__name__}.")
        value = jnp.asarray(value)
    real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    if not real or value.ndim != rank:
        raise ValueError(f"{rule}; got shape {value.shape} and dtype {value.dtype}.")
    return value


def choice(name: str, value: Any, options: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of the names."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {tuple(options)}; got {value!r}.")


def integer(name: str, value: Any, least: float = 0) -> None:
    """Raises ``ValueError`` unless ``value`` is a static integer of at least ``least``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")


def shape(name: str, value: Any, rank: int) -> None:
    """Raises ``ValueError`` unless ``value`` is a shape of this rank."""
    if not isinstance(value, tuple | list) or len(value) != rank:
        raise ValueError(f"{name} must be a shape of {rank} integers; got {value!r}.")
    for side in value:
        integer(name, side)


def dtype(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` names a dtype."""
    try:
        jnp.dtype(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a dtype, such as jnp.bfloat16; got {value!r} of type "
            f"{type(value).__name__}."
        ) from None


def instance(name: str, value: Any, kind: type) -> None:
    """Raises ``TypeError`` unless ``value`` is of this class."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be of class {kind.__name__}; got {value!r} of type "
            f"{type(value).__name__}."
        )

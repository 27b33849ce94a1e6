"""Grids and other answers on the host: their content as a key, and the eight symmetries."""

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from ttt_jax import _contract

__all__ = ["SYMMETRIES", "content", "is_grid", "require", "turned"]

SYMMETRIES = range(8)


def content(name: str, value: Any) -> Hashable:
    """A key that equal values share: of an array its shape and its integers, else the value.

    Raises:
      TypeError: an array of other numbers, or a value that cannot be hashed.
    """
    if isinstance(value, jax.Array | np.ndarray):
        array = np.asarray(value)
        if array.dtype.kind in "iub":
            return "array", array.shape, array.astype(np.int64).tobytes()
    else:
        try:
            hash(value)
        except TypeError:
            pass
        else:
            return "value", value
    raise TypeError(
        f"{name} must be an array of integers or a value with a hash, such as a str; got "
        f"{_contract.described(value)}: make an array of it with np.asarray."
    )


def is_grid(value: Any) -> bool:
    """Whether a value is a 2-D array of integers."""
    arrays = isinstance(value, jax.Array | np.ndarray)
    return arrays and value.ndim == 2 and np.dtype(value.dtype).kind in "iu"


def require(name: str, value: Any) -> np.ndarray:
    """The grid as a NumPy array.

    Raises:
      TypeError: no 2-D array of integers.
      ValueError: a grid without cells.
    """
    if not is_grid(value):
        raise TypeError(
            f"{name} must be a grid, an array [H, W] of integers; got {_contract.described(value)}."
        )
    if not value.size:
        raise ValueError(f"{name} must have at least one cell; got the shape {value.shape}.")
    return np.asarray(value)


def turned(grid: np.ndarray, symmetry: int) -> np.ndarray:
    """The grid after ``symmetry % 4`` quarter turns, and transposed from 4 on."""
    quarters = np.rot90(grid, symmetry % 4)
    return quarters.T if symmetry >= 4 else quarters

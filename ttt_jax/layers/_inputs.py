"""Checks of what the TTT layers are given, and their dtypes."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _arguments, _checks, _contract, _trees, _varying
from ttt_jax.layers._forms import Rows, Settings, TTTCache
from ttt_jax.layers._net import Weights

LINEAR = ("W", "b")
MLP = ("W1", "b1", "W2", "b2")
FORMS = ("auto", "primal", "dual", "kernel")

vector = _arguments.array(1, kinds="f", like="[T]")
table = _arguments.array(2, kinds="f", like="[T, d]")
positions = _arguments.array(1, kinds="f", like="[chunk_size]")
numbers = _arguments.array(1, kinds="iu", like="[T]")


def arrays(*options: tuple[str, ...]) -> _arguments.Rule:
    """A tuple of floating arrays, laid out as one of the options."""
    due = " or ".join(f"({', '.join(names)})" for names in options)

    def rule(place: str, name: str, value: Any) -> Any:
        plain = isinstance(value, tuple | list) and not hasattr(value, "_fields")
        if not plain or len(value) not in map(len, options):
            raise TypeError(
                f"{name} must be a tuple of arrays {due}; got {_contract.described(value)}."
            )
        leaf = _arguments.array(kinds="f")
        return tuple(leaf(place, f"{name}[{index}]", part) for index, part in enumerate(value))

    return rule


def cache(place: str, name: str, value: Any) -> Any:
    """A cache of :func:`ttt_jax.layers.ttt_cache`."""
    if not isinstance(value, TTTCache):
        raise TypeError(
            f"{name} must be a TTTCache; got {_contract.described(value)}. "
            "Begin with layers.ttt_cache(state)."
        )
    return value


def count_of(name: str, value: Any, tokens: int) -> jax.Array:
    """An int32 from 0 to ``tokens``; traced ones are taken as they are.

    Raises:
      ValueError: no integer, or out of range.
    """
    is_array = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    whole = is_array and jnp.issubdtype(value.dtype, jnp.integer)
    number = _checks.known(value) if whole else value
    right = whole or _trees.is_integer(value, 0)
    if not right or (number is not None and not 0 <= number <= tokens):
        raise ValueError(
            f"{name} must be an integer from 0 to T = {tokens}; got {_contract.described(value)}."
        )
    return jnp.asarray(value, jnp.int32)


def check_shapes(rows: Rows, scale: jax.Array, norm: tuple[jax.Array, jax.Array]) -> None:
    """Raises ``ValueError`` unless tokens, position factors and norm fit together."""
    for name in ("k", "v"):
        _due(name, getattr(rows, name).shape, rows.q.shape, "as q")
    _due("gate", rows.gate.shape, rows.q.shape[:-1], "one for each token of q")
    if rows.q.ndim == 2 and not rows.q.shape[0]:
        raise ValueError(
            f"q must have at least one token; got shape {rows.q.shape}. Leave out empty sequences."
        )
    if not rows.q.shape[-1]:
        raise ValueError(f"q must have at least one feature; got shape {rows.q.shape}.")
    if not scale.shape[0]:
        raise ValueError(
            f"scale must have a factor for each position of a chunk; got shape {scale.shape}."
        )
    for name, leaf in zip(("gamma", "beta"), norm, strict=True):
        _due(f"norm ({name})", leaf.shape, rows.q.shape[-1:], "the width of q")


def check_weights(name: str, weights: Weights, width: int) -> None:
    """Raises ``ValueError`` unless linear layers lead from ``width`` to ``width``."""
    shapes = [np.shape(leaf) for leaf in weights]
    right = all(len(shape) == 2 - index % 2 for index, shape in enumerate(shapes))
    if right:
        sizes = [shapes[0][0], *(shape[0] for shape in shapes[1::2])]
        kernels = list(itertools.pairwise(sizes))
        right = kernels == shapes[::2] and sizes[0] == sizes[-1] == width
    if not right:
        due = "(W [d, d], b [d])" if len(weights) == 2 else "(W1 [d, h], b1 [h], W2 [h, d], b2 [d])"
        raise ValueError(f"{name} must have shapes {due} with d = {width}; got {shapes}.")


def check_chunk(chunk_size: int, scale: jax.Array) -> None:
    """Raises ``ValueError`` unless there is a factor for each position."""
    if scale.shape[0] != chunk_size:
        raise ValueError(
            "scale must have chunk_size entries, one for each position of a chunk; got "
            f"shape {scale.shape} with chunk_size={chunk_size}."
        )


def check_form(form: str) -> None:
    """Raises ``ValueError`` for an unknown form."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}; got {form!r}.")


def operand_of(rows: Rows) -> Any:
    """The dtype of the products' operands: that of q, k and v together."""
    return functools.reduce(jnp.promote_types, [leaf.dtype for leaf in rows[:3]])


def widened(
    rows: Rows, scale: jax.Array, norm: tuple[jax.Array, jax.Array], *trees: Any
) -> tuple[Rows, Settings, list[Any]]:
    """All in the wide dtype, alike on the devices of a ``shard_map``, and the operands' dtype.

    The wide dtype is float64 where anything is, else float32.
    """
    operand = operand_of(rows)
    given = (rows, scale, norm, trees)
    double = any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(given))
    wide = jnp.float64 if double else jnp.float32

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(wide) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    rows, scale, norm, trees = _varying.along(jax.tree.map(cast, given), given)
    return rows, Settings(scale, norm, operand), list(trees)


def _due(name: str, shape: tuple[int, ...], due: tuple[int, ...], why: str) -> None:
    if shape != due:
        raise ValueError(f"{name} must have shape {due}, {why}; got {shape}.")

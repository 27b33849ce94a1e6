"""Checks of what callers give: numbers, keys, leading axes. Each fails with one sentence.

They look at shapes, types and known values, never at traced ones, and add nothing to a program.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _trees

# Under vmap they draw from the first key of the batch (jax-ml/jax#19085).
_SHARED_DRAWS = ("rbg", "unsafe_rbg")


def known(value: Any) -> np.ndarray | None:
    """The value as an array on the host; None where it is traced, or held by another process."""
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    hint: str = "",
    scalar: bool = True,
) -> None:
    """Refuses a known number, or an array of numbers, outside of ``[low, high]``.

    Args:
      name: of the argument.
      value: a number, an array or a traced value, of which nothing is known.
      low: the least value.
      high: the largest; infinity is in the range of a number without a bound.
      above: whether ``low`` itself is refused.
      hint: what to do, the end of the message.
      scalar: whether arrays are refused, traced ones too, which would broadcast in silence.

    Raises:
      TypeError: not a number.
      ValueError: outside of the range, nan, or several numbers.
    """
    array = known(value)
    rule = f"{name} must be a number {_range(low, high, above)}"
    if scalar and hasattr(value, "dtype") and value.ndim:
        raise ValueError(f"{rule}; got an array of shape {value.shape}. Give one number.")
    if array is None:
        return
    real = jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "iu"
    if not real or (scalar and array.ndim):
        raise TypeError(f"{rule}; got {value!r} of type {type(value).__name__}.")
    inside = (array > low if above else array >= low) & (array <= high)
    if not inside.all():
        worst = value if array.ndim == 0 else array[~inside].flat[0]
        raise ValueError(f"{rule}; got {_shown(worst)}. {hint}".rstrip())


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, np.ndarray | np.generic | jax.Array) else repr(value)


def _range(low: float, high: float, above: bool) -> str:
    if high == math.inf:
        return f"{'above' if above else 'of at least'} {low:g}" if low > -math.inf else "(not nan)"
    return f"in {'(' if above else '['}{low:g}, {high:g}]"


def check_share(name: str, value: Any, *, hint: str = "") -> None:
    """Refuses a known number outside of [0, 1]: a probability, a weight of an average."""
    fix = hint or "Give a share, not per cent."
    check_number(name, value, 0.0, 1.0, hint=fix)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Returns a static count as an int; refuses all but an integer of at least ``least``.

    Raises:
      ValueError: not an integer, or below ``least``.
    """
    if not _trees.is_integer(value, least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return int(value)


def check_mapped_keys(name: str, key: Any) -> None:
    """Refuses keys of a generator whose draws under ``vmap`` depend on the rest of the batch.

    Raises:
      ValueError: the generator is ``rbg`` or ``unsafe_rbg``.
    """
    if _trees.is_key(key) and str(jax.random.key_impl(key)) in _SHARED_DRAWS:
        raise ValueError(
            f"{name} maps over keys, and under vmap the generator "
            f"{str(jax.random.key_impl(key))!r} draws from the first key of the batch, so that an "
            "instance would depend on its batch mates. Make the key with "
            "jax.random.key(seed, impl='threefry2x32')."
        )


def split_to_map(name: str, key: Any, count: int) -> jax.Array:
    """``count`` keys that ``name`` will map over; of one key alone any generator does."""
    if count > 1:
        check_mapped_keys(name, key)
    return jax.random.split(key, count)


def leading_size(name: str, tree: Any) -> int:
    """The one length of the leading axes of all leaves; text, as of a domain's name, is left out.

    Raises:
      ValueError: no leaf, a leaf without axes, or several lengths.
    """
    named = [(path, leaf) for path, leaf in _trees.named_leaves(tree) if not _is_label(leaf)]
    shapes = {path: getattr(leaf, "shape", None) or np.shape(leaf) for path, leaf in named}
    shown = {path or "x": shape for path, shape in shapes.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1 or () in shapes.values():
        raise ValueError(
            f"{name} needs the same leading axis on every leaf; got "
            f"{shown or type(tree).__name__}. Give every instance its own row of each leaf."
        )
    return int(next(iter(shapes.values()))[0])


def _is_label(leaf: Any) -> bool:
    """Whether a leaf is a hole, or text, which no program is given."""
    kind = getattr(getattr(leaf, "dtype", None), "kind", "")
    return leaf is None or isinstance(leaf, str | bytes) or kind in ("U", "S", "O")


def check_alike(names: tuple[str, str], a: Any, b: Any) -> None:
    """Raises ``ValueError`` for two trees of different leaves, which cannot be compared."""
    shapes = [
        {path or "itself": np.shape(leaf) for path, leaf in _trees.named_leaves(tree)}
        for tree in (a, b)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same leaves of the same shapes; got "
            f"{shapes[0]} and {shapes[1]}. Compare two results of one program."
        )

"""Checks of what the kernels of TTT layers are given: tokens of a head, its state and norm."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ttt_jax.kernels import _arguments

_NORM = {"gamma": 1, "beta": 1}


class Head(NamedTuple):
    """Arrays as they were given.

    Attributes:
      q: ``[T, d]``.
      k: ``[T, d]``.
      v: ``[T, d]``.
      gate: ``[T]``.
      scale: ``[chunk_size]``.
      state: by name.
      norm: gamma and beta, by name.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array
    scale: jax.Array
    state: dict[str, jax.Array]
    norm: dict[str, jax.Array]


def head(
    rows: tuple[Any, Any, Any, Any], scale: Any, state: Any, norm: Any, ranks: Mapping[str, int]
) -> Head:
    """What was given, as arrays; ``ranks`` are those of the state's leaves, by name.

    Raises:
      TypeError: no arrays, or no tuples of them.
      ValueError: other ranks, no token, or tokens of several shapes or dtypes.
    """
    named = zip(("q", "k", "v", "gate"), rows, (2, 2, 2, 1), strict=True)
    q, k, v, gate = (_arguments.array(*each) for each in named)
    scale = _arguments.array("scale", scale, 1)
    parts = []
    for name, leaves, due in (("state", state, ranks), ("norm", norm, _NORM)):
        if not isinstance(leaves, tuple | list) or len(leaves) != len(due):
            raise TypeError(
                f"{name} must be {len(due)} arrays, {', '.join(due)}; got {type(leaves).__name__}"
                f"{f' of {len(leaves)}' if isinstance(leaves, tuple | list) else ''}."
            )
        pairs = zip(due, leaves, strict=True)
        parts.append({n: _arguments.array(n, leaf, due[n]) for n, leaf in pairs})
    if not q.shape[0]:
        raise ValueError(f"q must have at least one token; got shape {q.shape}.")
    for name, array in (("k", k), ("v", v)):
        if array.shape != q.shape or array.dtype != q.dtype:
            raise ValueError(
                f"{name} must have the shape and dtype of q, {q.shape} and {q.dtype}; got "
                f"{array.shape} and {array.dtype}."
            )
    return Head(q, k, v, gate, scale, *parts)


def check_shapes(given: Head, state: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ``ValueError`` where gate, state or norm does not fit; ``state``: due shapes."""
    length, width = given.q.shape
    due = {"gate": (length,), **state, "gamma": (width,), "beta": (width,)}
    arrays = {"gate": given.gate, **given.state, **given.norm}
    for name, shape in due.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {arrays[name].shape}.")


def nvidia() -> bool:
    """Whether this machine computes on an NVIDIA GPU."""
    return jax.default_backend() == "gpu" and jax.devices()[0].platform != "rocm"


def compiled(module: Any, layer: str) -> Any:
    """The module of the kernels of a layer.

    Raises:
      NotImplementedError: None, as this jax has no Pallas for Triton.
    """
    if module is None:
        raise NotImplementedError(
            f"jax {jax.__version__} has no Triton backend of Pallas, which the kernels need. Use "
            f"{layer}(form='dual')."
        )
    return module

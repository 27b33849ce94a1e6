"""Whether the kernels of TTT-Linear run here, and the layer in them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments
from ttt_jax.kernels.ttt_linear import limits


@functools.cache
def layer() -> Any:
    """The module of the kernels; None on a jax whose Pallas has no Triton backend."""
    try:
        from ttt_jax.kernels.ttt_linear import layer as module
    except ImportError:
        return None
    return module


def supported(width: int, chunk_size: int, dtype: Any) -> bool:
    """Whether this machine, an NVIDIA GPU, runs the kernels, and they were compared there.

    Of what :func:`fits`, the sizes in ``limits.COMPARED``.

    Args:
      width: d, features per head.
      chunk_size: tokens per chunk.
      dtype: of queries, keys and values.
    """
    nvidia = jax.default_backend() == "gpu" and jax.devices()[0].platform != "rocm"
    if not limits.fits(width, chunk_size, dtype) or not nvidia or layer() is None:
        return False
    return (width, chunk_size, jnp.dtype(dtype).name) in limits.COMPARED


def ttt_linear(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    state: tuple[jax.Array, jax.Array],
    norm: tuple[jax.Array, jax.Array],
    spacing: int = 4,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """:func:`ttt_jax.layers.ttt_linear` in kernels; interpreted away from a GPU, which is slow.

    The weights stay on chip over the whole sequence. A ``vmap`` over heads and sequences makes more
    programs of the same kernels. Products take operands in the dtype of q and have float32 sums;
    all else is float32. Differentiable once, in reverse mode, in all arrays.

    Args:
      q: ``[T, d]``, float32 or bfloat16; T at least 1, d one that :func:`fits`.
      k: ``[T, d]``, of the dtype of q.
      v: ``[T, d]``, of the dtype of q.
      gate: ``[T]``.
      scale: ``[chunk_size]``.
      state: ``(W [d, d], b [d])``.
      norm: ``(gamma [d], beta [d])``.
      spacing: chunks between two states that are kept for the backward pass, which makes those
        between again, all groups at once; at least 1. A kept state is ``d * d`` numbers of q's
        dtype.

    Returns:
      ``out [T, d]`` in the dtype of q, and the float32 state after the last whole chunk.

    Raises:
      TypeError: no arrays.
      ValueError: shapes or dtypes that the kernels do not take.
      NotImplementedError: a jax without Pallas' Triton backend.
    """
    q, k, v = (_arguments.array(n, a, 2) for n, a in (("q", q), ("k", k), ("v", v)))
    gate, scale = _arguments.array("gate", gate, 1), _arguments.array("scale", scale, 1)
    _arguments.integer("spacing", spacing, 1)
    named = {"W": 2, "b": 1, "gamma": 1, "beta": 1}
    for name, pair in (("state", state), ("norm", norm)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{name} must be a pair of arrays; got {type(pair).__name__}.")
    values = zip(named, (*state, *norm), strict=True)
    shared = [_arguments.array(name, value, named[name]) for name, value in values]
    _check_shapes(q, k, v, gate, shared)
    if not limits.fits(q.shape[1], scale.shape[0], q.dtype):
        raise ValueError(
            f"the kernels take {limits.described()}; got d = {q.shape[1]}, chunk_size = "
            f"{scale.shape[0]} and {q.dtype}. Use layers.ttt_linear(form='dual')."
        )
    module = layer()
    if module is None:
        raise NotImplementedError(
            f"jax {jax.__version__} has no Triton backend of Pallas, which the kernels need. Use "
            "layers.ttt_linear(form='dual')."
        )
    wide = [leaf.astype(jnp.float32) for leaf in (gate, scale, *shared)]
    out, last = module.run(module.Operands(q, k, v, *wide), spacing=int(spacing))
    return out, tuple(last)


def _check_shapes(
    q: jax.Array, k: jax.Array, v: jax.Array, gate: jax.Array, shared: list[jax.Array]
) -> None:
    length, width = q.shape
    if not length:
        raise ValueError(f"q must have at least one token; got shape {q.shape}.")
    for name, array in (("k", k), ("v", v)):
        if array.shape != q.shape or array.dtype != q.dtype:
            raise ValueError(
                f"{name} must have the shape and dtype of q, {q.shape} and {q.dtype}; got "
                f"{array.shape} and {array.dtype}."
            )
    shapes = {"gate": (length,), "W": (width, width), "b": (width,)}
    shapes |= {"gamma": (width,), "beta": (width,)}
    for (name, due), array in zip(shapes.items(), (gate, *shared), strict=True):
        if array.shape != due:
            raise ValueError(f"{name} must have shape {due}; got {array.shape}.")

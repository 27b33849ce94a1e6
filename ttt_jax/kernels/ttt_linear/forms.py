"""Whether the kernels of TTT-Linear run here, and the layer in them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments, _heads
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
    if not limits.fits(width, chunk_size, dtype) or not _heads.nvidia() or layer() is None:
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
    _arguments.integer("spacing", spacing, 1)
    given = _heads.head((q, k, v, gate), scale, state, norm, {"W": 2, "b": 1})
    width, chunk_size = given.q.shape[1], len(given.scale)
    _heads.check_shapes(given, {"W": (width, width), "b": (width,)})
    if not limits.fits(width, chunk_size, given.q.dtype):
        raise ValueError(
            f"the kernels take {limits.described()}; got d = {width}, chunk_size = "
            f"{chunk_size} and {given.q.dtype}. Use layers.ttt_linear(form='dual')."
        )
    module = _heads.compiled(layer(), "layers.ttt_linear")
    shared = (given.gate, given.scale, *given.state.values(), *given.norm.values())
    wide = [leaf.astype(jnp.float32) for leaf in shared]
    out, last = module.run(module.Operands(*given[:3], *wide), spacing=int(spacing))
    return out, tuple(last)

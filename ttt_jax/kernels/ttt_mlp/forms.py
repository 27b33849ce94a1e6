"""Whether the kernels of TTT-MLP run here, and the layer in them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments, _heads
from ttt_jax.kernels.ttt_mlp import limits

State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@functools.cache
def layer() -> Any:
    """The module of the kernels; None on a jax whose Pallas has no Triton backend."""
    try:
        from ttt_jax.kernels.ttt_mlp import layer as module
    except ImportError:
        return None
    return module


def supported(width: int, hidden: int, chunk_size: int, dtype: Any) -> bool:
    """Whether this machine, an NVIDIA GPU, runs the kernels, and they were compared there.

    Of what :func:`fits`, the sizes in ``limits.COMPARED``.

    Args:
      width: d, features per head.
      hidden: h, features of the hidden layer.
      chunk_size: tokens per chunk.
      dtype: of queries, keys and values.
    """
    fits = limits.fits(width, hidden, chunk_size, dtype)
    if not fits or not _heads.nvidia() or layer() is None:
        return False
    return (width, hidden, chunk_size, jnp.dtype(dtype).name) in limits.COMPARED


def ttt_mlp(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    state: State,
    norm: tuple[jax.Array, jax.Array],
    spacing: int = 4,
) -> tuple[jax.Array, State]:
    """:func:`ttt_jax.layers.ttt_mlp` in kernels; interpreted away from a GPU, which is slow.

    The weights stay on chip over the whole sequence, and their gradients on the way back. A
    ``vmap`` over heads and sequences makes more programs of the same kernels. Products take
    operands in the dtype of q and have float32 sums, in the backward pass too; all else is float32.
    Differentiable once, in reverse mode, in all arrays.

    Args:
      q: ``[T, d]``, float32 or bfloat16; T at least 1, d one that :func:`fits`.
      k: ``[T, d]``, of the dtype of q.
      v: ``[T, d]``, of the dtype of q.
      gate: ``[T]``.
      scale: ``[chunk_size]``.
      state: ``(W1 [d, h], b1 [h], W2 [h, d], b2 [d])``.
      norm: ``(gamma [d], beta [d])``.
      spacing: chunks between two states that are kept for the backward pass, which makes those
        between again, all groups at once; at least 1. A state is ``2 d h`` numbers of q's dtype;
        the backward pass has one for each chunk whatever the spacing, which saves memory until
        then.

    Returns:
      ``out [T, d]`` in the dtype of q, and the float32 state after the last whole chunk.

    Raises:
      TypeError: no arrays.
      ValueError: shapes or dtypes that the kernels do not take.
      NotImplementedError: a jax without Pallas' Triton backend.
    """
    _arguments.integer("spacing", spacing, 1)
    ranks = {"W1": 2, "b1": 1, "W2": 2, "b2": 1}
    given = _heads.head((q, k, v, gate), scale, state, norm, ranks)
    width, hidden, chunk_size = given.q.shape[1], given.state["W1"].shape[1], len(given.scale)
    due = {"W1": (width, hidden), "b1": (hidden,), "W2": (hidden, width), "b2": (width,)}
    _heads.check_shapes(given, due)
    if not limits.fits(width, hidden, chunk_size, given.q.dtype):
        raise ValueError(
            f"the kernels take {limits.described()}; got d = {width}, a hidden width of {hidden}, "
            f"chunk_size = {chunk_size} and {given.q.dtype}. Use layers.ttt_mlp(form='dual')."
        )
    module = _heads.compiled(layer(), "layers.ttt_mlp")

    def wide(*leaves: jax.Array) -> list[jax.Array]:
        return [leaf.astype(jnp.float32) for leaf in leaves]

    operands = module.Operands(
        module.Tokens(*given[:3], *wide(given.gate)),
        module.Shared(*wide(given.scale, *given.norm.values())),
        module.State(*wide(*given.state.values())),
    )
    out, last = module.run(operands, spacing=int(spacing))
    return out, tuple(last)

"""Which calls of the TTT layers the kernels take, and those calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _varying
from ttt_jax.kernels import ttt_linear
from ttt_jax.kernels.ttt_linear import limits
from ttt_jax.layers import _inputs
from ttt_jax.layers._forms import Rows
from ttt_jax.layers._net import Norm, Weights


def form_of(
    form: str, rows: Rows, scale: jax.Array, others: tuple[Weights, Norm], segments: Any
) -> str:
    """``"primal"``, ``"dual"`` or ``"kernel"``.

    Raises:
      ValueError: an unknown form, or that of kernels for arrays that they do not take.
      NotImplementedError: that of kernels for a layer that has none.
    """
    _inputs.check_form(form)
    if form not in ("kernel", "auto"):
        return form
    is_linear = len(others[0]) == 2
    leaves = jax.tree.leaves((rows, scale, others))
    double = any(leaf.dtype == np.float64 for leaf in leaves)
    dtype = np.dtype(np.float64) if double else jnp.dtype(_inputs.operand_of(rows))
    sizes = rows.q.shape[1], scale.shape[0], dtype
    if form == "auto":
        plain = is_linear and segments is None and not _varying.tracked()
        return "kernel" if plain and ttt_linear.supported(*sizes) else "dual"
    if not is_linear:
        raise NotImplementedError(
            f"form={form!r} has no kernel for ttt_mlp in this version. Use form='dual'."
        )
    if _varying.tracked():
        raise NotImplementedError(
            f"form={form!r} does not run in a shard_map that keeps track of what differs. Use "
            "form='dual', or shard_map(check_vma=False)."
        )
    if segments is not None or not ttt_linear.fits(*sizes):
        packed = "no segments" if segments is None else "segments"
        raise ValueError(
            f"form={form!r} takes {limits.described()}, and no segments; got d = {sizes[0]}, "
            f"chunk_size = {sizes[1]}, {dtype} and {packed}. Use form='dual'."
        )
    return form


def run(
    rows: Rows, scale: jax.Array, weights: Weights, norm: Norm, remat: int
) -> tuple[jax.Array, Weights]:
    """The layer in kernels."""
    given = (rows, scale, weights, norm)
    rows, scale, weights, norm = _varying.along(given, given)
    operand = _inputs.operand_of(rows)
    q, k, v = (leaf.astype(operand) for leaf in rows[:3])
    weight, bias = weights
    return ttt_linear.ttt_linear(
        q, k, v, rows.gate, scale, (weight, bias), norm, spacing=max(remat, 1)
    )

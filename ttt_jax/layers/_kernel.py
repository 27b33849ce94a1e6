"""Which calls of the TTT layers the kernels take, and those calls."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _varying
from ttt_jax.kernels import ttt_linear, ttt_mlp
from ttt_jax.kernels.ttt_linear import limits as linear_limits
from ttt_jax.kernels.ttt_mlp import limits as mlp_limits
from ttt_jax.layers import _inputs
from ttt_jax.layers._forms import Rows
from ttt_jax.layers._net import Norm, Weights


def form_of(
    form: str, rows: Rows, scale: jax.Array, others: tuple[Weights, Norm], segments: Any
) -> str:
    """``"primal"``, ``"dual"`` or ``"kernel"``.

    Raises:
      ValueError: an unknown form, or that of kernels for arrays that they do not take.
      NotImplementedError: that of kernels where they do not run.
    """
    _inputs.check_form(form)
    if form not in ("kernel", "auto"):
        return form
    weights = others[0]
    leaves = jax.tree.leaves((rows, scale, others))
    double = any(leaf.dtype == np.float64 for leaf in leaves)
    dtype = np.dtype(np.float64) if double else jnp.dtype(_inputs.operand_of(rows))
    # Of the network's hidden layer, where there is one.
    hidden = () if len(weights) == 2 else (weights[0].shape[1],)
    sizes = (rows.q.shape[1], *hidden, scale.shape[0], dtype)
    kernel, limits = (ttt_mlp, mlp_limits) if hidden else (ttt_linear, linear_limits)
    if form == "auto":
        plain = segments is None and not _varying.tracked()
        return "kernel" if plain and kernel.supported(*sizes) else "dual"
    if _varying.tracked():
        raise NotImplementedError(
            f"form={form!r} does not run in a shard_map that keeps track of what differs. Use "
            "form='dual', or shard_map(check_vma=False)."
        )
    if segments is not None or not kernel.fits(*sizes):
        packed = "no segments" if segments is None else "segments"
        width = f", a hidden width of {hidden[0]}" if hidden else ""
        raise ValueError(
            f"form={form!r} takes {limits.described()}, and no segments; got d = {sizes[0]}"
            f"{width}, chunk_size = {sizes[-2]}, {dtype} and {packed}. Use form='dual'."
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
    layer: Any = ttt_linear.ttt_linear if len(weights) == 2 else ttt_mlp.ttt_mlp
    made = layer(q, k, v, rows.gate, scale, weights, norm, spacing=max(remat, 1))
    return cast("tuple[jax.Array, Weights]", made)

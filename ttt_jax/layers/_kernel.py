"""Which calls of the TTT layers the kernels take, and those calls."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _varying
from ttt_jax.kernels import ttt_linear, ttt_mlp
from ttt_jax.kernels.ttt_linear import limits as linear_limits
from ttt_jax.kernels.ttt_mlp import limits as mlp_limits
from ttt_jax.layers import _inputs, _windows
from ttt_jax.layers._forms import Rows, TTTCache, fresh
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


class Start(NamedTuple):
    """Where tokens go on.

    Attributes:
      cache: what was learned before them.
      length: int32, how many of the tokens are real; None for all.
    """

    cache: TTTCache
    length: jax.Array | None


@jax.custom_batching.custom_vmap
def between_chunks(position: jax.Array) -> jax.Array:
    """Whether all caches that are mapped over stand between two chunks: one answer for all.

    With an answer for each, a condition would make both executions and choose among them.
    """
    return (position == 0).all()


@between_chunks.def_vmap
def _of_all(axis_size: int, is_mapped: Any, position: jax.Array) -> tuple[jax.Array, bool]:
    return between_chunks(position), False


def run_on(
    rows: Rows, scale: jax.Array, start: Start, norm: Norm, remat: int
) -> tuple[jax.Array, TTTCache]:
    """From a cache on: in kernels where it stands between two chunks, else in XLA.

    Returns:
      ``out [T, d]`` and the cache after the last real token.
    """

    def kernels(given: tuple[Rows, jax.Array, Start, Norm]) -> tuple[jax.Array, TTTCache]:
        return _whole_chunks(*given, remat)

    # Kept of it for a derivative are the arguments alone: kernels and XLA would keep both their
    # own, whichever of them runs.
    @jax.checkpoint
    def chunks(given: tuple[Rows, jax.Array, Start, Norm]) -> tuple[jax.Array, TTTCache]:
        rows, scale, (cache, length), norm = given
        return dual_on(rows, scale, cache, norm, length, remat)

    return cast(
        "tuple[jax.Array, TTTCache]",
        jax.lax.cond(
            between_chunks(start.cache.position), kernels, chunks, (rows, scale, start, norm)
        ),
    )


def dual_on(
    rows: Rows,
    scale: jax.Array,
    cache: TTTCache,
    norm: Norm,
    length: jax.Array | None,
    remat: int,
) -> tuple[jax.Array, TTTCache]:
    """The same in XLA, from anywhere in a chunk."""
    tokens = rows.gate.shape[0]
    due = jnp.int32(tokens) if length is None else length
    wide, shared, (held, due) = _inputs.widened(rows, scale, norm, cache, due)
    at = _windows.places(None, held.position, due, tokens, scale.shape[0])
    out, new = _windows.run(wide, held, shared._replace(remat=remat), at, None)
    return out.astype(shared.operand), new


def _whole_chunks(
    rows: Rows, scale: jax.Array, start: Start, norm: Norm, remat: int
) -> tuple[jax.Array, TTTCache]:
    """The chunks that are whole in kernels, and the rest, less than a chunk, in XLA."""
    chunk, tokens = scale.shape[0], rows.gate.shape[0]
    if start.length is None:
        out, last = run(rows, scale, start.cache.weights, norm, remat)
        cache, whole = fresh(last), tokens // chunk * chunk
        if whole < tokens:
            rest = jax.tree.map(lambda leaf: leaf[whole:], rows)
            out_rest, cache = dual_on(rest, scale, cache, norm, None, remat)
            out = jnp.concatenate([out[:whole], out_rest])
        return out, cache
    done = start.length // chunk * chunk
    # What comes after learns nothing, and has no values: a nan times 0 is a nan.
    learned = jnp.arange(tokens, dtype=jnp.int32) < done
    full = jax.tree.map(lambda leaf: _windows.where_rows(learned, leaf), rows)
    out, last = run(full, scale, start.cache.weights, norm, remat)

    def padded(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, [(0, chunk), *[(0, 0)] * (leaf.ndim - 1)])

    rest = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(padded(leaf), done, chunk), rows)
    out_rest, cache = dual_on(rest, scale, fresh(last), norm, start.length - done, remat)
    out = jax.lax.dynamic_update_slice_in_dim(padded(out), out_rest, done, axis=0)
    return out[:tokens], cache

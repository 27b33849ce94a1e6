"""The kernels of :mod:`ttt_jax.models.fused_conv` by patches, for few channels.

A patch of one map goes with a window of the other: outputs with the inputs that they read, or
inputs with the outputs that read them. A window's row is a run of contiguous values, so one load
and one product of a wider kernel do what the taps of that row do one by one in
:mod:`ttt_jax.models.fused_taps`: values are activated once for each row of a window, not for each
tap, and products have as many rows and columns as the matrix units want. The wider kernel is zero
where no tap leads from a place of the window to a place of the patch; its products with zeros are
the price.

Maps are ``[N, P * C]`` here; ``cells`` are patches.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ttt_jax.models import (
    fused_cuts as cuts,
    fused_norm as norm,
    fused_places as at,
    fused_tiles as tiles,
)
from ttt_jax.models.fused_activation import activated, rounded


def _repeated(ref: Any, count: int, *image: Any) -> jax.Array:
    """A vector of channels for each of ``count`` places, ``[count * C]``."""
    channels = ref.shape[-1]
    e = jax.lax.broadcasted_iota(jnp.int32, (count * channels,), 0)
    which = (*(jnp.broadcast_to(n, e.shape) for n in image), jax.lax.rem(e, jnp.int32(channels)))
    return plgpu.load(ref.at[which])


def _window(
    ref: Any, cell: Any, cut: cuts.Cut, size: tuple[int, int], channels: int, ahead: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The rows of windows and what is inside, each read ``ahead`` rows before its use."""

    def read(r: int) -> tuple[jax.Array, jax.Array]:
        run, inside = cuts.run(cell, r, cut, size, channels)
        return plgpu.load(ref.at[run], mask=inside, other=0), inside

    return at.early(cut.window[0], read, ahead)


def _product(a: jax.Array, b: jax.Array, over: int = 1) -> jax.Array:
    dimensions = (((over,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _forward_kernel(
    *refs: Any,
    cut: cuts.Cut,
    size: tuple[int, int],
    out: tuple[int, int],
    activate: bool,
    residual: bool,
    chunk: int,
    ahead: int,
    compiled: bool,
) -> None:
    x_ref, a_ref, b_ref, w_ref = refs[:4]
    y_ref, sums_ref = refs[4 + residual :]
    channels, outputs = a_ref.shape[-1], sums_ref.shape[-1]
    cell = cuts.positions(pl.program_id(1) * chunk, chunk, cut, out[1])
    a, b = (_repeated(ref, cut.window[1]) for ref in (a_ref, b_ref))
    here = cuts.patch(cell, cut, out[1], outputs)
    # Before the products, so that it arrives while they run.
    added = plgpu.load(refs[4].at[here]) if residual else None
    y = jnp.zeros((chunk, w_ref.shape[-1]), jnp.float32)
    for r, (x, inside) in enumerate(_window(x_ref, cell, cut, size, channels, ahead)):
        if activate:
            # Padding comes after the activation: it is zero, not relu(b).
            x = activated(x, a[None], b[None], inside, compiled)
        y += _product(x, w_ref[r])
    if added is not None:
        y += added.astype(jnp.float32)
    values = rounded(y, y_ref.dtype, compiled)
    plgpu.store(y_ref.at[here], values)
    y = values.astype(jnp.float32)
    for k, summed in enumerate((y, y * y)):
        # A patch's places first: one thread has several of them.
        by_place = summed.reshape(chunk, cut.places, outputs)
        sums_ref[k, :] = jnp.sum(jnp.sum(by_place, axis=1), axis=0)


def forward(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    w: jax.Array,
    residual: jax.Array | None,
    tile: tiles.ForwardPatches,
    *,
    height: int,
    width: int,
    stride: int,
    activate: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ttt_jax.models.fused_conv.forward` by patches in this tile."""
    (count, positions, channels), outputs = x.shape, w.shape[-1]
    cut, out = cuts.of_outputs(stride, tile.rows), (height // stride, width // stride)
    chunk = math.gcd(tile.cells, cut.cells(out))
    chunks = cut.cells(out) // chunk
    wide = cuts.widen(w, cut)
    inputs = [x.reshape(count, -1), a, b, wide]
    specs = [
        at.vector(positions * channels),
        at.vector(channels),
        at.vector(channels),
        at.whole(*wide.shape),
    ]
    result = (count, positions // stride**2 * outputs)
    if residual is not None:
        inputs.append(residual.reshape(result))
        specs.append(at.vector(result[1]))
    y, sums = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            cut=cut,
            size=(height, width),
            out=out,
            activate=activate,
            residual=residual is not None,
            chunk=chunk,
            ahead=tile.ahead,
            compiled=not interpret,
        ),
        grid=(count, chunks),
        in_specs=specs,
        out_specs=[
            at.vector(result[1]),
            pl.BlockSpec((None, None, 2, outputs), lambda n, k: (n, k, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(result, x.dtype),
            jax.ShapeDtypeStruct((count, chunks, 2, outputs), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="patches_forward",
    )(*inputs)
    return y.reshape(count, -1, outputs), sums.sum(axis=1)


def _input_gradient_kernel(
    *refs: Any,
    cut: cuts.Cut,
    size: tuple[int, int],
    out: tuple[int, int],
    groups: int,
    residual: bool,
    ahead: int,
) -> None:
    dy_ref, w_ref, x_ref, a_ref, b_ref, mean_ref, rstd_ref, gamma_ref = refs[:8]
    dx_ref, moments_ref = refs[8 + residual :]
    channels, outputs, wide = gamma_ref.shape[0], w_ref.shape[1] // cut.window[1], w_ref.shape[2]
    cell = cuts.positions(0, cut.cells(size), cut, size[1])
    here = cuts.patch(cell, cut, size[1], channels)
    dh = jnp.zeros((cut.cells(size), wide), jnp.float32)
    for r, (dy, _) in enumerate(_window(dy_ref, cell, cut, out, outputs, ahead)):
        dh += _product(dy, w_ref[r])
    a, b, mean, rstd, gamma = (
        _repeated(ref, cut.places) for ref in (a_ref, b_ref, mean_ref, rstd_ref, gamma_ref)
    )
    x = plgpu.load(x_ref.at[here]).astype(jnp.float32)
    du = jnp.where(a[None] * x + b[None] > 0, dh, 0.0)
    normal = (x - mean[None]) * rstd[None]
    dgamma, dbeta = jnp.sum(du * normal, axis=0), jnp.sum(du, axis=0)
    moments_ref[0, :] = dgamma
    moments_ref[1, :] = dbeta
    whole = size[0] * size[1]
    first, second = norm.means((dgamma, dbeta), gamma, channels, groups, whole)
    dx = rstd[None] * (du * gamma[None] - first[None] - normal * second[None])
    if residual:
        dx += plgpu.load(refs[8].at[here]).astype(jnp.float32)
    plgpu.store(dx_ref.at[here], dx.astype(dx_ref.dtype))


def input_gradient(
    dy: jax.Array,
    w: jax.Array,
    x: jax.Array,
    affine: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    gamma: jax.Array,
    residual: jax.Array | None,
    tile: tiles.InputPatches,
    *,
    height: int,
    width: int,
    stride: int,
    groups: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ttt_jax.models.fused_conv.input_gradient` by patches in this tile."""
    (count, positions, channels), outputs = x.shape, dy.shape[-1]
    cut = cuts.of_inputs(stride, tile.rows)
    turned = cuts.widen(w.swapaxes(1, 2), cut)
    flat, wide = positions * channels, cut.places * channels
    inputs = [dy.reshape(count, -1), turned, x.reshape(count, -1), *affine, gamma]
    specs = [at.vector(dy.shape[1] * outputs), at.whole(*turned.shape), at.vector(flat)]
    specs += [at.vector(channels)] * 4 + [at.whole(channels)]
    if residual is not None:
        inputs.append(residual.reshape(count, -1))
        specs.append(at.vector(flat))
    dx, moments = pl.pallas_call(
        functools.partial(
            _input_gradient_kernel,
            cut=cut,
            size=(height, width),
            out=(height // stride, width // stride),
            groups=groups,
            residual=residual is not None,
            ahead=tile.ahead,
        ),
        grid=(count,),
        in_specs=specs,
        out_specs=[at.vector(flat), pl.BlockSpec((None, 2, wide), lambda n: (n, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((count, flat), x.dtype),
            jax.ShapeDtypeStruct((count, 2, wide), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="patches_input_gradient",
    )(*inputs)
    return dx.reshape(x.shape), moments.reshape(count, 2, cut.places, channels).sum(axis=2)


def _weight_gradient_kernel(
    x_ref: Any,
    a_ref: Any,
    b_ref: Any,
    dy_ref: Any,
    dw_ref: Any,
    *,
    cut: cuts.Cut,
    size: tuple[int, int],
    out: tuple[int, int],
    activate: bool,
    chunk: int,
    compiled: bool,
) -> None:
    channels, outputs = a_ref.shape[-1], dw_ref.shape[-1] // cut.window[1]
    flat, out_flat = size[0] * size[1] * channels, out[0] * out[1] * outputs
    chunks = jnp.int32(cut.cells(size) // chunk)

    def accumulate(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step = jnp.int32(step)
        n, start = jax.lax.div(step, chunks), jax.lax.rem(step, chunks) * chunk
        cell = cuts.positions(start, chunk, cut, size[1])
        # Patches of inputs, so that each is activated once.
        x = plgpu.load(x_ref.at[n * flat + cuts.patch(cell, cut, size[1], channels)])
        if activate:
            a, b = (_repeated(ref, cut.places, n) for ref in (a_ref, b_ref))
            x = activated(x, a[None], b[None], None, compiled)
        results = []
        for k, total in enumerate(sums):
            run, inside = cuts.run(cell, k, cut, out, outputs)
            dy = plgpu.load(dy_ref.at[n * out_flat + run], mask=inside, other=0)
            results.append(total + _product(x, dy, over=0))
        return tuple(results)

    zeros = tuple(jnp.zeros(dw_ref.shape[1:], jnp.float32) for _ in range(cut.window[0]))
    steps = x_ref.shape[0] // flat * (cut.cells(size) // chunk)
    for k, total in enumerate(jax.lax.fori_loop(0, steps, accumulate, zeros)):
        dw_ref[k] = total


def weight_gradient(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dy: jax.Array,
    tile: tiles.WeightPatches,
    *,
    height: int,
    width: int,
    stride: int,
    activate: bool,
    interpret: bool,
) -> jax.Array:
    """:func:`ttt_jax.models.fused_conv.weight_gradient` by patches in this tile."""
    (count, positions, channels), outputs = x.shape, dy.shape[-1]
    cut, size = cuts.of_inputs(stride, tile.rows), (height, width)
    each = tiles.images_per_program(tile.images, count, 1)
    parts = count // each
    shape = (cut.window[0], cut.places * channels, cut.window[1] * outputs)
    partial = pl.pallas_call(
        functools.partial(
            _weight_gradient_kernel,
            cut=cut,
            size=size,
            out=(height // stride, width // stride),
            activate=activate,
            chunk=math.gcd(tile.cells, cut.cells(size)),
            compiled=not interpret,
        ),
        grid=(parts,),
        in_specs=[
            pl.BlockSpec((each * positions * channels,), lambda g: (g,)),
            pl.BlockSpec((each, channels), lambda g: (g, 0)),
            pl.BlockSpec((each, channels), lambda g: (g, 0)),
            pl.BlockSpec((each * dy.shape[1] * outputs,), lambda g: (g,)),
        ],
        out_specs=pl.BlockSpec((None, *shape), lambda g: (g, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((parts, *shape), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="patches_weight_gradient",
    )(x.reshape(-1), a, b, dy.reshape(-1))
    return cuts.narrow(partial.sum(axis=0), cut)

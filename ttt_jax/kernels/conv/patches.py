"""The kernels of :mod:`ttt_jax.kernels.conv.passes` by patches, for few channels.

A patch of one map goes with a window of the other: outputs with the inputs that they read, or
inputs with the outputs that read them. A window's row is a run of contiguous values, so one load
and one product of a wider kernel do what the taps of that row do one by one in
:mod:`ttt_jax.kernels.conv.taps`: values are activated once for each row of a window, not for each
tap, and products have as many rows and columns as the matrix units want. The wider kernel is zero
where no tap leads from a position of the window to one of the patch; its products with zeros are
the price.

Maps are ``[N, P * C]`` in these kernels; ``cells`` are patches.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ttt_jax.kernels.conv import index, patching, tiles
from ttt_jax.kernels.conv.activation import affine_relu, round_to
from ttt_jax.kernels.conv.convolution import Affine, Convolution
from ttt_jax.kernels.conv.groupnorm import gradient_means
from ttt_jax.kernels.conv.index import full_block, vector_block


def _repeated(ref: Any, count: int, *image: Any) -> jax.Array:
    """A vector of channels for each of ``count`` positions, ``[count * C]``."""
    channels = ref.shape[-1]
    e = jax.lax.broadcasted_iota(jnp.int32, (count * channels,), 0)
    entries = (*(jnp.broadcast_to(n, e.shape) for n in image), jax.lax.rem(e, jnp.int32(channels)))
    return plgpu.load(ref.at[entries])


def _window(
    ref: Any, cell: Any, cut: patching.Cut, size: tuple[int, int], channels: int, ahead: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The rows of windows and what is inside, each read ``ahead`` rows before its use."""

    def read(r: int) -> tuple[jax.Array, jax.Array]:
        offsets, inside = patching.window_row(cell, r, cut, size, channels)
        return plgpu.load(ref.at[offsets], mask=inside, other=0), inside

    return index.prefetch(cut.window[0], read, ahead)


def _product(a: jax.Array, b: jax.Array, over: int = 1) -> jax.Array:
    dimensions = (((over,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _forward_kernel(
    *refs: Any, conv: Convolution, cut: patching.Cut, residual: bool, chunk: int, ahead: int
) -> None:
    x_ref, a_ref, b_ref, w_ref = refs[:4]
    y_ref, sums_ref = refs[4 + residual :]
    channels, outputs = a_ref.shape[-1], sums_ref.shape[-1]
    cell = patching.patch_index(pl.program_id(1) * chunk, chunk, cut, conv.out_size[1])
    a, b = (_repeated(ref, cut.window[1]) for ref in (a_ref, b_ref))
    offsets = patching.patch_offsets(cell, cut, conv.out_size[1], outputs)
    # Before the products, so that it arrives while they run.
    added = plgpu.load(refs[4].at[offsets]) if residual else None
    y = jnp.zeros((chunk, w_ref.shape[-1]), jnp.float32)
    for r, (x, inside) in enumerate(_window(x_ref, cell, cut, conv.size, channels, ahead)):
        if conv.activate:
            # Padding comes after the activation: it is zero, not relu(b).
            x = affine_relu(x, a[None], b[None], inside, conv.compiled)
        y += _product(x, w_ref[r])
    if added is not None:
        y += added.astype(jnp.float32)
    values = round_to(y, y_ref.dtype, conv.compiled)
    plgpu.store(y_ref.at[offsets], values)
    y = values.astype(jnp.float32)
    for k, summed in enumerate((y, y * y)):
        # A patch's positions first: one thread has several of them.
        by_position = summed.reshape(chunk, cut.area, outputs)
        sums_ref[k, :] = jnp.sum(jnp.sum(by_position, axis=1), axis=0)


def forward(
    conv: Convolution,
    tile: tiles.ForwardPatches,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    w: jax.Array,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ttt_jax.kernels.conv.passes.forward` by patches in this tile."""
    (count, positions, channels), outputs = x.shape, w.shape[-1]
    cut = patching.output_patches(conv.stride, tile.rows)
    cells = cut.cells(conv.out_size)
    chunk = math.gcd(tile.cells, cells)
    chunks = cells // chunk
    wide = patching.widen(w, cut)
    inputs = [x.reshape(count, -1), a, b, wide]
    specs = [
        vector_block(positions * channels),
        vector_block(channels),
        vector_block(channels),
        full_block(*wide.shape),
    ]
    result = (count, conv.out_positions * outputs)
    if residual is not None:
        inputs.append(residual.reshape(result))
        specs.append(vector_block(result[1]))
    y, sums = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            conv=conv,
            cut=cut,
            residual=residual is not None,
            chunk=chunk,
            ahead=tile.ahead,
        ),
        grid=(count, chunks),
        in_specs=specs,
        out_specs=[
            vector_block(result[1]),
            pl.BlockSpec((None, None, 2, outputs), lambda n, k: (n, k, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(result, x.dtype),
            jax.ShapeDtypeStruct((count, chunks, 2, outputs), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=conv.interpret,
        name="patches_forward",
    )(*inputs)
    return y.reshape(count, -1, outputs), sums.sum(axis=1)


def _input_gradient_kernel(
    *refs: Any, conv: Convolution, cut: patching.Cut, residual: bool, ahead: int
) -> None:
    dy_ref, w_ref, x_ref, a_ref, b_ref, mean_ref, rstd_ref, gamma_ref = refs[:8]
    dx_ref, moments_ref = refs[8 + residual :]
    channels, outputs, wide = gamma_ref.shape[0], w_ref.shape[1] // cut.window[1], w_ref.shape[2]
    cells = cut.cells(conv.size)
    cell = patching.patch_index(0, cells, cut, conv.width)
    offsets = patching.patch_offsets(cell, cut, conv.width, channels)
    dh = jnp.zeros((cells, wide), jnp.float32)
    for r, (dy, _) in enumerate(_window(dy_ref, cell, cut, conv.out_size, outputs, ahead)):
        dh += _product(dy, w_ref[r])
    a, b, mean, rstd, gamma = (
        _repeated(ref, cut.area) for ref in (a_ref, b_ref, mean_ref, rstd_ref, gamma_ref)
    )
    x = plgpu.load(x_ref.at[offsets]).astype(jnp.float32)
    du = jnp.where(a[None] * x + b[None] > 0, dh, 0.0)
    normal = (x - mean[None]) * rstd[None]
    dgamma, dbeta = jnp.sum(du * normal, axis=0), jnp.sum(du, axis=0)
    moments_ref[0, :] = dgamma
    moments_ref[1, :] = dbeta
    first, second = gradient_means((dgamma, dbeta), gamma, channels, conv.groups, conv.positions)
    dx = rstd[None] * (du * gamma[None] - first[None] - normal * second[None])
    if residual:
        dx += plgpu.load(refs[8].at[offsets]).astype(jnp.float32)
    plgpu.store(dx_ref.at[offsets], dx.astype(dx_ref.dtype))


def input_gradient(
    conv: Convolution,
    tile: tiles.InputPatches,
    dy: jax.Array,
    w: jax.Array,
    x: jax.Array,
    affine: Affine,
    gamma: jax.Array,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ttt_jax.kernels.conv.passes.input_gradient` by patches in this tile."""
    (count, positions, channels), outputs = x.shape, dy.shape[-1]
    cut = patching.input_patches(conv.stride, tile.rows)
    turned = patching.widen(w.swapaxes(1, 2), cut)
    flat, wide = positions * channels, cut.area * channels
    inputs = [dy.reshape(count, -1), turned, x.reshape(count, -1), *affine, gamma]
    specs = [vector_block(dy.shape[1] * outputs), full_block(*turned.shape), vector_block(flat)]
    specs += [vector_block(channels)] * 4 + [full_block(channels)]
    if residual is not None:
        inputs.append(residual.reshape(count, -1))
        specs.append(vector_block(flat))
    dx, moments = pl.pallas_call(
        functools.partial(
            _input_gradient_kernel,
            conv=conv,
            cut=cut,
            residual=residual is not None,
            ahead=tile.ahead,
        ),
        grid=(count,),
        in_specs=specs,
        out_specs=[vector_block(flat), pl.BlockSpec((None, 2, wide), lambda n: (n, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((count, flat), x.dtype),
            jax.ShapeDtypeStruct((count, 2, wide), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=conv.interpret,
        name="patches_input_gradient",
    )(*inputs)
    return dx.reshape(x.shape), moments.reshape(count, 2, cut.area, channels).sum(axis=2)


def _weight_gradient_kernel(
    x_ref: Any,
    a_ref: Any,
    b_ref: Any,
    dy_ref: Any,
    dw_ref: Any,
    *,
    conv: Convolution,
    cut: patching.Cut,
    chunk: int,
) -> None:
    channels, outputs = a_ref.shape[-1], dw_ref.shape[-1] // cut.window[1]
    flat, out_flat = conv.positions * channels, conv.out_positions * outputs
    chunks = jnp.int32(cut.cells(conv.size) // chunk)

    def accumulate(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step = jnp.int32(step)
        n, start = jax.lax.div(step, chunks), jax.lax.rem(step, chunks) * chunk
        cell = patching.patch_index(start, chunk, cut, conv.width)
        # Patches of inputs, so that each is activated once.
        x = plgpu.load(x_ref.at[n * flat + patching.patch_offsets(cell, cut, conv.width, channels)])
        if conv.activate:
            a, b = (_repeated(ref, cut.area, n) for ref in (a_ref, b_ref))
            x = affine_relu(x, a[None], b[None], None, conv.compiled)
        results = []
        for k, total in enumerate(sums):
            offsets, inside = patching.window_row(cell, k, cut, conv.out_size, outputs)
            dy = plgpu.load(dy_ref.at[n * out_flat + offsets], mask=inside, other=0)
            results.append(total + _product(x, dy, over=0))
        return tuple(results)

    zeros = tuple(jnp.zeros(dw_ref.shape[1:], jnp.float32) for _ in range(cut.window[0]))
    steps = x_ref.shape[0] // flat * (cut.cells(conv.size) // chunk)
    for k, total in enumerate(jax.lax.fori_loop(0, steps, accumulate, zeros)):
        dw_ref[k] = total


def weight_gradient(
    conv: Convolution,
    tile: tiles.WeightPatches,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dy: jax.Array,
) -> jax.Array:
    """:func:`ttt_jax.kernels.conv.passes.weight_gradient` by patches in this tile."""
    (count, positions, channels), outputs = x.shape, dy.shape[-1]
    cut = patching.input_patches(conv.stride, tile.rows)
    images = tiles.images_per_program(tile.images, count, 1)
    parts = count // images
    shape = (cut.window[0], cut.area * channels, cut.window[1] * outputs)
    partial = pl.pallas_call(
        functools.partial(
            _weight_gradient_kernel,
            conv=conv,
            cut=cut,
            chunk=math.gcd(tile.cells, cut.cells(conv.size)),
        ),
        grid=(parts,),
        in_specs=[
            pl.BlockSpec((images * positions * channels,), lambda g: (g,)),
            pl.BlockSpec((images, channels), lambda g: (g, 0)),
            pl.BlockSpec((images, channels), lambda g: (g, 0)),
            pl.BlockSpec((images * dy.shape[1] * outputs,), lambda g: (g,)),
        ],
        out_specs=pl.BlockSpec((None, *shape), lambda g: (g, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((parts, *shape), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=conv.interpret,
        name="patches_weight_gradient",
    )(x.reshape(-1), a, b, dy.reshape(-1))
    return patching.narrow(partial.sum(axis=0), cut)

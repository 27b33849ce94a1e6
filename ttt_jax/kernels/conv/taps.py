"""The kernels of :mod:`ttt_jax.kernels.conv.passes` tap by tap: nine gathers and nine products."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ttt_jax.kernels.conv import index, tiles
from ttt_jax.kernels.conv.activation import affine_relu, round_to
from ttt_jax.kernels.conv.convolution import Affine, Convolution
from ttt_jax.kernels.conv.groupnorm import gradient_means
from ttt_jax.kernels.conv.index import full_block, image_block, vector_block


def _forward_kernel(*refs: Any, conv: Convolution, residual: bool, chunk: int, ahead: int) -> None:
    x_ref, a_ref, b_ref, w_ref = refs[:4]
    y_ref, sums_ref = refs[4 + residual :]
    start = pl.program_id(1) * chunk
    positions = start + jax.lax.broadcasted_iota(jnp.int32, (chunk,), 0)
    i, j = index.row_column(positions, conv.out_size[1])
    a, b = a_ref[...][None], b_ref[...][None]
    y = jnp.zeros((chunk, w_ref.shape[-1]), jnp.float32)

    def read(tap: int) -> tuple[jax.Array, jax.Array]:
        r, c = i * conv.stride + (tap // 3 - 1), j * conv.stride + (tap % 3 - 1)
        inside = (r >= 0) & (r < conv.height) & (c >= 0) & (c < conv.width)
        return index.gather(x_ref, r, c, inside, conv.width)

    for tap, (x, mask) in enumerate(index.prefetch(tiles.TAPS, read, ahead)):
        if conv.activate:
            # Padding comes after the activation: it is zero, not relu(b).
            x = affine_relu(x, a, b, mask, conv.compiled)
        y += jnp.dot(x, w_ref[tap], preferred_element_type=jnp.float32)
    rows = pl.ds(start, chunk)
    if residual:
        y += refs[4][rows, :].astype(jnp.float32)
    values = round_to(y, y_ref.dtype, conv.compiled)
    y_ref[rows, :] = values
    y = values.astype(jnp.float32)
    sums_ref[0, :] = jnp.sum(y, axis=0)
    sums_ref[1, :] = jnp.sum(y * y, axis=0)


def forward(
    conv: Convolution,
    tile: tiles.ForwardTaps,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    w: jax.Array,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ttt_jax.kernels.conv.passes.forward` by taps in this tile."""
    count, positions, channels = x.shape
    outputs, out_positions = w.shape[-1], conv.out_positions
    chunk = math.gcd(tile.positions, out_positions)
    chunks = out_positions // chunk
    inputs, specs = [x, a, b, w], [image_block(positions, channels)] + [vector_block(channels)] * 2
    specs.append(full_block(tiles.TAPS, channels, outputs))
    if residual is not None:
        inputs.append(residual)
        specs.append(image_block(out_positions, outputs))
    y, sums = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            conv=conv,
            residual=residual is not None,
            chunk=chunk,
            ahead=tile.ahead,
        ),
        grid=(count, chunks),
        in_specs=specs,
        out_specs=[
            image_block(out_positions, outputs),
            pl.BlockSpec((None, None, 2, outputs), lambda n, k: (n, k, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((count, out_positions, outputs), x.dtype),
            jax.ShapeDtypeStruct((count, chunks, 2, outputs), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=conv.interpret,
        name="taps_forward",
    )(*inputs)
    return y, sums.sum(axis=1)


def _input_gradient_kernel(*refs: Any, conv: Convolution, residual: bool) -> None:
    dy_ref, w_ref, x_ref, a_ref, b_ref, mean_ref, rstd_ref, gamma_ref = refs[:8]
    dx_ref, moments_ref = refs[8 + residual :]
    channels, stride, out = w_ref.shape[1], conv.stride, conv.out_size
    i, j = index.row_column(jax.lax.broadcasted_iota(jnp.int32, (conv.out_positions,), 0), out[1])
    a, b, mean, rstd = (ref[...][None] for ref in (a_ref, b_ref, mean_ref, rstd_ref))
    gamma = gamma_ref[...]
    everywhere = i >= 0

    def phase(ref: Any, down: int, right: int) -> jax.Array:
        """Every ``stride``-th position of a map, from that row and column on."""
        if stride == 1:
            return ref[...]
        rows, columns = i * stride + down, j * stride + right
        return index.gather(ref, rows, columns, everywhere, conv.width)[0]

    # With a stride, inputs of one phase are read through the same taps, at most four of nine.
    parts = []
    dgamma, dbeta = jnp.zeros((channels,), jnp.float32), jnp.zeros((channels,), jnp.float32)
    for down in range(stride):
        for right in range(stride):
            dh = jnp.zeros((conv.out_positions, channels), jnp.float32)
            for tap, below, beside in _leading_taps(down, right, stride):
                r, c = i + below, j + beside
                inside = (r >= 0) & (c >= 0) & (r < out[0]) & (c < out[1])
                dy, _ = index.gather(dy_ref, r, c, inside, out[1])
                w = w_ref[tap]
                contract = (((1,), (1,)), ((), ()))
                dh += jax.lax.dot_general(dy, w, contract, preferred_element_type=jnp.float32)
            x = phase(x_ref, down, right).astype(jnp.float32)
            du = jnp.where(a * x + b > 0, dh, 0.0)
            normal = (x - mean) * rstd
            dgamma += jnp.sum(du * normal, axis=0)
            dbeta += jnp.sum(du, axis=0)
            parts.append((down, right, du, normal))
    moments_ref[0, :] = dgamma
    moments_ref[1, :] = dbeta
    first, second = gradient_means((dgamma, dbeta), gamma, channels, conv.groups, conv.positions)
    for down, right, du, normal in parts:
        dx = rstd * (du * gamma[None] - first[None] - normal * second[None])
        if residual:
            dx += phase(refs[8], down, right).astype(jnp.float32)
        if stride == 1:
            dx_ref[...] = dx.astype(dx_ref.dtype)
        else:
            positions = (i * stride + down) * conv.width + j * stride + right
            entries = index.channel_index(positions, channels)
            plgpu.store(dx_ref.at[entries], dx.astype(dx_ref.dtype))


def _leading_taps(down: int, right: int, stride: int) -> list[tuple[int, int, int]]:
    """The taps that read inputs of a phase, each with the output's row and column in the phase."""
    return [
        (tap, (down - tap // 3 + 1) // stride, (right - tap % 3 + 1) // stride)
        for tap in range(tiles.TAPS)
        if (down - tap // 3 + 1) % stride == (right - tap % 3 + 1) % stride == 0
    ]


def input_gradient(
    conv: Convolution,
    tile: tiles.InputTaps,
    dy: jax.Array,
    w: jax.Array,
    x: jax.Array,
    affine: Affine,
    gamma: jax.Array,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ttt_jax.kernels.conv.passes.input_gradient` by taps in this tile."""
    count, positions, channels = x.shape
    outputs = dy.shape[-1]
    inputs = [dy, w, x, *affine, gamma]
    specs = [
        image_block(dy.shape[1], outputs),
        full_block(tiles.TAPS, channels, outputs),
        image_block(positions, channels),
    ]
    specs += [vector_block(channels)] * 4 + [full_block(channels)]
    if residual is not None:
        inputs.append(residual)
        specs.append(image_block(positions, channels))
    return pl.pallas_call(
        functools.partial(
            _input_gradient_kernel,
            conv=conv,
            residual=residual is not None,
        ),
        grid=(count,),
        in_specs=specs,
        out_specs=[image_block(positions, channels), image_block(2, channels)],
        out_shape=[
            jax.ShapeDtypeStruct((count, positions, channels), x.dtype),
            jax.ShapeDtypeStruct((count, 2, channels), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=conv.interpret,
        name="taps_input_gradient",
    )(*inputs)


def _weight_gradient_kernel(
    x_ref: Any,
    a_ref: Any,
    b_ref: Any,
    dy_ref: Any,
    dw_ref: Any,
    *,
    conv: Convolution,
    taps: int,
    chunk: int,
) -> None:
    channels, outputs = x_ref.shape[-1], dy_ref.shape[-1]
    stride, out, out_positions = conv.stride, conv.out_size, conv.out_positions
    first = jax.lax.rem(pl.program_id(0), jnp.int32(tiles.TAPS // taps)) * taps
    # Both maps have this many positions with stride 1, and then the input is read as it lies, so
    # that it is activated once and not once per tap. Otherwise the output, which is smaller, is.
    chunks = jnp.int32(out_positions // chunk)

    def activated(x: jax.Array, n: jax.Array, inside: jax.Array | None) -> jax.Array:
        if not conv.activate:
            return x
        return affine_relu(x, a_ref[n, :][None], b_ref[n, :][None], inside, conv.compiled)

    def accumulate(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step = jnp.int32(step)
        n, start = jax.lax.div(step, chunks), jax.lax.rem(step, chunks) * chunk
        positions = start + jax.lax.broadcasted_iota(jnp.int32, (chunk,), 0)
        i, j = index.row_column(positions, out[1])
        rows = pl.ds(n * out_positions + start, chunk)
        if stride == 1:
            x = activated(x_ref[rows, :], n, None)
        else:
            dy = dy_ref[rows, :]
        results = []
        for k, total in enumerate(sums):
            if stride == 1:
                r, c, inside = index.outputs_reading(i, j, first + k, *out)
                dy, _ = index.gather(dy_ref, r, c, inside, out[1], n * out_positions)
            else:
                down, right = index.tap_offset(first + k)
                r, c = i * stride + down, j * stride + right
                inside = (r >= 0) & (c >= 0) & (r < conv.height) & (c < conv.width)
                x, mask = index.gather(x_ref, r, c, inside, conv.width, n * conv.positions)
                x = activated(x, n, mask)
            contract = (((0,), (0,)), ((), ()))
            product = jax.lax.dot_general(x, dy, contract, preferred_element_type=jnp.float32)
            results.append(total + product)
        return tuple(results)

    zeros = tuple(jnp.zeros((channels, outputs), jnp.float32) for _ in range(taps))
    steps = x_ref.shape[0] // conv.positions * (out_positions // chunk)
    for k, total in enumerate(jax.lax.fori_loop(0, steps, accumulate, zeros)):
        dw_ref[k] = total


def weight_gradient(
    conv: Convolution,
    tile: tiles.WeightTaps,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dy: jax.Array,
) -> jax.Array:
    """:func:`ttt_jax.kernels.conv.passes.weight_gradient` by taps in this tile."""
    count, positions, channels = x.shape
    out_positions, outputs = dy.shape[1:]
    taps, chunk = tile.taps, math.gcd(tile.positions, out_positions)
    shares = tiles.TAPS // taps
    images = tiles.images_per_program(tile.images, count, shares)
    parts = count // images
    partial = pl.pallas_call(
        functools.partial(_weight_gradient_kernel, conv=conv, taps=taps, chunk=chunk),
        grid=(parts * shares,),
        in_specs=[
            pl.BlockSpec((images * positions, channels), lambda g: (g // shares, 0)),
            pl.BlockSpec((images, channels), lambda g: (g // shares, 0)),
            pl.BlockSpec((images, channels), lambda g: (g // shares, 0)),
            pl.BlockSpec((images * out_positions, outputs), lambda g: (g // shares, 0)),
        ],
        out_specs=pl.BlockSpec(
            (None, taps, channels, outputs), lambda g: (g // shares, g % shares, 0, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((parts, tiles.TAPS, channels, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=conv.interpret,
        name="taps_weight_gradient",
    )(x.reshape(count * positions, channels), a, b, dy.reshape(count * out_positions, outputs))
    return partial.sum(axis=0)

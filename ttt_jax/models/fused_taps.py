"""The kernels of :mod:`ttt_jax.models.fused_conv` tap by tap: nine gathers and nine products."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ttt_jax.models import fused_norm as norm, fused_places as at, fused_tiles as tiles
from ttt_jax.models.fused_activation import activated, rounded


def _forward_kernel(
    *refs: Any,
    height: int,
    width: int,
    stride: int,
    activate: bool,
    residual: bool,
    chunk: int,
    ahead: int,
    compiled: bool,
) -> None:
    x_ref, a_ref, b_ref, w_ref = refs[:4]
    y_ref, sums_ref = refs[4 + residual :]
    start = pl.program_id(1) * chunk
    i, j = at.places(start + jax.lax.broadcasted_iota(jnp.int32, (chunk,), 0), width // stride)
    a, b = a_ref[...][None], b_ref[...][None]
    y = jnp.zeros((chunk, w_ref.shape[-1]), jnp.float32)

    def read(tap: int) -> tuple[jax.Array, jax.Array]:
        r, c = i * stride + (tap // 3 - 1), j * stride + (tap % 3 - 1)
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        return at.gather(x_ref, r, c, inside, width)

    for tap, (x, mask) in enumerate(at.early(tiles.TAPS, read, ahead)):
        if activate:
            # Padding comes after the activation: it is zero, not relu(b).
            x = activated(x, a, b, mask, compiled)
        y += jnp.dot(x, w_ref[tap], preferred_element_type=jnp.float32)
    here = pl.ds(start, chunk)
    if residual:
        y += refs[4][here, :].astype(jnp.float32)
    values = rounded(y, y_ref.dtype, compiled)
    y_ref[here, :] = values
    y = values.astype(jnp.float32)
    sums_ref[0, :] = jnp.sum(y, axis=0)
    sums_ref[1, :] = jnp.sum(y * y, axis=0)


def forward(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    w: jax.Array,
    residual: jax.Array | None,
    tile: tiles.ForwardTaps,
    *,
    height: int,
    width: int,
    stride: int,
    activate: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ttt_jax.models.fused_conv.forward` by taps in this tile."""
    count, positions, channels = x.shape
    outputs, out_positions = w.shape[-1], positions // stride**2
    chunk = math.gcd(tile.positions, out_positions)
    chunks = out_positions // chunk
    inputs, specs = [x, a, b, w], [at.image(positions, channels)] + [at.vector(channels)] * 2
    specs.append(at.whole(tiles.TAPS, channels, outputs))
    if residual is not None:
        inputs.append(residual)
        specs.append(at.image(out_positions, outputs))
    y, sums = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            height=height,
            width=width,
            stride=stride,
            activate=activate,
            residual=residual is not None,
            chunk=chunk,
            ahead=tile.ahead,
            compiled=not interpret,
        ),
        grid=(count, chunks),
        in_specs=specs,
        out_specs=[
            at.image(out_positions, outputs),
            pl.BlockSpec((None, None, 2, outputs), lambda n, k: (n, k, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((count, out_positions, outputs), x.dtype),
            jax.ShapeDtypeStruct((count, chunks, 2, outputs), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="taps_forward",
    )(*inputs)
    return y, sums.sum(axis=1)


def _input_gradient_kernel(
    *refs: Any,
    height: int,
    width: int,
    stride: int,
    groups: int,
    residual: bool,
) -> None:
    dy_ref, w_ref, x_ref, a_ref, b_ref, mean_ref, rstd_ref, gamma_ref = refs[:8]
    dx_ref, moments_ref = refs[8 + residual :]
    channels, out = w_ref.shape[1], (height // stride, width // stride)
    i, j = at.places(jax.lax.broadcasted_iota(jnp.int32, (out[0] * out[1],), 0), out[1])
    a, b, mean, rstd = (ref[...][None] for ref in (a_ref, b_ref, mean_ref, rstd_ref))
    gamma = gamma_ref[...]
    everywhere = i >= 0

    def phase(ref: Any, down: int, right: int) -> jax.Array:
        """Every ``stride``-th place of a map, from that row and column on."""
        if stride == 1:
            return ref[...]
        return at.gather(ref, i * stride + down, j * stride + right, everywhere, width)[0]

    # With a stride, inputs of one phase are read through the same taps, at most four of nine.
    parts = []
    dgamma, dbeta = jnp.zeros((channels,), jnp.float32), jnp.zeros((channels,), jnp.float32)
    for down in range(stride):
        for right in range(stride):
            dh = jnp.zeros((out[0] * out[1], channels), jnp.float32)
            leading = [
                (tap, (down - tap // 3 + 1) // stride, (right - tap % 3 + 1) // stride)
                for tap in range(tiles.TAPS)
                if (down - tap // 3 + 1) % stride == (right - tap % 3 + 1) % stride == 0
            ]

            for tap, below, beside in leading:
                r, c = i + below, j + beside
                inside = (r >= 0) & (c >= 0) & (r < out[0]) & (c < out[1])
                dy, _ = at.gather(dy_ref, r, c, inside, out[1])
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
    first, second = norm.means((dgamma, dbeta), gamma, channels, groups, height * width)
    for down, right, du, normal in parts:
        dx = rstd * (du * gamma[None] - first[None] - normal * second[None])
        if residual:
            dx += phase(refs[8], down, right).astype(jnp.float32)
        if stride == 1:
            dx_ref[...] = dx.astype(dx_ref.dtype)
        else:
            places = (i * stride + down) * width + j * stride + right
            plgpu.store(dx_ref.at[at.indices(places, channels)], dx.astype(dx_ref.dtype))


def input_gradient(
    dy: jax.Array,
    w: jax.Array,
    x: jax.Array,
    affine: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    gamma: jax.Array,
    residual: jax.Array | None,
    tile: tiles.InputTaps,
    *,
    height: int,
    width: int,
    stride: int,
    groups: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ttt_jax.models.fused_conv.input_gradient` by taps in this tile."""
    count, positions, channels = x.shape
    outputs = dy.shape[-1]
    inputs = [dy, w, x, *affine, gamma]
    specs = [
        at.image(dy.shape[1], outputs),
        at.whole(tiles.TAPS, channels, outputs),
        at.image(positions, channels),
    ]
    specs += [at.vector(channels)] * 4 + [at.whole(channels)]
    if residual is not None:
        inputs.append(residual)
        specs.append(at.image(positions, channels))
    return pl.pallas_call(
        functools.partial(
            _input_gradient_kernel,
            height=height,
            width=width,
            stride=stride,
            groups=groups,
            residual=residual is not None,
        ),
        grid=(count,),
        in_specs=specs,
        out_specs=[at.image(positions, channels), at.image(2, channels)],
        out_shape=[
            jax.ShapeDtypeStruct((count, positions, channels), x.dtype),
            jax.ShapeDtypeStruct((count, 2, channels), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="taps_input_gradient",
    )(*inputs)


def _weight_gradient_kernel(
    x_ref: Any,
    a_ref: Any,
    b_ref: Any,
    dy_ref: Any,
    dw_ref: Any,
    *,
    height: int,
    width: int,
    stride: int,
    activate: bool,
    taps: int,
    chunk: int,
    compiled: bool,
) -> None:
    channels, outputs = x_ref.shape[-1], dy_ref.shape[-1]
    out = (height // stride, width // stride)
    positions, out_positions = height * width, out[0] * out[1]
    first = jax.lax.rem(pl.program_id(0), jnp.int32(tiles.TAPS // taps)) * taps
    # Both maps have this many places with stride 1, and then the input is read as it lies, so that
    # it is activated once and not once per tap. Otherwise the output, which is smaller, is.
    chunks = jnp.int32(out_positions // chunk)

    def accumulate(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step = jnp.int32(step)
        n, start = jax.lax.div(step, chunks), jax.lax.rem(step, chunks) * chunk
        i, j = at.places(start + jax.lax.broadcasted_iota(jnp.int32, (chunk,), 0), out[1])
        here = pl.ds(n * out_positions + start, chunk)
        if stride == 1:
            x = x_ref[here, :]
            if activate:
                x = activated(x, a_ref[n, :][None], b_ref[n, :][None], None, compiled)
        else:
            dy = dy_ref[here, :]
        results = []
        for k, total in enumerate(sums):
            if stride == 1:
                r, c, inside = at.sources(i, j, first + k, *out)
                dy, _ = at.gather(dy_ref, r, c, inside, out[1], n * out_positions)
            else:
                down, right = at.offsets(first + k)
                r, c = i * stride + down, j * stride + right
                inside = (r >= 0) & (c >= 0) & (r < height) & (c < width)
                x, mask = at.gather(x_ref, r, c, inside, width, n * positions)
                if activate:
                    x = activated(x, a_ref[n, :][None], b_ref[n, :][None], mask, compiled)
            contract = (((0,), (0,)), ((), ()))
            product = jax.lax.dot_general(x, dy, contract, preferred_element_type=jnp.float32)
            results.append(total + product)
        return tuple(results)

    zeros = tuple(jnp.zeros((channels, outputs), jnp.float32) for _ in range(taps))
    steps = x_ref.shape[0] // positions * (out_positions // chunk)
    for k, total in enumerate(jax.lax.fori_loop(0, steps, accumulate, zeros)):
        dw_ref[k] = total


def weight_gradient(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dy: jax.Array,
    tile: tiles.WeightTaps,
    *,
    height: int,
    width: int,
    stride: int,
    activate: bool,
    interpret: bool,
) -> jax.Array:
    """:func:`ttt_jax.models.fused_conv.weight_gradient` by taps in this tile."""
    count, positions, channels = x.shape
    out_positions, outputs = dy.shape[1:]
    taps, chunk = tile.taps, math.gcd(tile.positions, out_positions)
    shares = tiles.TAPS // taps
    each = tiles.images_per_program(tile.images, count, shares)
    parts = count // each
    partial = pl.pallas_call(
        functools.partial(
            _weight_gradient_kernel,
            height=height,
            width=width,
            stride=stride,
            activate=activate,
            taps=taps,
            chunk=chunk,
            compiled=not interpret,
        ),
        grid=(parts * shares,),
        in_specs=[
            pl.BlockSpec((each * positions, channels), lambda g: (g // shares, 0)),
            pl.BlockSpec((each, channels), lambda g: (g // shares, 0)),
            pl.BlockSpec((each, channels), lambda g: (g // shares, 0)),
            pl.BlockSpec((each * out_positions, outputs), lambda g: (g // shares, 0)),
        ],
        out_specs=pl.BlockSpec(
            (None, taps, channels, outputs), lambda g: (g // shares, g % shares, 0, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((parts, tiles.TAPS, channels, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="taps_weight_gradient",
    )(x.reshape(count * positions, channels), a, b, dy.reshape(count * out_positions, outputs))
    return partial.sum(axis=0)

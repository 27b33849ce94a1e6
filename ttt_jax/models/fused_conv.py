"""The three kernels of ``conv3x3(relu(a * x + b))`` for a GPU: result, input and weight gradient.

One program holds one image's feature map on chip, so a normalization, its activation, the
convolution, the residual sum and the statistics of the next normalization touch device memory
once. Under ``vmap`` over parameters XLA writes a grouped convolution instead, whose weight
gradient alone takes half of an inner step (``experiments/results/bench_vision.json``).

Written in Pallas for its Triton backend. Arrays are ``[N, P, C]``, P = height * width positions
row by row; the N images share one kernel, and ``vmap`` adds instances with kernels of their own.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

TAPS = 9

# Per number of channels, from timings on an H100 (bfloat16, 128 instances of 32 images of
# 32 x 32): images per program, positions per step, taps per program and warps.
_WEIGHT_GRADIENT = {16: (8, 64, 9, 1), 32: (16, 128, 3, 2), 64: (32, 64, 1, 4)}

# More images than an instance has copies: a training batch, which alone must fill the card.
_ONE_INSTANCE = 64
_PROGRAMS = 512

CHANNELS = tuple(_WEIGHT_GRADIENT)
"""The numbers of channels that the kernels are tuned for."""


def _places(positions: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of positions."""
    return jax.lax.div(positions, jnp.int32(width)), jax.lax.rem(positions, jnp.int32(width))


def _gather(
    ref: Any, rows: jax.Array, columns: jax.Array, inside: jax.Array, width: int, base: Any = 0
) -> tuple[jax.Array, jax.Array]:
    """Rows of ``ref`` at some places, zeros outside; and where it is inside."""
    shape = (rows.shape[0], ref.shape[-1])
    places = jnp.broadcast_to((base + jnp.where(inside, rows * width + columns, 0))[:, None], shape)
    mask = jnp.broadcast_to(inside[:, None], shape)
    channels = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.load(ref.at[places, channels], mask=mask, other=0), mask


def _sources(
    rows: jax.Array, columns: jax.Array, tap: Any, stride: int, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The outputs that read the given inputs through a tap, and whether there is one."""
    tap = jnp.int32(tap)
    r = rows - jax.lax.div(tap, jnp.int32(3)) + 1
    c = columns - jax.lax.rem(tap, jnp.int32(3)) + 1
    inside = (r >= 0) & (c >= 0)
    if stride == 2:
        inside &= ((r | c) & 1) == 0
        r, c = r >> 1, c >> 1
    return r, c, inside & (r < height) & (c < width)


def _image(positions: int, channels: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, positions, channels), lambda n: (n, 0, 0))


def _vector(channels: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, channels), lambda n: (n, 0))


def _taps(channels: int, outputs: int) -> pl.BlockSpec:
    return pl.BlockSpec((TAPS, channels, outputs), lambda n: (0, 0, 0))


def _forward_kernel(
    *refs: Any, height: int, width: int, stride: int, activate: bool, residual: bool
) -> None:
    x_ref, a_ref, b_ref, w_ref = refs[:4]
    y_ref, sums_ref = refs[4 + residual :]
    columns_out = width // stride
    count = (height // stride) * columns_out
    i, j = _places(jax.lax.broadcasted_iota(jnp.int32, (count,), 0), columns_out)
    a, b = a_ref[...], b_ref[...]
    y = jnp.zeros((count, w_ref.shape[-1]), jnp.float32)
    for tap in range(TAPS):
        r, c = i * stride + (tap // 3 - 1), j * stride + (tap % 3 - 1)
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        x, mask = _gather(x_ref, r, c, inside, width)
        if activate:
            u = jnp.maximum(a[None] * x.astype(jnp.float32) + b[None], 0.0)
            # Padding comes after the activation: it is zero, not relu(b).
            x = jnp.where(mask, u, 0.0).astype(x.dtype)
        y += jnp.dot(x, w_ref[tap], preferred_element_type=jnp.float32)
    if residual:
        y += refs[4][...].astype(jnp.float32)
    rounded = y.astype(y_ref.dtype)
    y_ref[...] = rounded
    y = rounded.astype(jnp.float32)
    sums_ref[0, :] = jnp.sum(y, axis=0)
    sums_ref[1, :] = jnp.sum(y * y, axis=0)


def forward(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    w: jax.Array,
    residual: jax.Array | None,
    *,
    height: int,
    width: int,
    stride: int = 1,
    activate: bool = True,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """``y = conv3x3(relu(a * x + b), w) + residual`` with padding 1.

    Args:
      x: ``[N, P, C]``.
      a: float32 ``[N, C]``.
      b: float32 ``[N, C]``.
      w: ``[9, C, O]``, of the dtype of ``x``.
      residual: ``[N, P / stride^2, O]`` or None.
      height: of the images of ``x``.
      width: of the images of ``x``; P = height * width.
      stride: 1 or 2.
      activate: False convolves ``x`` as it is.
      interpret: run as plain JAX, on any device.

    Returns:
      ``y [N, P / stride^2, O]``, and float32 ``[N, 2, O]``, its sums and sums of squares over
      positions.
    """
    count, positions, channels = x.shape
    outputs, out_positions = w.shape[-1], positions // stride**2
    inputs, specs = [x, a, b, w], [_image(positions, channels)] + [_vector(channels)] * 2
    specs.append(_taps(channels, outputs))
    if residual is not None:
        inputs.append(residual)
        specs.append(_image(out_positions, outputs))
    warps = 8 if stride == 1 and out_positions * outputs >= 8192 else 4
    return pl.pallas_call(
        functools.partial(
            _forward_kernel,
            height=height,
            width=width,
            stride=stride,
            activate=activate,
            residual=residual is not None,
        ),
        grid=(count,),
        in_specs=specs,
        out_specs=[_image(out_positions, outputs), _image(2, outputs)],
        out_shape=[
            jax.ShapeDtypeStruct((count, out_positions, outputs), x.dtype),
            jax.ShapeDtypeStruct((count, 2, outputs), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="conv3x3_forward",
    )(*inputs)


def _input_gradient_kernel(
    *refs: Any, height: int, width: int, stride: int, groups: int, residual: bool
) -> None:
    dy_ref, w_ref, x_ref, a_ref, b_ref, mean_ref, rstd_ref, gamma_ref = refs[:8]
    dx_ref, moments_ref = refs[8 + residual :]
    count, channels = height * width, w_ref.shape[1]
    out = (height // stride, width // stride)
    i, j = _places(jax.lax.broadcasted_iota(jnp.int32, (count,), 0), width)
    dh = jnp.zeros((count, channels), jnp.float32)
    for tap in range(TAPS):
        r, c, inside = _sources(i, j, tap, stride, *out)
        dy, _ = _gather(dy_ref, r, c, inside, out[1])
        contract = (((1,), (1,)), ((), ()))
        dh += jax.lax.dot_general(dy, w_ref[tap], contract, preferred_element_type=jnp.float32)
    x = x_ref[...].astype(jnp.float32)
    gamma, rstd = gamma_ref[...], rstd_ref[...]
    du = jnp.where(a_ref[...][None] * x + b_ref[...][None] > 0, dh, 0.0)
    normal = (x - mean_ref[...][None]) * rstd[None]
    dgamma, dbeta = jnp.sum(du * normal, axis=0), jnp.sum(du, axis=0)
    moments_ref[0, :] = dgamma
    moments_ref[1, :] = dbeta
    # Means over a group, spread over its channels: one small product with a block matrix.
    size = channels // groups
    shift = size.bit_length() - 1
    row = jax.lax.broadcasted_iota(jnp.int32, (channels, channels), 0) >> shift
    column = jax.lax.broadcasted_iota(jnp.int32, (channels, channels), 1) >> shift
    same = jnp.where(row == column, 1.0 / (size * count), 0.0)
    first = jnp.sum(same * (gamma * dbeta)[:, None], axis=0)
    second = jnp.sum(same * (gamma * dgamma)[:, None], axis=0)
    dx = rstd[None] * (du * gamma[None] - first[None] - normal * second[None])
    if residual:
        dx += refs[8][...].astype(jnp.float32)
    dx_ref[...] = dx.astype(dx_ref.dtype)


def input_gradient(
    dy: jax.Array,
    w: jax.Array,
    x: jax.Array,
    affine: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    gamma: jax.Array,
    residual: jax.Array | None,
    *,
    height: int,
    width: int,
    stride: int = 1,
    groups: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of :func:`forward` in ``x``, where ``a * x + b`` is a GroupNorm of ``x``.

    Args:
      dy: ``[N, P / stride^2, O]``.
      w: ``[9, C, O]``.
      x: ``[N, P, C]``.
      affine: ``(a, b, mean, rstd)``, each float32 ``[N, C]``.
      gamma: float32 ``[C]``, the scale of the GroupNorm.
      residual: ``[N, P, C]``, a further gradient in ``x`` to add, or None.
      height: of the images of ``x``.
      width: of the images of ``x``.
      stride: 1 or 2.
      groups: of the GroupNorm; ``C / groups`` is a power of two.
      interpret: run as plain JAX, on any device.

    Returns:
      ``dx [N, P, C]``, and float32 ``[N, 2, C]``, the gradients in scale and bias per image.
    """
    count, positions, channels = x.shape
    outputs = dy.shape[-1]
    inputs = [dy, w, x, *affine, gamma]
    specs = [_image(dy.shape[1], outputs), _taps(channels, outputs), _image(positions, channels)]
    specs += [_vector(channels)] * 4 + [pl.BlockSpec((channels,), lambda n: (0,))]
    if residual is not None:
        inputs.append(residual)
        specs.append(_image(positions, channels))
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
        out_specs=[_image(positions, channels), _image(2, channels)],
        out_shape=[
            jax.ShapeDtypeStruct((count, positions, channels), x.dtype),
            jax.ShapeDtypeStruct((count, 2, channels), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8 if positions >= 1024 else 4, num_stages=1),
        interpret=interpret,
        name="conv3x3_input_gradient",
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
) -> None:
    channels, outputs = x_ref.shape[-1], dy_ref.shape[-1]
    positions = height * width
    out = (height // stride, width // stride)
    first = jax.lax.rem(pl.program_id(0), jnp.int32(TAPS // taps)) * taps
    chunks = jnp.int32(positions // chunk)

    def accumulate(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step = jnp.int32(step)
        n, start = jax.lax.div(step, chunks), jax.lax.rem(step, chunks) * chunk
        i, j = _places(start + jax.lax.broadcasted_iota(jnp.int32, (chunk,), 0), width)
        x = x_ref[pl.ds(n * positions + start, chunk), :]
        if activate:
            u = a_ref[n, :][None] * x.astype(jnp.float32) + b_ref[n, :][None]
            x = jnp.maximum(u, 0.0).astype(x.dtype)
        results = []
        for k, total in enumerate(sums):
            r, c, inside = _sources(i, j, first + k, stride, *out)
            dy, _ = _gather(dy_ref, r, c, inside, out[1], n * (out[0] * out[1]))
            contract = (((0,), (0,)), ((), ()))
            product = jax.lax.dot_general(x, dy, contract, preferred_element_type=jnp.float32)
            results.append(total + product)
        return tuple(results)

    zeros = tuple(jnp.zeros((channels, outputs), jnp.float32) for _ in range(taps))
    steps = x_ref.shape[0] // positions * (positions // chunk)
    for k, total in enumerate(jax.lax.fori_loop(0, steps, accumulate, zeros)):
        dw_ref[k] = total


def weight_gradient(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    dy: jax.Array,
    *,
    height: int,
    width: int,
    stride: int = 1,
    activate: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """The gradient of :func:`forward` in ``w``, summed over the N images.

    Args:
      x: ``[N, P, C]``.
      a: float32 ``[N, C]``.
      b: float32 ``[N, C]``.
      dy: ``[N, P / stride^2, O]``.
      height: of the images of ``x``.
      width: of the images of ``x``.
      stride: 1 or 2.
      activate: as in :func:`forward`.
      interpret: run as plain JAX, on any device.

    Returns:
      float32 ``[9, C, O]``.
    """
    count, positions, channels = x.shape
    out_positions, outputs = dy.shape[1:]
    most, chunk, taps, warps = _WEIGHT_GRADIENT[max(channels, outputs)]
    shares = TAPS // taps
    if count > _ONE_INSTANCE:
        most = max(1, min(most, count * shares // _PROGRAMS))
    each = max(d for d in range(1, min(most, count) + 1) if count % d == 0)
    chunk = math.gcd(chunk, positions)
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
        out_shape=jax.ShapeDtypeStruct((parts, TAPS, channels, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="conv3x3_weight_gradient",
    )(x.reshape(count * positions, channels), a, b, dy.reshape(count * out_positions, outputs))
    return partial.sum(axis=0)

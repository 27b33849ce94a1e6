"""Residual blocks with GroupNorm on the kernels of :mod:`ttt_jax.models.fused_conv`.

The arithmetic is that of the block written with flax layers: statistics and sums in float32,
feature maps rounded to the compute dtype after each convolution.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_EPSILON = 1e-5

# The smallest operand of the kernels' matrix products.
_SMALLEST = 16


class Maps(NamedTuple):
    """Feature maps with their statistics.

    Attributes:
      values: ``[N, P, C]``, positions row by row.
      sums: float32 ``[N, 2, C]``: sums and sums of squares over positions. Derived from
        ``values``, whose gradient includes them; their own is never used.
      height: of a map.
      width: of a map; P = height * width.
    """

    values: jax.Array
    sums: jax.Array
    height: int
    width: int

    def images(self) -> jax.Array:
        """``[N, H, W, C]``."""
        return self.values.reshape(len(self.values), self.height, self.width, -1)


class Layer(NamedTuple):
    """GroupNorm, relu and convolution: scale ``[C]``, bias ``[C]``, kernel ``[3, 3, C, O]``."""

    scale: jax.Array
    bias: jax.Array
    kernel: jax.Array


def supported(image_shape: tuple[int, ...], width: int, groups: int, dtype: Any) -> bool:
    """Whether the kernels serve a ResNet of this width on images ``[H, W, C]`` on this machine."""
    if jax.default_backend() != "gpu" or jax.devices()[0].platform == "rocm":
        return False
    return fits(image_shape, width, groups, dtype) and _kernels() is not None


def fits(image_shape: tuple[int, ...], width: int, groups: int, dtype: Any) -> bool:
    """Whether sizes and dtype suit the kernels, whatever the machine."""
    height, columns, channels = image_shape
    sizes = (height, columns, width // groups)
    return (
        width == _SMALLEST
        and all(size > 0 and size & (size - 1) == 0 for size in sizes)
        and width % groups == 0
        and (height // 4) * (columns // 4) >= _SMALLEST
        and channels <= _SMALLEST
        and jnp.dtype(dtype) in (jnp.dtype("float32"), jnp.dtype("bfloat16"))
    )


@functools.cache
def _kernels() -> Any:
    """The module of the kernels; None on a jax whose Pallas has no Triton backend."""
    try:
        from ttt_jax.models import fused_conv
    except ImportError:
        return None
    return fused_conv


def _interpret() -> bool:
    return jax.default_backend() != "gpu"


def _affine(sums: jax.Array, layer: Layer, positions: int, groups: int) -> tuple[jax.Array, ...]:
    """GroupNorm as ``a * x + b``: ``(a, b, mean, rstd)``, each ``[N, C]``."""
    count, _, channels = sums.shape
    size = channels // groups
    means = sums.reshape(count, 2, groups, size).sum(axis=-1) / (positions * size)
    mean, square = means[:, 0], means[:, 1]
    rstd = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + _EPSILON)
    mean, rstd = jnp.repeat(mean, size, axis=1), jnp.repeat(rstd, size, axis=1)
    a = rstd * layer.scale[None]
    return a, layer.bias[None] - mean * a, mean, rstd


def _flat(kernel: jax.Array, dtype: Any) -> jax.Array:
    return kernel.reshape(9, *kernel.shape[2:]).astype(dtype)


def _shortcut(x: jax.Array, height: int, width: int, stride: int, outputs: int) -> jax.Array:
    """Average of 2 x 2 positions where the block strides, zeros for the new channels."""
    count, positions, channels = x.shape
    if stride == 2:
        cells = x.reshape(count, height // 2, 2, width // 2, 2, channels)
        x = cells.astype(jnp.float32).mean(axis=(2, 4)).astype(x.dtype)
        x = x.reshape(count, positions // 4, channels)
    return jnp.pad(x, ((0, 0), (0, 0), (0, outputs - channels)))


def _shortcut_gradient(
    dy: jax.Array, height: int, width: int, stride: int, channels: int
) -> jax.Array:
    dy = dy[..., :channels]
    if stride == 1:
        return dy
    count = dy.shape[0]
    cells = dy.reshape(count, height // 2, 1, width // 2, 1, channels) / 4
    spread = jnp.broadcast_to(cells, (count, height // 2, 2, width // 2, 2, channels))
    return spread.reshape(count, height * width, channels)


def block(maps: Maps, first: Layer, second: Layer, *, stride: int, groups: int) -> Maps:
    """norm, relu, conv, norm, relu, conv, plus the shortcut of the pre-activation ResNet.

    Args:
      maps: the block's input.
      first: its first layer, C to O channels, with ``stride``.
      second: its second layer, O to O channels.
      stride: 1 or 2.
      groups: of both GroupNorms.

    Returns:
      The block's output, O channels.
    """
    size = (maps.height, maps.width, stride, groups)
    values, sums = _block((first, second), maps.values, maps.sums, *size)
    return Maps(values, sums, maps.height // stride, maps.width // stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _block(layers, x, sums, height, width, stride, groups):
    return _block_forward(layers, x, sums, height, width, stride, groups)[0]


def _block_forward(layers, x, sums, height, width, stride, groups):
    kernels, interpret = _kernels(), _interpret()
    first, second = layers
    positions, outputs = x.shape[1], first.kernel.shape[-1]
    shortcut = _shortcut(x, height, width, stride, outputs)
    w1, w2 = _flat(first.kernel, x.dtype), _flat(second.kernel, x.dtype)
    one = _affine(sums, first, positions, groups)
    h, h_sums = kernels.forward(
        x, *one[:2], w1, None, height=height, width=width, stride=stride, interpret=interpret
    )
    two = _affine(h_sums, second, h.shape[1], groups)
    out = {"height": height // stride, "width": width // stride}
    y, y_sums = kernels.forward(h, *two[:2], w2, shortcut, **out, interpret=interpret)
    return (y, y_sums), (x, h, (first.scale, w1, one), (second.scale, w2, two))


def _block_backward(height, width, stride, groups, saved, cotangents):
    kernels, interpret = _kernels(), _interpret()
    x, h, (scale1, w1, one), (scale2, w2, two) = saved
    dy, _ = cotangents
    inner = {"height": height // stride, "width": width // stride, "interpret": interpret}
    outer = {"height": height, "width": width, "stride": stride, "interpret": interpret}
    dw2 = kernels.weight_gradient(h, *two[:2], dy, **inner)
    dh, d2 = kernels.input_gradient(dy, w2, h, two, scale2, None, groups=groups, **inner)
    dw1 = kernels.weight_gradient(x, *one[:2], dh, **outer)
    skip = _shortcut_gradient(dy, height, width, stride, x.shape[-1])
    dx, d1 = kernels.input_gradient(
        dh, w1, x, one, scale1, skip.astype(x.dtype), groups=groups, **outer
    )

    def gradients(moments: jax.Array, dw: jax.Array) -> Layer:
        scale, bias = moments.sum(axis=0)
        return Layer(scale, bias, dw.reshape(3, 3, *dw.shape[1:]))

    sums = jnp.zeros((len(x), 2, x.shape[-1]), jnp.float32)
    return (gradients(d1, dw1), gradients(d2, dw2)), dx, sums


_block.defvjp(_block_forward, _block_backward)


def stem(images: jax.Array, kernel: jax.Array) -> Maps:
    """The first convolution: ``[N, H, W, C]`` with C <= 16; no gradient in the images.

    Args:
      images: of the compute dtype.
      kernel: float32 ``[3, 3, C, O]``.

    Returns:
      O feature maps of the size of the images.
    """
    count, height, width, channels = images.shape
    flat = images.reshape(count, height * width, channels)
    padded = jnp.pad(flat, ((0, 0), (0, 0), (0, _SMALLEST - channels)))
    widened = jnp.pad(kernel, ((0, 0), (0, 0), (0, _SMALLEST - channels), (0, 0)))
    values, sums = _stem(widened, jax.lax.stop_gradient(padded), height, width)
    return Maps(values, sums, height, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _stem(kernel, x, height, width):
    return _stem_forward(kernel, x, height, width)[0]


def _unused(x: jax.Array) -> jax.Array:
    return jnp.zeros((len(x), x.shape[-1]), jnp.float32)


def _stem_forward(kernel, x, height, width):
    size = {"height": height, "width": width, "activate": False, "interpret": _interpret()}
    w = _flat(kernel, x.dtype)
    return _kernels().forward(x, _unused(x), _unused(x), w, None, **size), x


def _stem_backward(height, width, x, cotangents):
    size = {"height": height, "width": width, "activate": False, "interpret": _interpret()}
    dw = _kernels().weight_gradient(x, _unused(x), _unused(x), cotangents[0], **size)
    return dw.reshape(3, 3, *dw.shape[1:]), jnp.zeros_like(x)


_stem.defvjp(_stem_forward, _stem_backward)

"""Residual blocks with GroupNorm on the kernels of :mod:`ttt_jax.models.fused_conv`.

The arithmetic is that of the block written with flax layers: statistics and sums in float32,
feature maps rounded to the compute dtype after each convolution.

Gradients are of every order in reverse mode, under ``vmap`` and ``scan`` too: the first is the
kernels', and the derivatives of that one are those of the block in XLA's form. Forward mode
(``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) has no rule here and JAX refuses it; a product with a
Hessian is the gradient of ``vdot(grad(f)(p), v)``, and ``ResNet(conv="lax")`` takes every mode.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ttt_jax.models import fused_limits as limits
from ttt_jax.models.conv import conv3x3

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


class _Size(NamedTuple):
    """What is static about a block; ``height`` and ``width`` are its input's."""

    height: int
    width: int
    stride: int = 1
    groups: int = 1

    def first(self) -> dict[str, Any]:
        """How a kernel is called on the block's first convolution."""
        size = {"height": self.height, "width": self.width, "stride": self.stride}
        return size | {"interpret": _interpret()}

    def second(self) -> dict[str, Any]:
        """How a kernel is called on the block's second convolution."""
        height, width = self.height // self.stride, self.width // self.stride
        return {"height": height, "width": width, "interpret": _interpret()}


def supported(image_shape: tuple[int, ...], width: int, groups: int, dtype: Any) -> bool:
    """Whether the kernels serve a ResNet of this width on images ``[H, W, C]`` on this machine."""
    if jax.default_backend() != "gpu" or jax.devices()[0].platform == "rocm":
        return False
    fitting = fits(image_shape, width, groups, dtype) and computes(dtype)
    return fitting and _kernels() is not None


def computes(dtype: Any) -> bool:
    """Whether a GPU of this machine has the dtype; without a GPU kernels are interpreted."""
    if jnp.dtype(dtype) != jnp.bfloat16 or jax.default_backend() != "gpu":
        return True
    # Conversions and products of bfloat16 came with compute capability 8; ROCm's has another form.
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return not capability[:1].isdigit() or float(capability) >= 8


def fits(image_shape: tuple[int, ...], width: int, groups: int, dtype: Any) -> bool:
    """Whether sizes and dtype suit the kernels, whatever the machine.

    Args:
      image_shape: ``[H, W, C]``: sides that are powers of two, from 16 x 16 to 32 x 32 positions
        in all (the most that was timed), C <= 16.
      width: of the ResNet, 16.
      groups: of its GroupNorms; divides ``width`` by a power of two.
      dtype: the compute dtype, float32 or bfloat16.
    """
    height, columns, channels = image_shape
    return (
        width == _SMALLEST
        and groups > 0
        and width % groups == 0
        and all(map(limits.power_of_two, (height, columns, width // groups)))
        and (height // 4) * (columns // 4) >= _SMALLEST
        and height * columns <= limits.MOST_POSITIONS
        and channels <= _SMALLEST
        and jnp.dtype(dtype) in limits.DTYPES
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


def _by_kernels(kernels: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``kernels(size, *arrays)``, with the derivatives of ``plain(size, *arrays)``, its XLA form.

    Kernels have no derivatives, but a gradient that they compute is differentiated again where an
    outer gradient goes through inner steps.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(size: _Size, *arrays: Any) -> Any:
        return kernels(size, *arrays)

    def forward(size: _Size, *arrays: Any) -> Any:
        return run(size, *arrays), arrays

    def backward(size: _Size, arrays: Any, cotangents: Any) -> Any:
        return jax.vjp(functools.partial(plain, size), *arrays)[1](cotangents)

    run.defvjp(forward, backward)
    return run


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

    Raises:
      ValueError: what :mod:`ttt_jax.models.fused_limits` excludes.
    """
    size = _Size(maps.height, maps.width, stride, groups)
    layers = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (first, second))
    (values, sums), _ = _block(size, layers, maps.values, maps.sums)
    return Maps(values, sums, maps.height // stride, maps.width // stride)


class _Inner(NamedTuple):
    """What a block's gradient reads; a function of the block's arguments.

    ``h``: the map after the first convolution; ``one`` and ``two``: of each GroupNorm, as from
    :func:`_affine`; ``w1`` and ``w2``: ``[9, C, O]``.
    """

    h: jax.Array
    w1: jax.Array
    one: tuple[jax.Array, ...]
    w2: jax.Array
    two: tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(size, layers, x, sums):
    forward, (first, second) = _kernels().forward, layers
    shortcut = _shortcut(x, size.height, size.width, size.stride, first.kernel.shape[-1])
    w1, w2 = _flat(first.kernel, x.dtype), _flat(second.kernel, x.dtype)
    one = _affine(sums, first, x.shape[1], size.groups)
    h, h_sums = forward(x, *one[:2], w1, None, **size.first())
    two = _affine(h_sums, second, h.shape[1], size.groups)
    result = forward(h, *two[:2], w2, shortcut, **size.second())
    return result, _Inner(h, w1, one, w2, two)


def _block_forward(size, layers, x, sums):
    # The block itself and not its kernels: an outer gradient differentiates this call again.
    result, inner = _block(size, layers, x, sums)
    return (result, inner), (layers, x, inner)


def _block_backward(size, saved, cotangents):
    # All that is derived from the maps, sums and inner values, has its part in their gradient, of
    # every order: what comes back to it by itself is dropped.
    (dy, _), _ = cotangents
    layers, x, inner = saved
    dlayers, dx = _block_gradient(size, layers, x, inner, dy)
    return dlayers, dx, None


def _gradient_by_kernels(size, layers, x, inner, dy):
    kernels, (first, second) = _kernels(), layers
    h, w1, one, w2, two = inner
    groups = {"groups": size.groups}
    dw2 = kernels.weight_gradient(h, *two[:2], dy, **size.second())
    dh, d2 = kernels.input_gradient(dy, w2, h, two, second.scale, None, **groups, **size.second())
    dw1 = kernels.weight_gradient(x, *one[:2], dh, **size.first())
    skip = _shortcut_gradient(dy, size.height, size.width, size.stride, x.shape[-1])
    skip = skip.astype(x.dtype)
    dx, d1 = kernels.input_gradient(dh, w1, x, one, first.scale, skip, **groups, **size.first())

    def gradients(moments: jax.Array, dw: jax.Array) -> Layer:
        scale, bias = moments.sum(axis=0)
        return Layer(scale, bias, dw.reshape(3, 3, *dw.shape[1:]))

    return (gradients(d1, dw1), gradients(d2, dw2)), dx


def _plain_gradient(size, layers, x, inner, dy):
    return jax.vjp(functools.partial(_plain, size), layers, x)[1](dy)


def _plain(size: _Size, layers: tuple[Layer, Layer], x: jax.Array) -> jax.Array:
    """The block in XLA's form: ``[N, P, C] -> [N, P / stride^2, O]``."""
    height, width, stride, groups = size
    shortcut = _shortcut(x, height, width, stride, layers[0].kernel.shape[-1])
    for layer, step in zip(layers, (stride, 1), strict=True):
        wide = x.astype(jnp.float32)
        sums = jnp.stack([wide.sum(axis=1), (wide * wide).sum(axis=1)], axis=1)
        a, b, *_ = _affine(sums, layer, x.shape[1], groups)
        x = jax.nn.relu(a[:, None] * wide + b[:, None]).astype(x.dtype)
        x = _plain_conv(x, layer.kernel, height, width, step)
        height, width = height // step, width // step
    return x + shortcut


def _plain_conv(
    x: jax.Array, kernel: jax.Array, height: int, width: int, stride: int = 1
) -> jax.Array:
    images = x.reshape(len(x), height, width, -1)
    y = conv3x3(images, kernel.astype(x.dtype), stride=stride)
    return y.reshape(len(x), -1, y.shape[-1])


_block_gradient = _by_kernels(_gradient_by_kernels, _plain_gradient)
_block.defvjp(_block_forward, _block_backward)


def stem(images: jax.Array, kernel: jax.Array) -> Maps:
    """The first convolution: ``[N, H, W, C]`` with C <= 16.

    Args:
      images: of the compute dtype.
      kernel: float32 ``[3, 3, C, O]``.

    Returns:
      O feature maps of the size of the images.

    Raises:
      ValueError: what :mod:`ttt_jax.models.fused_limits` excludes.
    """
    count, height, width, channels = images.shape
    flat = images.reshape(count, height * width, channels)
    padded = jnp.pad(flat, ((0, 0), (0, 0), (0, _SMALLEST - channels)))
    kernel = kernel.astype(jnp.float32)
    widened = jnp.pad(kernel, ((0, 0), (0, 0), (0, _SMALLEST - channels), (0, 0)))
    values, sums = _stem(_Size(height, width))(widened, padded)
    return Maps(values, sums, height, width)


def _unused(x: jax.Array) -> jax.Array:
    return jnp.zeros((len(x), x.shape[-1]), jnp.float32)


@functools.cache
def _stem(size: _Size) -> Callable[..., Any]:
    """``(kernel, x) -> (values, sums)``, with a gradient in ``x`` only where it is asked for.

    For a size each: symbolic zeros, which tell that, and static arguments may exclude each other.
    """

    @jax.custom_vjp
    def run(kernel: jax.Array, x: jax.Array) -> Any:
        w, kernels = _flat(kernel, x.dtype), _kernels()
        unused = _unused(x), _unused(x)
        return kernels.forward(x, *unused, w, None, activate=False, **size.first())

    def forward(kernel: Any, x: Any) -> Any:
        needed = kernel.value if x.perturbed else None
        return run(kernel.value, x.value), (needed, x.value)

    def backward(saved: Any, cotangents: Any) -> Any:
        kernel, x = saved
        dy, _ = cotangents
        if isinstance(dy, SymbolicZero):
            return None, None
        dkernel = _stem_gradient(size, x, dy)
        if kernel is None:
            return dkernel, None
        # A convolution's transpose is the one with its taps turned and its channels exchanged.
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        return dkernel, _plain_conv(dy, turned, size.height, size.width)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _stem_by_kernels(size, x, dy):
    gradient = _kernels().weight_gradient
    dw = gradient(x, _unused(x), _unused(x), dy, activate=False, **size.first())
    return dw.reshape(3, 3, *dw.shape[1:])


def _plain_stem_gradient(size, x, dy):
    kernel = jnp.zeros((3, 3, x.shape[-1], dy.shape[-1]), jnp.float32)
    return jax.vjp(lambda k: _plain_conv(x, k, size.height, size.width), kernel)[1](dy)[0]


_stem_gradient = _by_kernels(_stem_by_kernels, _plain_stem_gradient)

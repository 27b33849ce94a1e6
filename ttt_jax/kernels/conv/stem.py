"""The first convolution of a ResNet on the kernels of :mod:`ttt_jax.kernels.conv.passes`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ttt_jax.kernels import _arguments, shared_outputs
from ttt_jax.kernels.conv import support
from ttt_jax.kernels.conv.convolution import Convolution
from ttt_jax.kernels.conv.derivatives import with_xla_derivatives
from ttt_jax.kernels.conv.maps import Maps, flat_kernel, square_kernel, xla_conv


def stem(images: jax.Array, kernel: jax.Array) -> Maps:
    """Returns the first convolution of images ``[N, H, W, C]`` with C <= 16.

    Args:
      images: of the compute dtype.
      kernel: float32 ``[3, 3, C, O]``.

    Returns:
      O feature maps of the size of the images.

    Raises:
      ValueError: what :mod:`ttt_jax.kernels.conv.limits` excludes.
    """
    images, kernel = _arguments.array("images", images, 4), _arguments.array("kernel", kernel, 4)
    count, height, width, channels = images.shape
    padding = support.SMALLEST - channels
    flat = images.reshape(count, height * width, channels)
    padded = jnp.pad(flat, ((0, 0), (0, 0), (0, padding)))
    kernel = kernel.astype(jnp.float32)
    widened = jnp.pad(kernel, ((0, 0), (0, 0), (0, padding), (0, 0)))
    conv = Convolution(height, width, activate=False, interpret=support.interpreted())
    values, sums = _stem(conv)(widened, padded)
    return Maps(values, sums, height, width)


def _unused(x: jax.Array) -> jax.Array:
    return jnp.zeros((len(x), x.shape[-1]), jnp.float32)


@functools.cache
def _stem(conv: Convolution) -> Callable[..., Any]:
    """``(kernel, x) -> (values, sums)``, with a gradient in ``x`` only where it is asked for.

    For a size each: symbolic zeros, which tell that, and static arguments may exclude each other.
    """

    @jax.custom_vjp
    def run(kernel: jax.Array, x: jax.Array) -> Any:
        w = flat_kernel(kernel, x.dtype)
        return support.passes().forward(conv, x, _unused(x), _unused(x), w)

    def forward(kernel: Any, x: Any) -> Any:
        needed = kernel.value if x.perturbed else None
        return run(kernel.value, x.value), (needed, x.value)

    def backward(saved: Any, cotangents: Any) -> Any:
        kernel, x = saved
        dy, _ = cotangents
        if isinstance(dy, SymbolicZero):
            return None, None
        dkernel = _stem_gradient(conv, x, dy)
        if kernel is None:
            return dkernel, None
        # A convolution's transpose is the one with its taps turned and its channels exchanged.
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        return dkernel, xla_conv(dy, turned, conv.size)

    run.defvjp(forward, backward, symbolic_zeros=True, **shared_outputs.DECLARED)
    return run


def _gradient_by_kernels(conv, x, dy):
    return square_kernel(support.passes().weight_gradient(conv, x, _unused(x), _unused(x), dy))


def _gradient_by_xla(conv, x, dy):
    kernel = jnp.zeros((3, 3, x.shape[-1], dy.shape[-1]), jnp.float32)
    return jax.vjp(lambda k: xla_conv(x, k, conv.size), kernel)[1](dy)[0]


_stem_gradient = with_xla_derivatives(_gradient_by_kernels, _gradient_by_xla)

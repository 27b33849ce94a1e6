"""What passes between the parts of a ResNet on the kernels: feature maps and layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels.conv.convolution import Affine
from ttt_jax.kernels.conv.tiles import TAPS
from ttt_jax.kernels.conv.xla import conv3x3

_EPSILON = 1e-5


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
        """Returns the maps as ``[N, H, W, C]``."""
        return self.values.reshape(len(self.values), self.height, self.width, -1)

    def fused_layers(self) -> tuple[str, ...]:
        """Names the layers that a kernel computed and that no module was called for."""
        return ("GroupNorm", "relu", "conv3x3")


class Layer(NamedTuple):
    """GroupNorm, relu and convolution: scale ``[C]``, bias ``[C]``, kernel ``[3, 3, C, O]``."""

    scale: jax.Array
    bias: jax.Array
    kernel: jax.Array


def group_norm(sums: jax.Array, layer: Layer, positions: int, groups: int) -> Affine:
    """Returns the GroupNorm of maps with those sums as ``a * x + b``."""
    count, _, channels = sums.shape
    size = channels // groups
    means = sums.reshape(count, 2, groups, size).sum(axis=-1) / (positions * size)
    mean, square = means[:, 0], means[:, 1]
    rstd = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + _EPSILON)
    mean, rstd = jnp.repeat(mean, size, axis=1), jnp.repeat(rstd, size, axis=1)
    a = rstd * layer.scale[None]
    return Affine(a, layer.bias[None] - mean * a, mean, rstd)


def flat_kernel(kernel: jax.Array, dtype: Any) -> jax.Array:
    """Returns a kernel ``[3, 3, C, O]`` as ``[9, C, O]``."""
    return kernel.reshape(TAPS, *kernel.shape[2:]).astype(dtype)


def square_kernel(w: jax.Array) -> jax.Array:
    """Returns a kernel ``[9, C, O]`` as ``[3, 3, C, O]``."""
    return w.reshape(3, 3, *w.shape[1:])


def xla_conv(x: jax.Array, kernel: jax.Array, size: tuple[int, int], stride: int = 1) -> jax.Array:
    """Returns :func:`conv3x3` of maps ``[N, P, C]`` of that height and width."""
    images = x.reshape(len(x), *size, -1)
    y = conv3x3(images, kernel.astype(x.dtype), stride=stride)
    return y.reshape(len(x), -1, y.shape[-1])

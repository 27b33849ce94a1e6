"""Which sizes and machines the kernels of a ResNet serve.

Free of Pallas: a machine without its Triton backend may ask as well.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments
from ttt_jax.kernels.conv import limits

SMALLEST = 16
"""The smallest operand of the kernels' matrix products."""


def supported(image_shape: tuple[int, ...], width: int, groups: int, dtype: Any) -> bool:
    """Whether the kernels serve a ResNet of this width on images ``[H, W, C]`` on this machine.

    Args:
      image_shape: as in :func:`fits`.
      width: as in :func:`fits`.
      groups: as in :func:`fits`.
      dtype: as in :func:`fits`.
    """
    _check(image_shape, width, groups, dtype)
    if jax.default_backend() != "gpu" or jax.devices()[0].platform == "rocm":
        return False
    fitting = fits(image_shape, width, groups, dtype) and computes(dtype)
    return fitting and passes() is not None


def computes(dtype: Any) -> bool:
    """Whether a GPU of this machine has the dtype; without a GPU kernels are interpreted."""
    _arguments.dtype("dtype", dtype)
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
    _check(image_shape, width, groups, dtype)
    height, columns, channels = image_shape
    return (
        width == SMALLEST
        and groups > 0
        and width % groups == 0
        and all(map(limits.power_of_two, (height, columns, width // groups)))
        and (height // 4) * (columns // 4) >= SMALLEST
        and height * columns <= limits.MOST_POSITIONS
        and channels <= SMALLEST
        and jnp.dtype(dtype) in limits.DTYPES
    )


def _check(image_shape: tuple[int, ...], width: int, groups: int, dtype: Any) -> None:
    _arguments.shape("image_shape", image_shape, 3)
    _arguments.integer("width", width)
    _arguments.integer("groups", groups, -jnp.inf)
    _arguments.dtype("dtype", dtype)


def interpreted() -> bool:
    """Whether kernels run as plain JAX: away from a GPU."""
    return jax.default_backend() != "gpu"


@functools.cache
def passes() -> Any:
    """The module of the kernels; None on a jax whose Pallas has no Triton backend."""
    try:
        from ttt_jax.kernels.conv import passes
    except ImportError:
        return None
    return passes

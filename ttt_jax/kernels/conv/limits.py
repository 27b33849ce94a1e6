"""Sizes that the kernels of :mod:`ttt_jax.kernels.conv.passes` take.

Free of Pallas: a machine without its Triton backend may ask as well.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ttt_jax.kernels.conv.convolution import Convolution
from ttt_jax.kernels.conv.tiles import OTHERS, TAPS

CHANNELS = tuple(OTHERS)
"""The numbers of channels that the kernels are tuned for."""

MOST_POSITIONS = 32 * 32
"""The most positions of a map, the largest that was ever timed. The input gradient holds a whole
map on chip, and the compiler refuses an array of more than 2^20 elements."""

DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"))


def power_of_two(size: int) -> bool:
    """Whether ``size`` is 1, 2, 4, 8 and so on."""
    return size > 0 and size & (size - 1) == 0


def check(
    kernel: str,
    conv: Convolution,
    x: jax.Array,
    outputs: int,
    arrays: Mapping[str, jax.Array | None],
) -> None:
    """Refuses what a kernel would compute wrongly, or fail at without a reason.

    Args:
      kernel: its name.
      conv: the convolution.
      x: the map before the convolution, ``[N, P, C]``.
      outputs: O, the channels after it.
      arrays: the kernel's other arguments by name, None where one is left out. With ``gamma`` it
        is a gradient in the input of a GroupNorm, and ``conv.groups`` counts.

    Raises:
      ValueError: sizes beyond the limits of this module, or arrays that do not belong together.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(
            f"{kernel} takes x [N, P, C] with N >= 1, received shape {x.shape}: join rows and "
            "columns to one axis of positions, and give an empty batch to conv3x3."
        )
    count, positions, channels = x.shape
    (height, width), stride, groups = conv.size, conv.stride, conv.groups
    if stride not in (1, 2):
        raise ValueError(f"{kernel} has stride 1 or 2, received {stride!r}: use one of them.")
    if not (power_of_two(height) and power_of_two(width) and stride <= min(conv.size)):
        raise ValueError(
            f"{kernel} takes images whose sides are powers of two and at least the stride, "
            f"received {height} x {width} with stride {stride}: pad them, or use conv3x3."
        )
    if height * width > MOST_POSITIONS:
        raise ValueError(
            f"{kernel} takes images of at most {MOST_POSITIONS} positions, received {height} x "
            f"{width}: use conv3x3."
        )
    if positions != height * width:
        raise ValueError(
            f"{kernel} takes x [N, height * width, C], received shape {x.shape} for images of "
            f"{height} x {width}: give the height and width of x."
        )
    if channels not in CHANNELS or outputs not in CHANNELS:
        raise ValueError(
            f"{kernel} takes {', '.join(map(str, CHANNELS))} channels, received {channels} with "
            f"{outputs} outputs: pad them with zeros, or use conv3x3."
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"{kernel} takes float32 or bfloat16, received {x.dtype}: cast x.")
    in_norm = "gamma" in arrays
    if in_norm and not (groups > 0 and channels % groups == 0 and power_of_two(channels // groups)):
        raise ValueError(
            f"{kernel} takes groups that divide the channels by a power of two, received "
            f"{groups} for {channels} channels: choose another number."
        )
    result = (count, positions // stride**2, outputs)
    # A residual is added to what a kernel returns: y, or dx.
    residual = x.shape if in_norm else result
    shapes = {"w": (TAPS, channels, outputs), "dy": result, "residual": residual}
    for name, array in arrays.items():
        shape = shapes.get(name, (channels,) if name == "gamma" else (count, channels))
        dtype = x.dtype if name in shapes else jnp.dtype("float32")
        if array is not None and (array.shape != shape or array.dtype != dtype):
            raise ValueError(
                f"{kernel} takes {name} of shape {shape} in {dtype} with x of shape {x.shape}, "
                f"received {array.shape} in {array.dtype}: reshape or cast it."
            )

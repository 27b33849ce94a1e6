"""How the kernels of :mod:`ttt_jax.kernels.conv.passes` cut their work, from timings on an H100.

The timed work: 128 instances of 32 images of 32 x 32 (``benchmarks.kernels``).
"""

from typing import NamedTuple

TAPS = 9

# More images than an instance has copies: a training batch, which alone must fill the card.
_ONE_INSTANCE = 64
_PROGRAMS = 512

# Of a map that is cut into patches of 2 x 2: a patch, and the 16 of them that a product wants.
_ROWS, _POSITIONS = 2, 64


class ForwardTaps(NamedTuple):
    """A result tap by tap: the most positions per program, warps, taps read before their use."""

    positions: int
    warps: int
    ahead: int


class InputTaps(NamedTuple):
    """An input gradient tap by tap, a map per program: warps."""

    warps: int


class WeightTaps(NamedTuple):
    """A weight gradient tap by tap.

    The most ``images``; the most ``positions`` per step; ``taps`` per program; ``warps``;
    ``stages``, how many steps' loads are in flight.
    """

    images: int
    positions: int
    taps: int
    warps: int
    stages: int


class ForwardPatches(NamedTuple):
    """A result by patches.

    ``rows`` of a patch, where the stride is 1; the most ``cells``, patches per program; ``warps``;
    ``ahead``, how many rows of a window are read before their use.
    """

    rows: int
    cells: int
    warps: int
    ahead: int


class InputPatches(NamedTuple):
    """An input gradient by patches, a map per program; as :class:`ForwardPatches`."""

    rows: int
    warps: int
    ahead: int


class WeightPatches(NamedTuple):
    """A weight gradient by patches.

    ``rows`` of a patch, where the stride is 1; the most ``images``; the most ``cells``, patches per
    step; ``warps``; ``stages``, how many steps' loads are in flight.
    """

    rows: int
    images: int
    cells: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels of one convolution."""

    forward: ForwardPatches | ForwardTaps
    input_gradient: InputPatches | InputTaps
    weight_gradient: WeightPatches | WeightTaps


# The fastest measured, by channels, outputs, stride and bytes of a value.
TIMED: dict[tuple[int, int, int, int], Tiles] = {
    (16, 16, 1, 2): Tiles(
        ForwardPatches(2, 128, 4, 1), InputPatches(2, 8, 3), WeightPatches(1, 8, 16, 1, 4)
    ),
    (16, 32, 2, 2): Tiles(
        ForwardPatches(2, 128, 4, 1), InputPatches(2, 8, 0), WeightTaps(8, 32, 9, 1, 3)
    ),
    (32, 32, 1, 2): Tiles(
        ForwardTaps(128, 4, 1), InputPatches(1, 4, 3), WeightTaps(8, 16, 9, 2, 4)
    ),
    (32, 64, 2, 2): Tiles(
        ForwardTaps(64, 4, 1), InputPatches(2, 4, 3), WeightTaps(32, 64, 3, 2, 4)
    ),
    (64, 64, 1, 2): Tiles(ForwardTaps(64, 4, 1), InputTaps(4), WeightTaps(32, 64, 9, 8, 2)),
    (16, 16, 1, 4): Tiles(
        ForwardPatches(1, 128, 4, 1), InputPatches(2, 8, 0), WeightPatches(1, 8, 16, 2, 3)
    ),
    (16, 32, 2, 4): Tiles(
        ForwardTaps(128, 4, 1), InputPatches(2, 8, 1), WeightTaps(8, 32, 9, 1, 3)
    ),
    (32, 32, 1, 4): Tiles(ForwardTaps(64, 4, 0), InputTaps(8), WeightTaps(16, 16, 9, 2, 4)),
    (32, 64, 2, 4): Tiles(ForwardTaps(64, 2, 0), InputTaps(4), WeightTaps(32, 64, 1, 2, 3)),
    (64, 64, 1, 4): Tiles(ForwardTaps(32, 4, 1), InputTaps(4), WeightTaps(16, 32, 1, 1, 3)),
}

# Of other convolutions and of the smallest maps, by the larger of both maps' channels.
OTHERS = {
    16: Tiles(ForwardTaps(64, 2, 0), InputTaps(8), WeightTaps(8, 32, 9, 1, 3)),
    32: Tiles(ForwardTaps(128, 4, 0), InputTaps(8), WeightTaps(16, 64, 3, 2, 3)),
    64: Tiles(ForwardTaps(64, 4, 0), InputTaps(8), WeightTaps(32, 64, 1, 4, 3)),
}


def choose(channels: int, outputs: int, stride: int, itemsize: int, size: tuple[int, int]) -> Tiles:
    """The tiles of a convolution of images of ``size``, in values of ``itemsize`` bytes."""
    key = channels, outputs, stride, itemsize
    if key in TIMED and min(size) >= _ROWS and size[0] * size[1] >= _POSITIONS:
        return TIMED[key]
    return OTHERS[max(channels, outputs)]


def images_per_program(most: int, count: int, shares: int) -> int:
    """The largest divisor of ``count`` up to ``most``, or fewer where programs would be too few.

    ``shares``: programs that one image's work is spread over.
    """
    if count > _ONE_INSTANCE:
        most = max(1, min(most, count * shares // _PROGRAMS))
    return max(d for d in range(1, min(most, count) + 1) if count % d == 0)

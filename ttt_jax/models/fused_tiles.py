"""How the kernels of :mod:`ttt_jax.models.fused_conv` cut their work, from timings on an H100.

The timed work: 128 instances of 32 images of 32 x 32 (``experiments.bench_kernels``).
"""

from typing import NamedTuple

import jax

TAPS = 9

# More images than an instance has copies: a training batch, which alone must fill the card.
_ONE_INSTANCE = 64
_PROGRAMS = 512

# Sides of maps are powers of two, and so are the rows of a patch, at most this many.
_MOST_ROWS = 2


class ForwardTaps(NamedTuple):
    """A result tap by tap: positions per program, warps, and taps read before their use."""

    positions: int
    warps: int
    ahead: int = 0


class InputTaps(NamedTuple):
    """An input gradient tap by tap, a map per program: warps, and taps read before their use."""

    warps: int
    ahead: int = 0


class WeightTaps(NamedTuple):
    """A weight gradient tap by tap: the most images, positions per step, taps, and warps."""

    images: int
    positions: int
    taps: int
    warps: int


class ForwardPatches(NamedTuple):
    """A result by patches.

    ``rows`` of a patch, where the stride is 1; ``cells``, patches per program; ``warps``;
    ``ahead``, how many rows of a window are read before their use.
    """

    rows: int
    cells: int
    warps: int
    ahead: int


class InputPatches(NamedTuple):
    """An input gradient by patches, a map per program; as :class:`ForwardPatches`.

    ``early``: the convolution's input is read before the products.
    """

    rows: int
    warps: int
    ahead: int
    early: bool = False


class WeightPatches(NamedTuple):
    """A weight gradient by patches.

    ``rows`` of a patch, where the stride is 1; the most ``images``; ``cells``, patches per step;
    ``runs``, rows of a window per program; ``warps``.
    """

    rows: int
    images: int
    cells: int
    runs: int
    warps: int


# By channels, outputs, stride and bytes of a value.
FORWARD_PATCHES: dict[tuple[int, int, int, int], ForwardPatches] = {
    (16, 16, 1, 2): ForwardPatches(2, 64, 4, 1),
    (16, 32, 2, 2): ForwardPatches(2, 64, 4, 1),
    (32, 32, 1, 2): ForwardPatches(1, 64, 4, 1),
}
INPUT_PATCHES: dict[tuple[int, int, int, int], InputPatches] = {
    (16, 16, 1, 2): InputPatches(2, 8, 3),
    (16, 32, 2, 2): InputPatches(2, 8, 3),
    (32, 32, 1, 2): InputPatches(1, 4, 3),
    (32, 64, 2, 2): InputPatches(2, 4, 3),
}
WEIGHT_PATCHES: dict[tuple[int, int, int, int], WeightPatches] = {
    (16, 16, 1, 2): WeightPatches(1, 8, 64, 3, 4),
    (16, 32, 2, 2): WeightPatches(2, 8, 64, 2, 4),
    (32, 32, 1, 2): WeightPatches(1, 8, 64, 1, 4),
}

# By outputs.
FORWARD_TAPS = {16: ForwardTaps(64, 2), 32: ForwardTaps(128, 4), 64: ForwardTaps(64, 4)}
# By channels, the larger of both maps'.
WEIGHT_TAPS = {
    16: WeightTaps(8, 32, 9, 1),
    32: WeightTaps(16, 64, 3, 2),
    64: WeightTaps(32, 64, 1, 4),
}


def _key(
    x: jax.Array, outputs: int, stride: int, size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Of a table of patches; None where patches of some rows would not fill a map."""
    if stride == 1 and min(size) < _MOST_ROWS:
        return None
    return x.shape[-1], outputs, stride, x.dtype.itemsize


def forward(
    x: jax.Array, outputs: int, stride: int, size: tuple[int, int]
) -> ForwardPatches | ForwardTaps:
    """The tile of a result for ``x [N, P, C]``, images of ``size``."""
    key = _key(x, outputs, stride, size)
    return FORWARD_PATCHES[key] if key in FORWARD_PATCHES else FORWARD_TAPS[outputs]


def input_gradient(
    x: jax.Array, outputs: int, stride: int, size: tuple[int, int]
) -> InputPatches | InputTaps:
    """The tile of a gradient in ``x [N, P, C]``, images of ``size``."""
    key = _key(x, outputs, stride, size)
    if key in INPUT_PATCHES:
        return INPUT_PATCHES[key]
    narrow = stride == 2 and x.dtype.itemsize == 2
    # All of a map is on chip: in float32 it needs the registers of more warps.
    return InputTaps(8 if x.shape[1] >= 1024 and not narrow else 4)


def weight_gradient(
    x: jax.Array, outputs: int, stride: int, size: tuple[int, int]
) -> WeightPatches | WeightTaps:
    """The tile of a gradient in the kernel that convolves ``x [N, P, C]``, images of ``size``."""
    key = _key(x, outputs, stride, size)
    return WEIGHT_PATCHES[key] if key in WEIGHT_PATCHES else WEIGHT_TAPS[max(x.shape[-1], outputs)]


def images_per_program(most: int, count: int, shares: int) -> int:
    """The largest divisor of ``count`` up to ``most``, or fewer where programs would be too few.

    ``shares``: programs that one image's work is spread over.
    """
    if count > _ONE_INSTANCE:
        most = max(1, min(most, count * shares // _PROGRAMS))
    return max(d for d in range(1, min(most, count) + 1) if count % d == 0)

"""How :mod:`ttt_jax.kernels.conv.patches` cuts maps: patches, windows, and wider kernels."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.kernels.conv.index import row_column
from ttt_jax.kernels.conv.tiles import TAPS

_NO_TAP = TAPS


class Cut(NamedTuple):
    """How a map is cut into patches, and the windows of the other map that go with them.

    Attributes:
      patch: rows and columns of a patch.
      window: rows and columns of a window.
      step: rows and columns between the windows of neighboring patches.
      first: row and column where the first patch's window begins.
      taps: ``[window rows, window columns, patch rows, patch columns]``, the tap between a
        position of a window and one of its patch, 9 where there is none.
    """

    patch: tuple[int, int]
    window: tuple[int, int]
    step: tuple[int, int]
    first: tuple[int, int]
    taps: np.ndarray

    @property
    def area(self) -> int:
        """The number of positions of a patch."""
        return self.patch[0] * self.patch[1]

    def cells(self, size: tuple[int, int]) -> int:
        """The number of patches of a map of that size."""
        return size[0] * size[1] // self.area


def _cut(
    patch: tuple[int, int],
    window: tuple[int, int],
    step: tuple[int, int],
    first: tuple[int, int],
    tap: Callable[[int, int], int],
) -> Cut:
    """A cut whose taps ``tap(index in the window's map, index in the patch)`` gives per axis."""
    taps = np.full((*window, *patch), _NO_TAP)
    for index in np.ndindex(*taps.shape):
        down, right = (tap(first[k] + index[k], index[2 + k]) for k in (0, 1))
        if 0 <= down < 3 and 0 <= right < 3:
            taps[index] = 3 * down + right
    return Cut(patch, window, step, first, taps)


@functools.cache
def output_patches(stride: int, rows: int) -> Cut:
    """Patches of ``rows x 2`` outputs of a convolution, or of one, and windows of its inputs."""
    patch, window, first = ((rows, 2), (rows + 2, 4), (-1, -1))
    if stride == 2:
        # A column more than the taps read, as runs are powers of two; the left one, so that runs
        # begin at even columns.
        patch, window, first = ((1, 1), (3, 4), (-1, -2))
    step = (stride * patch[0], stride * patch[1])
    return _cut(patch, window, step, first, lambda read, out: read - stride * out + 1)


@functools.cache
def input_patches(stride: int, rows: int) -> Cut:
    """Patches of ``rows x 2`` inputs of a convolution, and windows of its outputs."""
    patch, window, first = ((rows, 2), (rows + 2, 4), (-1, -1))
    if stride == 2:
        patch, window, first = ((2, 2), (2, 2), (0, 0))
    step = (patch[0] // stride, patch[1] // stride)
    return _cut(patch, window, step, first, lambda out, read: read - stride * out + 1)


def widen(w: jax.Array, cut: Cut) -> jax.Array:
    """``[9, C, O]`` as ``[window rows, window columns * C, positions * O]``."""
    _, channels, outputs = w.shape
    wide = jnp.concatenate([w, jnp.zeros_like(w[:1])])[cut.taps].transpose(0, 1, 4, 2, 3, 5)
    return wide.reshape(cut.window[0], cut.window[1] * channels, cut.area * outputs)


def narrow(wide: jax.Array, cut: Cut) -> jax.Array:
    """The transpose of :func:`widen`, with the positions of the patches first.

    Args:
      wide: ``[window rows, positions * O, window columns * C]``.
      cut: the cut.

    Returns:
      ``[9, O, C]``.
    """
    rows, columns = cut.window
    wide = wide.reshape(rows, *cut.patch, wide.shape[1] // cut.area, columns, -1)
    sums = [
        sum(wide[r, k, m, :, u] for r, u, k, m in np.argwhere(cut.taps == tap))
        for tap in range(TAPS)
    ]
    return jnp.stack(sums)


def patch_index(start: Any, count: int, cut: Cut, width: int) -> tuple[jax.Array, jax.Array]:
    """Row and column, in patches, of patches of a map of this width, from ``start`` on."""
    k = start + jax.lax.broadcasted_iota(jnp.int32, (count,), 0)
    return row_column(k, width // cut.patch[1])


def window_row(
    cell: tuple[jax.Array, jax.Array], r: Any, cut: Cut, size: tuple[int, int], channels: int
) -> tuple[jax.Array, jax.Array]:
    """Where row ``r`` of each window lies, ``[cells, window columns * C]``, and what is inside."""
    i, j = cell
    e = jax.lax.broadcasted_iota(jnp.int32, (i.shape[0], cut.window[1] * channels), 1)
    row, left = i * cut.step[0] + (r + cut.first[0]), j * cut.step[1] + cut.first[1]
    column = left[:, None] + jax.lax.div(e, jnp.int32(channels))
    inside = ((row >= 0) & (row < size[0]))[:, None] & (column >= 0) & (column < size[1])
    return ((row * size[1] + left) * channels)[:, None] + e, inside


def patch_offsets(
    cell: tuple[jax.Array, jax.Array], cut: Cut, width: int, channels: int
) -> jax.Array:
    """Where patches lie, ``[cells, positions * C]``."""
    (i, j), (rows, columns) = cell, cut.patch
    e = jax.lax.broadcasted_iota(jnp.int32, (i.shape[0], cut.area * channels), 1)
    run = jnp.int32(columns * channels)
    start = (i * (rows * width) + j * columns) * channels
    return start[:, None] + jax.lax.div(e, run) * (width * channels) + jax.lax.rem(e, run)

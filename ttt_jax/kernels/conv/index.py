"""Where and when the kernels of :mod:`ttt_jax.kernels.conv.passes` read: index, blocks, order."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_Read = TypeVar("_Read")


def row_column(positions: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of positions of a map of that width."""
    return jax.lax.div(positions, jnp.int32(width)), jax.lax.rem(positions, jnp.int32(width))


def gather(
    ref: Any, rows: jax.Array, columns: jax.Array, inside: jax.Array, width: int, base: Any = 0
) -> tuple[jax.Array, jax.Array]:
    """The channels of ``ref`` at rows and columns, zeros outside; and where it is inside."""
    positions = base + jnp.where(inside, rows * width + columns, 0)
    mask = jnp.broadcast_to(inside[:, None], (rows.shape[0], ref.shape[-1]))
    return plgpu.load(ref.at[channel_index(positions, ref.shape[-1])], mask=mask, other=0), mask


def prefetch(count: int, read: Callable[[int], _Read], ahead: int) -> Iterator[_Read]:
    """``read(0)`` to ``read(count - 1)``, each done ``ahead`` steps before it is used."""
    done: list[_Read] = []
    for k in range(count):
        while len(done) < min(k + 1 + ahead, count):
            done.append(read(len(done)))
        yield done[k]


def channel_index(positions: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
    """The indices of all channels at positions, ``[M, C]`` each."""
    shape = (positions.shape[0], channels)
    rows = jnp.broadcast_to(positions[:, None], shape)
    return rows, jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def outputs_reading(
    rows: jax.Array, columns: jax.Array, tap: Any, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The outputs of stride 1 that read the given inputs through a tap, and if there is one."""
    down, right = tap_offset(tap)
    r, c = rows - down, columns - right
    return r, c, (r >= 0) & (c >= 0) & (r < height) & (c < width)


def tap_offset(tap: Any) -> tuple[Any, Any]:
    """How far below and to the right of its output a tap reads; of a traced tap too."""
    tap = jnp.int32(tap)
    return jax.lax.div(tap, jnp.int32(3)) - 1, jax.lax.rem(tap, jnp.int32(3)) - 1


def image_block(positions: int, channels: int) -> pl.BlockSpec:
    """One image of maps ``[N, P, C]``, all of it."""
    return pl.BlockSpec((None, positions, channels), lambda n, *_: (n, 0, 0))


def vector_block(channels: int) -> pl.BlockSpec:
    """One image's part of ``[N, C]``."""
    return pl.BlockSpec((None, channels), lambda n, *_: (n, 0))


def full_block(*shape: int) -> pl.BlockSpec:
    """All of an array."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

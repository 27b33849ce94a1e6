"""Sizes that the kernels of TTT-Linear take, and the configurations in which they run.

Free of Pallas: a machine without its Triton backend may ask as well.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ttt_jax.kernels import _arguments

HEAD_SIZES = (16, 32, 64, 128)
"""Features per head that they take: tiles of the matrix units."""

CHUNK_SIZES = (16, 32, 64)
"""Tokens per chunk that they take."""

DTYPES = ("bfloat16", "float32")
"""Of queries, keys and values."""

COMPARED: frozenset[tuple[int, int, str]] = frozenset()
"""Head size, chunk size and dtype for which ``benchmarks.layers`` has found outputs and all
gradients near those of XLA on a card: the layers take the kernels by themselves for these alone."""


class Tiles(NamedTuple):
    """How a kernel runs.

    Attributes:
      chunks: that a step of its loop, or a program of a parallel kernel, takes at one set of
        weights; 1 or 2.
      warps: per program.
      stages: of the compiler's software pipeline.
      prefetch: whether a step of the loop loads what the next one works on.
    """

    chunks: int = 1
    warps: int = 4
    stages: int = 1
    prefetch: bool = True


class Configuration(NamedTuple):
    """How all kernels of a forward and backward pass run.

    Attributes:
      scan: the chunks one after another.
      read: the outputs of all chunks at once, from weights that the scan has left; None where the
        scan reads as well.
      states: the weights of the chunks between two that were kept.
      back: the gradients from the last chunk to the first.
      prepare: what does not depend on later chunks, before ``back``, which then has the gradients
        of the weights alone; None where ``back`` has all gradients.
      tokens: all other gradients of all chunks at once, after ``back``, with ``prepare``.
    """

    scan: Tiles
    read: Tiles | None
    states: Tiles
    back: Tiles
    prepare: Tiles | None
    tokens: Tiles

    @property
    def split(self) -> bool:
        """Whether the backward pass is in three parts."""
        return self.prepare is not None


_ONE, _TWO, _ONE_OF_TWO_WARPS = Tiles(), Tiles(chunks=2), Tiles(warps=2)
# Never one or two warps in a scan of the backward pass: the compiler then spills (92 ms for 5).
_HALF = (_ONE_OF_TWO_WARPS,) * 3
_WHOLE = Configuration(_TWO, None, _ONE, _ONE, None, _ONE)

CONFIGURATIONS: dict[str, Configuration] = {
    "one": _WHOLE._replace(scan=_ONE),
    "one_2warps": _WHOLE._replace(scan=_ONE_OF_TWO_WARPS),
    "one_no_prefetch": _WHOLE._replace(
        scan=Tiles(stages=3, prefetch=False), back=Tiles(stages=3, prefetch=False)
    ),
    "two": _WHOLE,
    "two_8warps": _WHOLE._replace(scan=Tiles(chunks=2, warps=8), back=Tiles(warps=8)),
    "split": Configuration(_ONE, _ONE, _ONE, _ONE, _ONE, _ONE),
    "split_two": Configuration(_TWO, _TWO, _ONE, _ONE, _ONE, _ONE),
    "split_back": Configuration(_TWO, None, _ONE, _ONE, _ONE, _ONE),
    "split_back_one": Configuration(_ONE, None, _ONE, _ONE, _ONE, _ONE),
    "split_2warps": Configuration(*_HALF, *_HALF)._replace(back=_ONE),
    "split_back_2warps": Configuration(
        _ONE_OF_TWO_WARPS, None, _ONE_OF_TWO_WARPS, _ONE, *[_ONE_OF_TWO_WARPS] * 2
    ),
    "split_no_prefetch": Configuration(
        Tiles(stages=3, prefetch=False), _ONE, _ONE, Tiles(stages=3, prefetch=False), _ONE, _ONE
    ),
}
"""Those that ``benchmarks.layers`` compares and times, by name."""

# Programs from which on the cores are full, so that fewer warps each give more programs at once.
_MANY = 256


def chosen(programs: int) -> str:
    """The name of the configuration for so many heads of sequences at once."""
    return "one_2warps" if programs >= _MANY else "two"


def fits(width: int, chunk_size: int, dtype: Any) -> bool:
    """Whether the kernels take heads of this width, chunks of so many tokens, and this dtype."""
    _arguments.integer("width", width)
    _arguments.integer("chunk_size", chunk_size)
    _arguments.dtype("dtype", dtype)
    sizes = width in HEAD_SIZES and chunk_size in CHUNK_SIZES
    return sizes and jnp.dtype(dtype).name in DTYPES


def described() -> str:
    """What :func:`fits`, in words."""
    widths, chunks = (", ".join(map(str, sizes)) for sizes in (HEAD_SIZES, CHUNK_SIZES))
    return f"d among {widths}, chunk_size among {chunks}, and {' or '.join(DTYPES)}"

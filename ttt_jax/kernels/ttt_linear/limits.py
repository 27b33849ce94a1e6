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
      warps: per program; the tensor cores' products of 64 rows take four.
      stages: of the compiler's software pipeline.
      prefetch: whether a step of the loop loads what the next one works on.
      shares: of a scan: programs that all go along the same chunks, and divide among them what is
        made beside the chain from chunk to chunk; for calls with fewer heads than the GPU has
        cores.
    """

    chunks: int = 1
    warps: int = 4
    stages: int = 1
    prefetch: bool = True
    shares: int = 1


class Configuration(NamedTuple):
    """How all kernels of a forward and backward pass run.

    Attributes:
      scan: the chunks one after another.
      read: the outputs of all chunks at once, from weights that the scan has left for every program
        of it; None where the scan reads as well.
      states: the weights of the chunks between two that were kept.
      back: the gradients from the last chunk to the first.
      prepare: what does not depend on later chunks, among it the gradients by way of the outputs,
        before ``back``, which then has the gradients of the weights alone; None where ``back`` has
        all gradients.
      tokens: what is left of the gradients, of all chunks at once, after ``back``; with
        ``prepare``.
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


_ONE, _TWO, _HALF = Tiles(), Tiles(chunks=2), Tiles(warps=2)
_PIPELINED, _SHARED = Tiles(stages=3, prefetch=False), Tiles(shares=2)
_WHOLE = Configuration(_ONE, None, _ONE, _ONE, None, _ONE)
_SPLIT = Configuration(_ONE, _ONE, _ONE, _ONE, _ONE, _ONE)

CONFIGURATIONS: dict[str, Configuration] = {
    "one": _WHOLE,
    "one_2warps": _WHOLE._replace(scan=_HALF),
    "one_pipelined": _WHOLE._replace(scan=_PIPELINED, back=_PIPELINED),
    "two": _WHOLE._replace(scan=_TWO),
    "split": _SPLIT,
    "split_pipelined": _SPLIT._replace(scan=_PIPELINED, back=_PIPELINED),
    "split_read_two": _SPLIT._replace(read=_TWO),
    "split_read_2warps": _SPLIT._replace(read=_HALF),
    "split_back": _SPLIT._replace(read=None),
    "shared": _SPLIT._replace(scan=_SHARED, read=None, back=_SHARED),
    "shared_two": _SPLIT._replace(scan=_SHARED._replace(chunks=2), read=None, back=_SHARED),
    "shared_pipelined": _SPLIT._replace(scan=_PIPELINED._replace(shares=2), read=None),
}
"""Those that ``benchmarks.layers`` compares and times, by name."""

# Of an H200: a core has room for two programs at a time.
_CORES = 132

# By whether there are more heads than cores, and whether a backward pass follows.
_CHOSEN = {
    (False, False): "shared",
    (False, True): "shared",
    (True, False): "one_2warps",
    (True, True): "one_2warps",
}


def chosen(programs: int, learns: bool) -> str:
    """The name of the configuration.

    Args:
      programs: heads of sequences at once.
      learns: whether a backward pass follows.
    """
    return _CHOSEN[programs > _CORES, learns]


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

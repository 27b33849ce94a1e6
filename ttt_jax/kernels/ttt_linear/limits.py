"""Sizes that the kernels of TTT-Linear take, and the configurations in which they run.

Free of Pallas: a machine without its Triton backend may ask as well.
"""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp

from ttt_jax.kernels import _arguments

HEAD_SIZES = (16, 32, 64, 128)
"""Features per head that they take: tiles of the matrix units."""

CHUNK_SIZES = (16, 32, 64)
"""Tokens per chunk that they take."""

DTYPES = ("bfloat16", "float32")
"""Of queries, keys and values."""

# All sizes, less three in which a gradient is a sum of a few numbers that cancel, over 1e-2 in
# bfloat16, and less three that were not reached: larger ones in float32.
_NOT_COMPARED = {
    *((16, 32, "bfloat16"), (16, 64, "bfloat16"), (32, 16, "bfloat16")),
    *((64, 64, "float32"), (128, 32, "float32"), (128, 64, "float32")),
}
COMPARED: frozenset[tuple[int, int, str]] = frozenset(
    itertools.product(HEAD_SIZES, CHUNK_SIZES, DTYPES)
) - frozenset(_NOT_COMPARED)
"""Head size, chunk size and dtype for which ``benchmarks.layers`` has found outputs and all
gradients near those of XLA on a card: the layers take the kernels by themselves for these alone."""


class Tiles(NamedTuple):
    """How a kernel runs.

    Attributes:
      warps: per program; the tensor cores' products of 64 rows take four.
      shares: of a scan: programs that all go along the same chunks, and divide among them what is
        made beside the chain from chunk to chunk; for calls with fewer heads than the GPU has
        cores.
    """

    warps: int = 4
    shares: int = 1


class Configuration(NamedTuple):
    """How all kernels of a forward and backward pass run.

    Attributes:
      scan: the chunks one after another, and their outputs.
      back: the gradients from the last chunk to the first.
      parts: whether ``back`` has the gradients of the weights alone: what does not depend on later
        chunks is made before it, and what is left after it, each of all chunks at once.
    """

    scan: Tiles
    back: Tiles
    parts: bool


_SHARED = Tiles(shares=2)

CONFIGURATIONS: dict[str, Configuration] = {
    "one": Configuration(Tiles(), Tiles(), parts=False),
    "one_2warps": Configuration(Tiles(warps=2), Tiles(), parts=False),
    "parts": Configuration(Tiles(), Tiles(), parts=True),
    "shared": Configuration(_SHARED, _SHARED, parts=True),
}
"""Those that ``benchmarks.layers`` compares and times, by name."""

# Of an H200: a core has room for two programs at a time.
_CORES = 132


def chosen(programs: int) -> str:
    """The name of the configuration for so many heads of sequences at once."""
    return "one_2warps" if programs > _CORES else "shared"


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

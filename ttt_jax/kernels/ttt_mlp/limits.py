"""Sizes that the kernels of TTT-MLP take.

Free of Pallas: a machine without its Triton backend may ask as well.
"""

import itertools
from typing import Any

import jax.numpy as jnp

from ttt_jax.kernels import _arguments
from ttt_jax.kernels.ttt_linear.limits import Configuration, Tiles

HEAD_SIZES = (16, 32, 64)
"""Features per head that they take."""

HIDDEN_SIZES = (64, 128, 256)
"""Hidden features; the registers of a core hold ``2 d h`` float32 numbers of larger ones hardly."""

CHUNK_SIZES = (16,)
"""Tokens per chunk that they take, as published."""

DTYPES = ("bfloat16", "float32")
"""Of queries, keys and values."""

CONFIGURATION = Configuration(Tiles(warps=8), Tiles(warps=8), parts=False)
"""How the kernels run. Weights of heads of 64 fill half of a core's registers; the backward pass,
which has their gradients as well, spills some."""

_TOO_LARGE = {(64, 256, "float32")}
"""Head size, hidden size and dtype of operands that need 272 KiB of a core's memory, of 227."""


def fits(width: int, hidden: int, chunk_size: int, dtype: Any) -> bool:
    """Whether the kernels take these heads.

    Args:
      width: d, features per head.
      hidden: h, features of the hidden layer.
      chunk_size: tokens per chunk.
      dtype: of queries, keys and values.
    """
    for name, value in (("width", width), ("hidden", hidden), ("chunk_size", chunk_size)):
        _arguments.integer(name, value)
    _arguments.dtype("dtype", dtype)
    sizes = width in HEAD_SIZES and hidden in HIDDEN_SIZES and chunk_size in CHUNK_SIZES
    name = jnp.dtype(dtype).name
    return sizes and name in DTYPES and (width, hidden, name) not in _TOO_LARGE


def described() -> str:
    """What :func:`fits`, in words."""
    widths, hidden = (", ".join(map(str, sizes)) for sizes in (HEAD_SIZES, HIDDEN_SIZES))
    return (
        f"d among {widths}, a hidden width among {hidden}, chunk_size "
        f"{', '.join(map(str, CHUNK_SIZES))}, and {' or '.join(DTYPES)} (d = 64 with "
        "256 in bfloat16 alone)"
    )


COMPARED: frozenset[tuple[int, int, int, str]] = frozenset(
    sizes
    for sizes in itertools.product(HEAD_SIZES, HIDDEN_SIZES, CHUNK_SIZES, DTYPES)
    if fits(*sizes)
)
"""Head size, hidden size, chunk size and dtype for which ``benchmarks.layers_mlp`` has found
outputs and all gradients near those of XLA on a card (``bench_ttt_mlp_shapes.json``): the layers
take the kernels by themselves for these alone."""

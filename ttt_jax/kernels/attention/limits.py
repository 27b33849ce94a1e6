"""Sizes that the kernels of attention take: of few tokens, and of seen blocks.

Free of Pallas: a machine without its Triton backend may ask as well.
"""

from ttt_jax.kernels import _arguments

MOST_TOKENS = 64
"""The most tokens that the kernel of few tokens takes."""

HEAD_SIZES = (16, 32, 64, 128)
"""Features per head that they take: tiles of the matrix units."""

_CHUNK_MULTIPLE = 16


def fits(tokens: int, head_size: int) -> bool:
    """Whether the kernel of few tokens takes such sequences with so many features per head."""
    _arguments.integer("tokens", tokens)
    _arguments.integer("head_size", head_size)
    return tokens <= MOST_TOKENS and head_size in HEAD_SIZES


def fits_sparse(tokens: int, head_size: int) -> bool:
    """Whether the kernel of seen blocks takes so many tokens with so many features per head."""
    _arguments.integer("tokens", tokens)
    _arguments.integer("head_size", head_size)
    return tokens % _CHUNK_MULTIPLE == 0 and head_size in HEAD_SIZES

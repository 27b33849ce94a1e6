"""Sizes that the kernel of :mod:`ttt_jax.kernels.attention.kernel` takes.

Free of Pallas: a machine without its Triton backend may ask as well.
"""

from ttt_jax.kernels import _arguments

MOST_TOKENS = 64
"""The most tokens that the kernel takes."""

HEAD_SIZES = (16, 32, 64, 128)
"""The features per head that the kernel takes: tiles of the matrix units."""


def fits(tokens: int, head_size: int) -> bool:
    """Whether the kernel takes sequences of that length with so many features per head."""
    _arguments.integer("tokens", tokens)
    _arguments.integer("head_size", head_size)
    return tokens <= MOST_TOKENS and head_size in HEAD_SIZES

"""Kernels for a GPU, each beside the form in XLA that gives equal results; needs jax alone.

One folder per operation: :mod:`conv`, :mod:`attention`, :mod:`ttt_linear` and :mod:`ttt_mlp`.
Pallas is imported nowhere else, and there when a kernel is first run.
"""

from ttt_jax.kernels import attention, conv, ttt_linear, ttt_mlp

__all__ = ["attention", "conv", "ttt_linear", "ttt_mlp"]

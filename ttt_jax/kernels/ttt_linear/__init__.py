"""TTT-Linear in kernels for an NVIDIA GPU, one or two programs for each head of each sequence.

:func:`ttt_linear` is the layer for what :func:`fits`; :func:`supported` says whether a machine has
the kernels. Its form in XLA is ``form="dual"`` of :func:`ttt_jax.layers.ttt_linear`.
"""

from ttt_jax.kernels.ttt_linear.forms import supported, ttt_linear
from ttt_jax.kernels.ttt_linear.limits import fits

__all__ = ["fits", "supported", "ttt_linear"]

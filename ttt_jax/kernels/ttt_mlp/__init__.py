"""TTT-MLP in kernels for an NVIDIA GPU, one program for each head of each sequence.

:func:`ttt_mlp` is the layer for what :func:`fits`; :func:`supported` says whether a machine has
the kernels. Its form in XLA is ``form="dual"`` of :func:`ttt_jax.layers.ttt_mlp`.
"""

from ttt_jax.kernels.ttt_mlp.forms import supported, ttt_mlp
from ttt_jax.kernels.ttt_mlp.limits import fits

__all__ = ["fits", "supported", "ttt_mlp"]

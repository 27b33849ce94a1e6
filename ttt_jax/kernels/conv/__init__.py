"""3x3 convolutions: in two forms of XLA, and as residual blocks in kernels for a GPU.

:func:`conv3x3` is one convolution by XLA. :func:`stem` and :func:`block` are the parts of a
pre-activation ResNet with GroupNorm on kernels of the Triton backend of Pallas, for what
:func:`fits`; :func:`supported` says whether this machine runs them.
"""

from ttt_jax.kernels.conv.block import block
from ttt_jax.kernels.conv.maps import Layer, Maps
from ttt_jax.kernels.conv.stem import stem
from ttt_jax.kernels.conv.support import computes, fits, supported
from ttt_jax.kernels.conv.xla import FORMS, conv3x3

__all__ = [
    "FORMS",
    "Layer",
    "Maps",
    "block",
    "computes",
    "conv3x3",
    "fits",
    "stem",
    "supported",
]

"""Attention of every token to all: in products of XLA, or in fused kernels on a GPU.

:func:`attend` takes a form, which :func:`form_of` chooses for a machine; :func:`products` and
:func:`flash` are two of its ways, the third is a kernel for what :func:`fits`.
"""

from ttt_jax.kernels.attention.forms import FORMS, attend, flash, form_of, products
from ttt_jax.kernels.attention.limits import fits

__all__ = ["FORMS", "attend", "fits", "flash", "form_of", "products"]

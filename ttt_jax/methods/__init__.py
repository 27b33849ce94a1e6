"""Published methods, one call each; all but the model functions is keyword-only.

Whole batches and streams (the instance is a batch):

* :func:`tent`, :func:`pseudo_label`, :func:`sar`: a :class:`~ttt_jax.Stream` by entropy
* :func:`eata`, :func:`actmad`, :func:`ttt_plus_plus`: a :class:`~ttt_jax.FromSource`, which
  measures source data first

Defaults are those of the publication. Every docstring has the formula, the published setting,
how the method fails, its cost, its source, and what differs from the authors' code.
"""

from ttt_jax.methods.actmad import actmad
from ttt_jax.methods.eata import eata
from ttt_jax.methods.pseudo_label import pseudo_label
from ttt_jax.methods.sar import sar
from ttt_jax.methods.tent import tent
from ttt_jax.methods.ttt_plus_plus import ttt_plus_plus

__all__ = [
    "actmad",
    "eata",
    "pseudo_label",
    "sar",
    "tent",
    "ttt_plus_plus",
]

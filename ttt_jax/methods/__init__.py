"""Published methods, one call each; all but the model functions is keyword-only.

Whole batches and streams:

* :func:`tent`, :func:`pseudo_label`, :func:`sar`, :func:`rdumb`, :func:`deyo`, :func:`cotta`,
  :func:`rotta`, :func:`note`: a :class:`~ttt_jax.Stream` of batches, by gradient steps
* :func:`eata`, :func:`actmad`, :func:`ttt_plus_plus`: a :class:`~ttt_jax.FromSource`, which
  measures source data first
* :func:`lame` (a :class:`~ttt_jax.Predictor` over a batch), :func:`t3a`, :func:`dua`: no gradient

Defaults are those of the publication. Every docstring has the formula, the published setting,
how the method fails, its cost, its source, and what differs from the authors' code.
"""

from ttt_jax.methods.actmad import actmad
from ttt_jax.methods.cotta import cotta
from ttt_jax.methods.deyo import deyo
from ttt_jax.methods.dua import dua
from ttt_jax.methods.eata import eata
from ttt_jax.methods.lame import lame
from ttt_jax.methods.note import note
from ttt_jax.methods.pseudo_label import pseudo_label
from ttt_jax.methods.rdumb import rdumb
from ttt_jax.methods.rotta import rotta
from ttt_jax.methods.sar import sar
from ttt_jax.methods.t3a import t3a
from ttt_jax.methods.tent import tent
from ttt_jax.methods.ttt_plus_plus import ttt_plus_plus

__all__ = [
    "actmad",
    "cotta",
    "deyo",
    "dua",
    "eata",
    "lame",
    "note",
    "pseudo_label",
    "rdumb",
    "rotta",
    "sar",
    "t3a",
    "tent",
    "ttt_plus_plus",
]

"""Published methods, one call each; all but the model functions is keyword-only.

One instance, which is forgotten (a :class:`~ttt_jax.Predictor`):

* :func:`source`, :func:`augmented`, :func:`every_view`, :func:`bn_adapt`: no gradient
* :func:`ttt_rotation`, :func:`ttt_rotation_statistics`, :func:`ttt_mae`, :func:`ttt_denoising`:
  an auxiliary head
* :func:`memo`: the classifier alone; :func:`rotation_memo`: with an auxiliary head
* :func:`neighbors`: a :class:`~ttt_jax.FromSource`, with a pool of source data

A document, chunk by chunk (a :class:`~ttt_jax.Predictor`):

* :func:`document_ttt`, :func:`end_to_end`, :func:`in_place`, :func:`in_place_targets`: its scores;
  :func:`continue_document`: what comes next; :func:`document_adapter`: what was learned
* :func:`neighbors_ttt`: a :class:`~ttt_jax.FromSource`, with passages of a corpus
* :func:`merged_adapters`, of clusters of a corpus; :func:`passages_adapter` trains them

A few-shot task (a :class:`~ttt_jax.Predictor`):

* :func:`few_shot_ttt`: learned from its demonstrations; :func:`few_shot_adapter`: what was learned;
  :func:`few_shot_shared`: the control, one copy for all

A set of prompts (a :class:`~ttt_jax.Predictor`):

* :func:`ttrl`: reinforcement by votes

A problem whose solutions a program scores (a :class:`~ttt_jax.Predictor`):

* :func:`discover`: search and reinforcement for the best solution

Streams of instances (a :class:`~ttt_jax.Stream`):

* :func:`ttt_rotation_online`, :func:`rotation_memo_online`

What any of them may predict with: :func:`mean_over_views`.

Whole batches and streams (an instance is a batch):

* :func:`tent`, :func:`pseudo_label`, :func:`rpl`, :func:`sar`, :func:`rdumb`, :func:`deyo`,
  :func:`cotta`, :func:`rotta`, :func:`note`: a :class:`~ttt_jax.Stream` of batches, by gradient
  steps
* :func:`eata`, :func:`actmad`, :func:`ttt_plus_plus`: a :class:`~ttt_jax.FromSource`, which
  measures source data first
* :func:`lame` (a :class:`~ttt_jax.Predictor` over a batch), :func:`t3a`, :func:`dua`: no gradient

Defaults are those of the publication. Every docstring has the formula, the published setting,
how the method fails, its cost, its source, and what differs from the authors' code.
"""

from ttt_jax.methods.actmad import actmad
from ttt_jax.methods.augmented import augmented, every_view, mean_over_views
from ttt_jax.methods.bn_adapt import bn_adapt
from ttt_jax.methods.continue_document import continue_document, document_adapter
from ttt_jax.methods.cotta import cotta
from ttt_jax.methods.deyo import deyo
from ttt_jax.methods.discover import discover
from ttt_jax.methods.document_ttt import document_ttt
from ttt_jax.methods.dua import dua
from ttt_jax.methods.eata import eata
from ttt_jax.methods.end_to_end import end_to_end
from ttt_jax.methods.few_shot_ttt import few_shot_adapter, few_shot_shared, few_shot_ttt
from ttt_jax.methods.in_place import in_place
from ttt_jax.methods.in_place_targets import in_place_targets
from ttt_jax.methods.lame import lame
from ttt_jax.methods.memo import memo
from ttt_jax.methods.merged_adapters import merged_adapters, passages_adapter
from ttt_jax.methods.neighbors import neighbors
from ttt_jax.methods.neighbors_ttt import neighbors_ttt
from ttt_jax.methods.note import note
from ttt_jax.methods.pseudo_label import pseudo_label
from ttt_jax.methods.rdumb import rdumb
from ttt_jax.methods.rotation_memo import rotation_memo, rotation_memo_online
from ttt_jax.methods.rotta import rotta
from ttt_jax.methods.rpl import rpl
from ttt_jax.methods.sar import sar
from ttt_jax.methods.source import source
from ttt_jax.methods.t3a import t3a
from ttt_jax.methods.tent import tent
from ttt_jax.methods.ttrl import ttrl
from ttt_jax.methods.ttt_denoising import ttt_denoising
from ttt_jax.methods.ttt_mae import ttt_mae
from ttt_jax.methods.ttt_plus_plus import ttt_plus_plus
from ttt_jax.methods.ttt_rotation import ttt_rotation, ttt_rotation_online
from ttt_jax.methods.ttt_rotation_statistics import ttt_rotation_statistics

__all__ = [
    "actmad",
    "augmented",
    "bn_adapt",
    "continue_document",
    "cotta",
    "deyo",
    "discover",
    "document_adapter",
    "document_ttt",
    "dua",
    "eata",
    "end_to_end",
    "every_view",
    "few_shot_adapter",
    "few_shot_shared",
    "few_shot_ttt",
    "in_place",
    "in_place_targets",
    "lame",
    "mean_over_views",
    "memo",
    "merged_adapters",
    "neighbors",
    "neighbors_ttt",
    "note",
    "passages_adapter",
    "pseudo_label",
    "rdumb",
    "rotation_memo",
    "rotation_memo_online",
    "rotta",
    "rpl",
    "sar",
    "source",
    "t3a",
    "tent",
    "ttrl",
    "ttt_denoising",
    "ttt_mae",
    "ttt_plus_plus",
    "ttt_rotation",
    "ttt_rotation_online",
    "ttt_rotation_statistics",
]

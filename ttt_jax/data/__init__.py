"""The data floor: where examples come from, how they are corrupted, in which order they come.

* :func:`load` opens a set (``"tfds:digits"``, ``"tfds:NAME"``, ``"npz:PATH"``) as a
  :class:`Source`: random access, checked lengths, ids that stay with their sample;
  :func:`long_tailed` takes a part of one whose classes are of unequal size.
* :mod:`~ttt_jax.data.corruptions`: the 15 + 4 common corruptions as seeded functions.
* :mod:`~ttt_jax.data.streams`: plans that say which example comes when and how corrupted.
* :mod:`~ttt_jax.data.grid_sequences`: pairs of colored grids as tokens, packed into rows;
  :mod:`~ttt_jax.data.grid_rules`: tasks of small grids with drawn rules.
* :mod:`~ttt_jax.data.tokenizers`: text to token ids and back, as a decoder's files have it.
* :mod:`~ttt_jax.data.few_shot`: tasks of a few demonstrations and queries;
  :mod:`~ttt_jax.data.isomorphism`: whether their answers were trained on.
* :class:`Loader` turns a source and a plan into batches; :func:`training_batches` is the
  endless shuffled iterator of a training run, :func:`training_places` its order. All resume from
  a saved position.

Everything is NumPy; nothing needs TensorFlow.
"""

from ttt_jax.data import (
    corruptions,
    few_shot,
    grid_rules,
    grid_sequences,
    isomorphism,
    streams,
    tokenizers,
)
from ttt_jax.data.demo import DemoDigits, demo
from ttt_jax.data.loader import DomainBatch, Loader, training_batches, training_places
from ttt_jax.data.long_tail import long_tailed
from ttt_jax.data.sources import Batch, Example, Source, load

__all__ = [
    "Batch",
    "DemoDigits",
    "DomainBatch",
    "Example",
    "Loader",
    "Source",
    "corruptions",
    "demo",
    "few_shot",
    "grid_rules",
    "grid_sequences",
    "isomorphism",
    "load",
    "long_tailed",
    "streams",
    "tokenizers",
    "training_batches",
    "training_places",
]

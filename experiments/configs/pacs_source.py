"""PACS with one domain left out: the model trained without the auxiliary task (row ``source``).

Command: ``python -m experiments.train --workdir=V
--config=experiments/configs/pacs_source.py:sketch``, then the same with ``experiments.adapt``; the
data are those of ``pacs.py``, the work folder is its own.

Cost: an estimate: a minute of training per seed on one H100.

Expect: unknown; no result is committed. ``docs/results_other.md`` has the joint model.
"""

import ml_collections

from experiments.configs import pacs


def get_config(held_out: str = "sketch") -> ml_collections.ConfigDict:
    """The configuration of the model without the auxiliary task.

    Args:
      held_out: the domain that is tested and not trained on.
    """
    config = pacs.get_config(held_out)
    config.train.aux = "none"
    config.methods = ml_collections.ConfigDict(
        {"source": {}, "augmented": {"num_views": 32}, "memo": config.methods.memo},
        convert_dict=True,
    )
    return config

"""PACS with one domain left out: the model trained without the auxiliary task (row ``source``).

Command: ``python -m experiments.train --workdir=V
--config=experiments/configs/pacs_source.py:sketch``, then the same with ``experiments.adapt``; the
data are those of ``pacs.py``, the work folder is its own.

Cost: on one H100, four domains side by side, two and a half minutes of training for three seeds and
one of adapting.

Expect: an error of 60 % in the mean over the four domains, 8 points above the joint model's
(``docs/results_other.md``).
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

"""CIFAR-10, JPEG q75, level 5: the model trained without the auxiliary task (row ``source``).

Command: ``python -m experiments.train --workdir=V
--config=experiments/configs/cifar10c_level5_source.py``, then the same with ``experiments.adapt``;
the data are those of ``cifar10c_level5.py``, the work folder is its own.

Cost: about two and a half minutes of training on one H100, beside other work.

Expect: errors near those of the joint model; in the paper joint training is slightly better.
"""

import ml_collections

from experiments.configs import cifar10c_level5


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the model without the auxiliary task."""
    config = cifar10c_level5.get_config()
    config.train.aux = "none"
    config.methods = ml_collections.ConfigDict(
        {"source": {}, "augmented": {"num_views": 32}}, convert_dict=True
    )
    return config

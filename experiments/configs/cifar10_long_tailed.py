"""CIFAR-10, JPEG q75, long-tailed training set, level 5: whom does adaptation help?

Command: ``python -m experiments.train --workdir=W
--config=experiments/configs/cifar10_long_tailed.py``, then the same with ``experiments.adapt``; the
data are those of ``cifar10c_level5.py``. ``--config.data.imbalance=10`` is the milder tail.

Cost: on one H100 in bfloat16 two minutes of training and seven of adapting.

Expect: views of an image, with MEMO's gradient or without, lower the error of
the frequent classes by two points and raise that of the rare ones by one and a half; rotation
lowers that of every group by half a point to one.

Training images fall from about 4,900 of the first class to 48 of the last one (Cao et al.
2019, CIFAR-10-LT, imbalance 100), some 12,000 in all; cross-entropy, no re-weighting and no
margins. Validation and test images are as in the balanced set, where every class has as many. Rows
have ``error_many``, ``error_medium`` and ``error_few`` beside ``error``: airplane, automobile,
bird; cat, deer, dog, frog; horse, ship, truck. The groups are thirds of the classes by their number
of training images: a definition of this project.

Training has as many epochs as in ``cifar10c_level5.py``, so a quarter of the steps. The test-time
settings are the published ones for the balanced set; nothing is chosen on any corruption.
"""

import ml_collections

from experiments.configs import cifar10c_level5


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the joint model of a long-tailed training set."""
    config = cifar10c_level5.get_config()
    config.data.imbalance = 100
    config.train.update({"num_steps": 15000, "save_every": 5000})
    for name in set(config.methods) - {"joint", "augmented", "rotation", "memo"}:
        del config.methods[name]
    return config

"""CIFAR-10, JPEG q75, level 5: MEMO as published, on the model without the auxiliary task.

Command: ``python -m experiments.adapt --workdir=M
--config=experiments/configs/cifar10c_memo.py --checkpoint=C/seed_0`` with the model of
``cifar10c_level5_source.py`` (``experiments/results/checkpoints/cifar10_source_seed0.tgz``,
unpacked in C), or ``experiments.train`` first; the data are those of ``cifar10c_level5.py``.

Cost: on one H100 in bfloat16 five minutes of adapting beside other work, compilation included.

Expect: under corruption 12 % (relative) below the model without the auxiliary task over AugMix
views, 8 % over crops and flips and 7 % for ``augmented``; AugMix views over all five severities
14 % (``cifar10c_memo_severities.json``). The authors' means are over all five too, of lossless
images and with a model of their own: compare gains, not levels.

``memo_augmix`` is the published method (Zhang et al. 2022; github.com/zhangmarvin/memo): 32 AugMix
views, one SGD step of 0.005 on all parameters, without momentum or weight decay, then the plain
image. ``memo`` is the same over crops and flips, as in ``cifar10c_level5.py``, and ``augmented``
the mean prediction over them. AugMix starts from a crop as in training, here as there; the authors
fill its rim with black, here and in our training the edge is repeated.
"""

import ml_collections

from experiments.configs import cifar10c_level5, cifar10c_level5_source


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the model without the auxiliary task and of MEMO over two views."""
    config = cifar10c_level5_source.get_config()
    memo = cifar10c_level5.get_config().methods.memo
    config.methods.memo = {**memo, "augment": "crops"}
    config.methods.memo_augmix = {"method": "memo", **memo, "augment": "augmix"}
    return config

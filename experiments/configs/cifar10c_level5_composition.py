"""CIFAR-10, JPEG q75, level 5: the composition that long validation streams choose.

Command: ``python -m experiments.adapt --workdir=W
--config=experiments/configs/cifar10c_level5_composition.py --checkpoint=C/seed_0`` with the joint
model of ``cifar10c_level5.py`` (``experiments/results/checkpoints``), or ``experiments.train``
first; the data are those of ``cifar10c_level5.py``.

Cost: on one H100 in bfloat16 a minute per candidate and four of adapting, compilation included.

Expect: no entropy and the largest step are chosen; 40 % (relative) below the joint model under
corruption, 31 % with a step three times as large (``cifar10c_level5_composition_step.json``). In
``cifar10c_level5.py``, whose validation streams have 1,000 images, some marginal entropy is chosen
for ``rotation_memo_augmented_online``, and collapses on the test streams of 10,000. Here the
validation images pass ten times, and 0 is among the weights of the entropy: online rotation alone,
predicted by the mean over views. Both were decided after that collapse had been seen.
"""

import ml_collections

from experiments.configs import cifar10c_level5


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the composition and its candidates."""
    config = cifar10c_level5.get_config()
    config.adapt.selection_passes = 10
    composition = config.methods.rotation_memo_augmented_online
    composition.memo_weight = (0.0, 0.1, 0.3)
    config.methods = ml_collections.ConfigDict(
        {"joint": {"method": "source"}, "rotation_memo_augmented_online": composition},
        convert_dict=True,
    )
    return config

"""CIFAR-10, JPEG q75, level 5: rotation on parts of the network, and with neighbors.

Command: ``python -m experiments.adapt --workdir=W
--config=experiments/configs/cifar10c_level5_parts.py --checkpoint=C/seed_0`` with the joint model
of ``cifar10c_level5.py`` (``experiments/results/checkpoints/cifar10_joint_seed0.tgz``, unpacked in
C), or ``experiments.train`` first; the data are those of ``cifar10c_level5.py``.

Cost: on one H100 the choice of the step sizes took six minutes beside other work, most of them
compiling; the test images are about as many sample-steps as ``rotation`` takes on all, as many
again for the neighbors.

Expect: what adapts fewer parameters needs a larger step, so the validation corruptions choose its
size. Of 25.8 % there, the best sizes leave 24.0 on the whole encoder and on its norms, 23.9 on its
biases and 24.5 on its last stage (``cifar10c_level5_parts.json``, which has no test images yet);
with neighbors unknown. ``rotation`` is as published. Neighbors are the three
nearest of all training images (Hardt and Sun 2024, there of texts). The first 2,000 test images of
every domain.
"""

import ml_collections

from experiments.configs import cifar10c_level5


def get_config() -> ml_collections.ConfigDict:
    """The configuration of rotation on parts."""
    config = cifar10c_level5.get_config()
    config.data.test = "test[:20%]"
    encoder = "params/(conv1|layer1|layer2|rotation_.*)/.*"
    steps = {"copies": 32, "num_steps": 10, "trace": True, "probe": "rotation"}
    rotation = {"method": "ttt_rotation", **steps}
    chosen = {**rotation, "learning_rate": (0.001, 0.004, 0.016, 0.064)}
    config.methods = ml_collections.ConfigDict(
        {
            "joint": {"method": "source"},
            "rotation": {**rotation, "learning_rate": 0.001, "select": encoder},
            "rotation_tuned": {**chosen, "select": encoder},
            "rotation_norm": {**chosen, "select": "norm"},
            "rotation_biases": {**chosen, "select": "biases"},
            # The last of the blocks that both tasks share, and the head of the task.
            "rotation_blocks": {**chosen, "select": "params/(layer2|rotation_.*)/.*"},
            "rotation_neighbors": {
                "method": "neighbors",
                **steps,
                "learning_rate": 0.001,
                "select": encoder,
                "k": 3,
            },
        },
        convert_dict=True,
    )
    return config

"""A class per pixel in videos of moving digits, under noise and fading, by mean IoU.

Command: ``python -m experiments.train --workdir=W --config=experiments/configs/frames.py``, then
the same with ``experiments.adapt`` and ``experiments.report``.

Cost: about a minute on two CPU cores; nothing is downloaded.

Expect: few classes right where the picture is faded; steps of denoising along the video move the
result a little, in either direction, as the report shows.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the pixel network."""
    config = ml_collections.ConfigDict()
    config.task = "frames"
    config.seeds = (0,)
    config.data = ml_collections.ConfigDict({"name": "tfds:digits", "side": 16, "frames": 96})
    config.model = ml_collections.ConfigDict({"name": "pixel_net", "width": 16})
    config.train = ml_collections.ConfigDict(
        {
            "aux": "experiments.tasks.frames:denoising",
            "aux_weight": 1.0,
            "num_steps": 300,
            "batch_size": 32,
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "log_every": 100,
            "save_every": 150,
        }
    )
    config.adapt = ml_collections.ConfigDict({"batch_size": 32})
    config.methods = ml_collections.ConfigDict(
        {
            "source": {"method": "source"},
            "denoising_online": {
                "method": "experiments.tasks.frames:denoising_online",
                "learning_rate": (0.003, 0.01, 0.03),
            },
        },
        convert_dict=True,
    )
    return config

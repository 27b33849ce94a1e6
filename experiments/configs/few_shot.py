"""Few-shot tasks of small colored grids: a private copy per task learns from its demonstrations.

Command: ``make demo-grids``, or ``python -m experiments.train --workdir=W
--config=experiments/configs/few_shot.py``, then the same with ``experiments.adapt`` and
``experiments.report``. For tasks of your own: ``--config.data.source=json:FOLDER
--config.data.train=generated`` (or ``arc``, with ``--config.data.version``).

Cost: minutes on two CPU cores; the rules are drawn, nothing is downloaded.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration of drawn rules."""
    config = ml_collections.ConfigDict()
    config.task = "few_shot"
    config.seeds = (0,)
    config.data = ml_collections.ConfigDict(
        {"name": "grid rules", "source": "generated", "tasks": 200, "reported": 40}
        | {"validation": 15, "side": 4, "demonstrations": 3, "views": 8, "recolor": False}
        | {"rows": 8, "length": 256}
    )
    config.model = ml_collections.ConfigDict(
        {"name": "grid_decoder", "width": 64, "depth": 3, "heads": 2, "mlp_width": 128}
    )
    config.train = ml_collections.ConfigDict(
        {
            "aux": "none",
            "num_steps": 1000,
            "batch_size": 8,
            "unknown": 0.2,
            "optimizer": "adamw",
            "learning_rate": 1e-2,
            "warmup_steps": 20,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "steps_per_call": 10,
            "log_every": 100,
            "save_every": 500,
        }
    )
    config.adapt = ml_collections.ConfigDict({"batch_size": 8})
    everything = {"optimizer": "adam", "select": "all", "rows": 2}
    config.methods = ml_collections.ConfigDict(
        {
            "source": {},
            "few_shot_ttt": {**everything, "num_steps": 30, "learning_rate": (3e-3, 1e-2)},
            "guarded": {
                **{"method": "few_shot_ttt", **everything, "num_steps": 30},
                **{"held_out": 3, "every": 5, "learning_rate": 1e-2},
            },
        },
        convert_dict=True,
    )
    return config

"""Toy few-shot tasks: a rule per task that only its demonstrations tell.

Command: ``python -m experiments.train --workdir=W --config=experiments/configs/few_shot.py``, then
the same with ``experiments.adapt`` and ``experiments.report``.

Cost: half a minute on two CPU cores; the tasks are drawn, nothing is downloaded.

Expect: nothing solved without adapting, since a rule is drawn for every task, and most tasks after
gradient steps on their demonstrations.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the toy tasks."""
    config = ml_collections.ConfigDict()
    config.task = "few_shot"
    config.seeds = (0,)
    config.data = ml_collections.ConfigDict(
        {"name": "color rules", "colors": 6, "side": 4, "demos": 3, "tasks": 64}
    )
    config.model = ml_collections.ConfigDict({"name": "color_table", "width": 16})
    config.train = ml_collections.ConfigDict(
        {
            "aux": "none",
            "num_steps": 100,
            "batch_size": 32,
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "log_every": 50,
            "save_every": 100,
        }
    )
    config.adapt = ml_collections.ConfigDict({"batch_size": 32})
    config.methods = ml_collections.ConfigDict(
        {
            "source": {"method": "source"},
            "demonstrations": {
                "method": "experiments.tasks.few_shot:demonstrations",
                "num_steps": 30,
                "learning_rate": (0.1, 0.3, 1.0, 3.0),
            },
        },
        convert_dict=True,
    )
    return config

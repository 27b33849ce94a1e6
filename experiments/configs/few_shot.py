"""Few-shot tasks of small colored grids: a private copy per task learns from its demonstrations.

Command: ``make demo-grids``, or ``python -m experiments.train --workdir=W
--config=experiments/configs/few_shot.py``, then the same with ``experiments.adapt`` and
``experiments.report``. For tasks of your own: ``--config.data.source=json:FOLDER
--config.data.train=generated`` (or ``arc``, with ``--config.data.version``).

Cost: about five minutes of one CPU core; the rules are drawn, nothing is downloaded.

Expect: next to nothing solved by the decoder as it is, since a rule is drawn for every task, and
about 17 of 40 tasks by private copies: those that change colors, hardly any that move cells. A copy
that tasks share solves 11. The guard costs some and saves none, as no task is there to be lost.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration of drawn rules."""
    config = ml_collections.ConfigDict()
    config.task = "few_shot"
    config.seeds = (0,)
    config.data = ml_collections.ConfigDict(
        {"name": "grid rules", "source": "generated", "tasks": 215, "validation": 15}
        | {"reported": 40, "side": 4, "demonstrations": 3, "recolor": False}
        | {"views": 4, "rows": 8, "length": 128}
    )
    config.model = ml_collections.ConfigDict(
        {"name": "grid_decoder", "width": 48, "depth": 2, "heads": 3, "mlp_width": 96}
    )
    config.train = ml_collections.ConfigDict(
        {
            "aux": "none",
            "num_steps": 800,
            "batch_size": 12,
            "unknown": 0.2,
            "optimizer": "adamw",
            "learning_rate": 1e-2,
            "warmup_steps": 20,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "steps_per_call": 10,
            "log_every": 100,
            "save_every": 400,
        }
    )
    config.adapt = ml_collections.ConfigDict({"batch_size": 8})
    learns = {"method": "few_shot_ttt", "optimizer": "adam", "rows": 2, "num_steps": 30}
    config.methods = ml_collections.ConfigDict(
        {
            "source": {},
            "few_shot_ttt": {
                **{**learns, "select": "all", "trace": True},
                "learning_rate": (3e-3, 1e-2),
            },
            "guarded": {
                **{**learns, "select": "all", "held_out": 3, "every": 10},
                "learning_rate": 1e-2,
            },
            # One copy for the tasks of a batch, not per task.
            "few_shot_shared": {**learns, "method": "few_shot_shared", "select": "all"}
            | {"learning_rate": (3e-3, 1e-2)},
            # The task's own vectors alone, a few hundred numbers.
            "vector": {**learns, "select": "params/(task|task_view)", "learning_rate": 0.1},
        },
        convert_dict=True,
    )
    return config

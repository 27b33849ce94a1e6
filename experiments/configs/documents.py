"""A byte-level decoder on the standard library's own sources, adapted to each unseen file.

Command: ``make demo-text``, or ``python -m experiments.train --workdir=W
--config=experiments/configs/documents.py``, then the same with ``experiments.adapt`` and
``experiments.report``.

Cost: about four minutes on two CPU cores; nothing is downloaded. The figures depend on the Python
release, whose files are the data.

Expect: fewer bits per byte on unseen files by learning from each chunk after it was scored. What
adapts and the step size are chosen on other files. The controls beside it: windows of the same
length, each alone (``isolated``); three times the window, which costs what a step does
(``longer``); a step size of 0, which scores every token as the source does (``still``); one adapter
that all documents share (``shared``, not per document); every document under the adapter of
another one, which says what adapting forgets (``crossed``).
"""

import ml_collections

CONTROLS = "experiments.tasks.document_controls"


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the decoder."""
    config = ml_collections.ConfigDict()
    config.task = "documents"
    config.seeds = (0,)
    config.data = ml_collections.ConfigDict(
        {
            "name": "stdlib",
            "folder": "",
            "chunk": 64,
            "chunks": 64,
            "window": 96,
            "sinks": 4,
            "least": 1024,
            "most": 12,
        }
    )
    config.model = ml_collections.ConfigDict(
        {"name": "byte_decoder", "width": 64, "depth": 2, "heads": 2, "rank": 4}
        | {"alpha": 8.0, "paths": (".*/query", ".*/value", ".*/down")}
    )
    config.train = ml_collections.ConfigDict(
        {
            "aux": "none",
            "num_steps": 300,
            "batch_size": 8,
            "length": 288,
            "optimizer": "adamw",
            "learning_rate": 1e-2,
            "warmup_steps": 20,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "steps_per_call": 10,
            "log_every": 50,
            "save_every": 150,
        }
    )
    config.adapt = ml_collections.ConfigDict({"batch_size": 6})
    config.methods = methods(window=config.data.window)
    return config


def methods(window: int) -> ml_collections.ConfigDict:
    """Adaptation of all parameters and of low-rank leaves, with their controls.

    Args:
      window: ``data.window``, of which ``longer`` has three.
    """
    low_rank = {"optimizer": "adam", "b2": 0.95, "eps": 1e-10, "select": "lora"}
    everything = {"optimizer": "sgd", "select": "all"}
    return ml_collections.ConfigDict(
        {
            "source": {},
            "isolated": {"method": "source", "cache": "isolated"},
            "longer": {"method": "source", "window": 3 * window},
            "still": {"method": "document_ttt", **everything, "learning_rate": 0.0},
            "document_ttt": {**everything, "learning_rate": (0.03, 0.1, 0.3)},
            "low_rank": {"method": "document_ttt", **low_rank, "learning_rate": (3e-3, 1e-2)},
            "shared": {
                **{"method": f"{CONTROLS}:shared", **everything},
                "learning_rate": (0.1, 0.3),
            },
            "crossed": {"method": f"{CONTROLS}:crossed", **everything, "learning_rate": 0.1},
        },
        convert_dict=True,
    )


def sweep(add) -> None:
    """A trial per step size."""
    for learning_rate in (0.03, 0.1, 0.3):
        add(**{"methods.document_ttt.learning_rate": (learning_rate,)})

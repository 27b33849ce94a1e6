"""A byte-level decoder on the standard library's own sources, adapted to each unseen file.

Command: ``python -m experiments.train --workdir=W --config=experiments/configs/documents.py``, then
the same with ``experiments.adapt`` and ``experiments.report``.

Cost: a few minutes on two CPU cores; nothing is downloaded. The figures depend on the Python
release, whose files are the data.

Expect: fewer bits per byte on unseen files by learning from each chunk after it was scored; the
step size is chosen on other files.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the decoder."""
    config = ml_collections.ConfigDict()
    config.task = "documents"
    config.seeds = (0,)
    config.data = ml_collections.ConfigDict(
        {"name": "stdlib", "folder": "", "chunk": 64, "chunks": 24}
    )
    config.model = ml_collections.ConfigDict(
        {"name": "byte_decoder", "width": 64, "depth": 2, "heads": 2}
    )
    config.train = ml_collections.ConfigDict(
        {
            "aux": "none",
            "num_steps": 300,
            "batch_size": 8,
            "optimizer": "adamw",
            "learning_rate": 3e-3,
            "warmup_steps": 20,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "log_every": 50,
            "save_every": 150,
        }
    )
    config.adapt = ml_collections.ConfigDict({"batch_size": 8})
    adapted = {"method": "experiments.tasks.documents:document_ttt", "optimizer": "sgd"}
    config.methods = ml_collections.ConfigDict(
        {
            "source": {"method": "source"},
            "document_ttt": {**adapted, "num_steps": 1, "learning_rate": (0.03, 0.1, 0.3)},
        },
        convert_dict=True,
    )
    return config


def sweep(add) -> None:
    """A trial per step size."""
    for learning_rate in (0.03, 0.1, 0.3):
        add(**{"methods.document_ttt.learning_rate": (learning_rate,)})

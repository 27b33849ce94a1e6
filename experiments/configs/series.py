"""Forecasts of a periodic series whose pace has changed since training.

Command: ``python -m experiments.train --workdir=W --config=experiments/configs/series.py``, then
``experiments.adapt`` with both and ``experiments.report`` with the folder. Series of your own:
``--config.data.file=FILE.npz``, with an array ``[T]`` for ``train``, ``validation`` and
``reported``.

Cost: half a minute on two CPU cores; the series are drawn, nothing is downloaded.

Expect: a squared error of about 0.8 without adapting, and of less than 0.1 after gradient steps on
the forecasts inside of each window, with a step size chosen on a series of another pace.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the series."""
    config = ml_collections.ConfigDict()
    config.task = "series"
    config.seeds = (0,)
    config.data = ml_collections.ConfigDict(
        {
            "name": "waves",
            "file": "",
            "window": 64,
            "seen": 24,
            "horizon": 8,
            "length": 2000,
            "noise": 0.1,
            "periods": {"train": 12.0, "validation": 11.0, "reported": 10.5},
        }
    )
    config.model = ml_collections.ConfigDict({"name": "linear"})
    config.train = ml_collections.ConfigDict(
        {
            "aux": "none",
            "num_steps": 300,
            "batch_size": 32,
            "learning_rate": 0.03,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "log_every": 100,
            "save_every": 300,
        }
    )
    config.adapt = ml_collections.ConfigDict({"batch_size": 64})
    config.methods = ml_collections.ConfigDict(
        {
            "source": {"method": "source"},
            "hindcasts": {
                "method": "experiments.tasks.series:hindcasts",
                "num_steps": 10,
                "learning_rate": (0.01, 0.03, 0.1, 0.3),
            },
        },
        convert_dict=True,
    )
    return config

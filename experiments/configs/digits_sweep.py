"""Step sizes of rotation TTT on digits, 2 seeds x 3 corruptions x 4 step sizes: the example sweep.

Command: ``python -m experiments.sweep --workdir=DIR
--config=experiments/configs/digits_sweep.py``. Each of the 24 trials is one row of
``DIR/results.parquet``; the two models are trained first and shared.

Cost: a minute and a half on two CPU cores.

Expect: two models that differ more than any step size does. Under fog and contrast the first errs
on 80 to 90 %, and the largest step takes off 20 points; the second errs on a third, and the same
step adds 25. Under noise both err on a few percent, and 0.1 is too large.
"""

import ml_collections

from experiments.configs import digits


def get_config() -> ml_collections.ConfigDict:
    """The demo's model, trained less, and one method."""
    config = digits.get_config()
    config.data.test = "test[:180]"
    config.train.update({"num_steps": 600, "save_every": 100})
    config.adapt.severity = 3
    rotation = config.methods.rotation
    rotation.learning_rate = (0.01,)
    config.methods = ml_collections.ConfigDict({"rotation": rotation})
    return config


def sweep(add) -> None:
    """A trial per seed, corruption and step size."""
    for seed in range(2):
        for domain in ("gaussian_noise", "fog", "contrast"):
            for learning_rate in (0.003, 0.01, 0.03, 0.1):
                add(
                    domains=(domain,),
                    seeds=(seed,),
                    **{"methods.rotation.learning_rate": (learning_rate,)},
                )

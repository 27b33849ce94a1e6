"""Step sizes of rotation TTT on digits under fog, 16 of them x 3 seeds: what packing saves.

Command: ``python -m benchmarks.sweep --out=FILE
--config=experiments/configs/digits_packed.py``, which runs the sweep twice, with trials that share
processes and with a process each.

Cost: six minutes on two CPU cores, of which three train the models.

Expect: the same rows bit by bit, in less than a sixth of the time, training apart.
"""

import ml_collections

from experiments.configs import digits_sweep


def get_config() -> ml_collections.ConfigDict:
    """As the example sweep."""
    return digits_sweep.get_config()


def sweep(add) -> None:
    """A trial per seed and step size."""
    for seed in range(3):
        for power in range(16):
            rate = (0.001 * 1.4**power,)
            add(domains=("fog",), seeds=(seed,), **{"methods.rotation.learning_rate": rate})

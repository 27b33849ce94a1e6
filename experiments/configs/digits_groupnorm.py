"""The demo with GroupNorm: a network that the corruptions hurt less, and adaptation helps less.

Command: ``make demo CONFIG=experiments/configs/digits_groupnorm.py WORKDIR=runs/groupnorm``

Cost: about four minutes on two CPU cores.

Expect: a far lower source error under corruption than the BatchNorm model of ``digits.py``, and
little gained by gradient steps over averaging shifted views. Kept for comparison; no measured
result is committed yet.
"""

import ml_collections

from experiments.configs import digits


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the demo with GroupNorm."""
    config = digits.get_config()
    config.model.update({"norm": "group", "groups": 8})
    # Priors act on BatchNorm alone.
    for name in ("norm_prior", "norm_prior_views"):
        del config.methods[name]
    config.methods.augmented.num_views = 144
    del config.methods.rotation_memo_augmented.prior
    return config

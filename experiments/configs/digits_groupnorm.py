"""The demo with GroupNorm: a network that the corruptions hurt less, and adaptation helps less.

Command: ``make demo CONFIG=experiments/configs/digits_groupnorm.py WORKDIR=runs/groupnorm``

Cost: about four minutes on two CPU cores.

Expect: the source model errs on about 17 % under severity-5 corruption, where the BatchNorm model
of ``digits.py`` errs on 47 %; averaging shifted views removes about an eighth of that, and gradient
steps add little to it. A negative result, kept for comparison.
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

"""Auxiliary losses: functions ``(params, x, key) -> scalar`` built by factories.

Every factory takes the pure model function it needs, ``batch=False`` (whether ``x`` already has
a batch axis) and ``stochastic=False`` (whether the model function takes a key).
"""

from ttt_jax.losses.compose import over_batch as over_batch, weighted as weighted
from ttt_jax.losses.entropy import (
    entropy as entropy,
    marginal_entropy as marginal_entropy,
    pseudo_label as pseudo_label,
)
from ttt_jax.losses.reconstruction import masked_reconstruction as masked_reconstruction
from ttt_jax.losses.rotation import rotation as rotation

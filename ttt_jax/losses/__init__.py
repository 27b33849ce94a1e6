"""Auxiliary losses: functions ``(params, x, key) -> scalar`` built by factories.

Every factory takes the pure model function it needs, ``batch=False`` (whether ``x`` already has
a batch axis) and ``stochastic=False`` (whether the model function takes a key).
"""

from ttt_jax.losses.compose import over_batch as over_batch, weighted as weighted
from ttt_jax.losses.contrastive import contrastive as contrastive
from ttt_jax.losses.denoising import denoising as denoising
from ttt_jax.losses.entropy import (
    entropy as entropy,
    marginal_entropy as marginal_entropy,
    pseudo_label as pseudo_label,
)
from ttt_jax.losses.fisher import fisher_diagonal as fisher_diagonal
from ttt_jax.losses.matching import (
    activation_matching as activation_matching,
    activation_moments as activation_moments,
    feature_moments as feature_moments,
    moment_matching as moment_matching,
)
from ttt_jax.losses.packed import (
    packed_sequences as packed_sequences,
    sequence_sums as sequence_sums,
)
from ttt_jax.losses.policy import (
    entropic_advantages as entropic_advantages,
    policy_gradient as policy_gradient,
)
from ttt_jax.losses.reconstruction import masked_reconstruction as masked_reconstruction
from ttt_jax.losses.reliable import (
    reliable_entropy as reliable_entropy,
    sample_adaptive_entropy as sample_adaptive_entropy,
)
from ttt_jax.losses.rotation import rotation as rotation
from ttt_jax.losses.tokens import masked_token as masked_token, next_token as next_token

__all__ = [
    "activation_matching",
    "activation_moments",
    "contrastive",
    "denoising",
    "entropic_advantages",
    "entropy",
    "feature_moments",
    "fisher_diagonal",
    "marginal_entropy",
    "masked_reconstruction",
    "masked_token",
    "moment_matching",
    "next_token",
    "over_batch",
    "packed_sequences",
    "policy_gradient",
    "pseudo_label",
    "reliable_entropy",
    "rotation",
    "sample_adaptive_entropy",
    "sequence_sums",
    "weighted",
]

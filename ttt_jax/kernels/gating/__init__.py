"""The gate of an MLP, ``activation(gate) * up``, whose derivatives one kernel makes together."""

from ttt_jax.kernels.gating.forms import ACTIVATIONS, gated

__all__ = ["ACTIVATIONS", "gated"]

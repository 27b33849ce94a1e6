"""Layers that learn while they read: their state is a network, trained on each token.

* :func:`ttt_linear` and :func:`ttt_mlp`: one head of one sequence, whole
* :class:`TTTCache`, :func:`ttt_cache`, :func:`ttt_prefill` and :func:`ttt_decode`: the same two,
  token by token
"""

from ttt_jax.layers._forms import Cache as TTTCache
from ttt_jax.layers.decode import ttt_cache, ttt_decode, ttt_prefill
from ttt_jax.layers.ttt import ttt_linear, ttt_mlp

__all__ = ["TTTCache", "ttt_cache", "ttt_decode", "ttt_linear", "ttt_mlp", "ttt_prefill"]

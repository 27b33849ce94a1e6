"""Layers that learn while they read: their state is a network, trained on each token.

* :func:`ttt_linear` and :func:`ttt_mlp`: one head of one sequence, whole
* :class:`TTTCache`, :func:`ttt_cache`, :func:`ttt_prefill` and :func:`ttt_decode`: the same two,
  token by token
* :class:`TTTLinear` and :class:`TTTMLP`: Flax Linen modules over them, loaded when they are first
  used, with :class:`LayerCache`; the same in NNX: :mod:`nnx`
* :func:`fast_weight`: any memory on any inner loss, with :class:`Rates`, :class:`FastState` and
  :func:`fast_state`; what it is put together from: :mod:`memories`, :mod:`inner_losses`,
  :mod:`retentions`, :mod:`inner_optimizers`
"""

import importlib
from typing import TYPE_CHECKING, Any

from ttt_jax.layers import inner_losses, inner_optimizers, memories, retentions
from ttt_jax.layers._backbones import LayerCache
from ttt_jax.layers._forms import TTTCache
from ttt_jax.layers.decode import ttt_cache, ttt_decode, ttt_prefill
from ttt_jax.layers.fast_weights import FastState, Rates, fast_state, fast_weight
from ttt_jax.layers.ttt import ttt_linear, ttt_mlp

if TYPE_CHECKING:
    from ttt_jax.layers import nnx
    from ttt_jax.layers.linen import TTTMLP, TTTLinear

_MODULES = ("TTTLinear", "TTTMLP")

__all__ = [
    "TTTMLP",
    "FastState",
    "LayerCache",
    "Rates",
    "TTTCache",
    "TTTLinear",
    "fast_state",
    "fast_weight",
    "inner_losses",
    "inner_optimizers",
    "memories",
    "nnx",
    "retentions",
    "ttt_cache",
    "ttt_decode",
    "ttt_linear",
    "ttt_mlp",
    "ttt_prefill",
]


def __getattr__(name: str) -> Any:
    if name == "nnx":
        return importlib.import_module("ttt_jax.layers.nnx")
    if name in _MODULES:
        return getattr(importlib.import_module("ttt_jax.layers.linen"), name)
    raise AttributeError(f"module 'ttt_jax.layers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "nnx"})

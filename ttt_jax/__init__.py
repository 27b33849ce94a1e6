"""Test-time training as pure functions in JAX.

Published methods, one call each: :mod:`methods`. Random views for them: :mod:`views`.

A step (what adapts, and on which loss):

* :mod:`losses`, :mod:`select`, :mod:`optimizers`, :func:`gradient_adapter`,
  :func:`sharpness_aware_adapter`, :func:`statistics_adapter`, :func:`filtered`

How it is run over instances:

* :func:`source`, :func:`augmented`, :func:`episodic`, :func:`vote`: one instance at a time;
  :func:`adapted`: one that brings its own adapter
* :func:`online`, :func:`unroll`, :func:`episode`, :mod:`resets`: streams; :mod:`readers`:
  documents, chunk by chunk; :mod:`generation` and :mod:`serving`: prompts, token by token
* :func:`batched`, :func:`unbatched`, :func:`sample_keys`, :func:`inner_loop`, :mod:`budget`

Training so that it helps: :mod:`meta`.

What is asked about it:

* :mod:`audit`, :mod:`diagnostics`, :func:`source_statistics`, :mod:`neighbors`; :mod:`votes`
  for the answers of several views

Around it: :mod:`checkpoint`, :mod:`data`, :mod:`models` and :mod:`layers`, which learn while they
read. These four, :mod:`methods` and :mod:`views` are loaded when they are first used.

``import ttt_jax`` costs jax and optax. The contract is in :mod:`ttt_jax.base`.
"""

import importlib
from typing import Any

from ttt_jax import (
    audit,
    budget,
    diagnostics,
    generation,
    losses,
    meta,
    neighbors,
    optimizers,
    passages,
    readers,
    resets,
    select,
    serving,
    votes,
)
from ttt_jax._version import __version__
from ttt_jax.adapters import (
    filtered,
    gradient_adapter,
    sharpness_aware_adapter,
)
from ttt_jax.base import (
    Adapter,
    AdapterState,
    AuxLoss,
    FromSource,
    Info,
    Predictor,
    Reset,
    Selection,
    StatefulLoss,
    StepInfo,
    Stream,
    StreamInfo,
)
from ttt_jax.batching import batched, sample_keys, unbatched
from ttt_jax.inner import inner_loop
from ttt_jax.running_statistics import statistics_adapter

# After the modules whose names they share: `ttt_jax.online` and `ttt_jax.source` are functions.
from ttt_jax.source import SourceStatistics, source_statistics  # isort: skip
from ttt_jax.online import episode, online, unroll  # isort: skip
from ttt_jax.predictors import adapted, augmented, episodic, source, vote  # isort: skip

_ON_DEMAND = (
    "checkpoint",
    "data",
    "evaluation",
    "kernels",
    "layers",
    "methods",
    "metrics",
    "models",
    "task",
    "training",
    "tuning",
    "views",
)

__all__ = [
    "Adapter",
    "AdapterState",
    "AuxLoss",
    "FromSource",
    "Info",
    "Predictor",
    "Reset",
    "Selection",
    "SourceStatistics",
    "StatefulLoss",
    "StepInfo",
    "Stream",
    "StreamInfo",
    "__version__",
    "adapted",
    "audit",
    "augmented",
    "batched",
    "budget",
    "checkpoint",
    "data",
    "diagnostics",
    "episode",
    "episodic",
    "evaluation",
    "filtered",
    "generation",
    "gradient_adapter",
    "inner_loop",
    "kernels",
    "layers",
    "losses",
    "meta",
    "methods",
    "metrics",
    "models",
    "neighbors",
    "online",
    "optimizers",
    "passages",
    "readers",
    "resets",
    "sample_keys",
    "select",
    "serving",
    "sharpness_aware_adapter",
    "source",
    "source_statistics",
    "statistics_adapter",
    "task",
    "training",
    "tuning",
    "unbatched",
    "unroll",
    "views",
    "vote",
    "votes",
]


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"ttt_jax.{name}")
    raise AttributeError(f"module 'ttt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})

"""Test-time training as pure functions in JAX.

``import ttt_jax`` costs jax and optax. ``ttt_jax.models``, ``ttt_jax.data`` and
``ttt_jax.checkpoint`` load flax, TFDS and orbax when they are first used.
"""

import importlib
from typing import Any

from ttt_jax import (
    audit as audit,
    diagnostics as diagnostics,
    losses as losses,
    memory as memory,
    neighbors as neighbors,
    resets as resets,
    select as select,
)
from ttt_jax._version import __version__ as __version__
from ttt_jax.adapters import (
    filtered as filtered,
    gradient_adapter as gradient_adapter,
    sharpness_aware_adapter as sharpness_aware_adapter,
    statistics_adapter as statistics_adapter,
)
from ttt_jax.base import (
    Adapter as Adapter,
    AdapterState as AdapterState,
    AuxLoss as AuxLoss,
    Info as Info,
    Predictor as Predictor,
    Reset as Reset,
    Selection as Selection,
    StatefulLoss as StatefulLoss,
    StepInfo as StepInfo,
    Stream as Stream,
    StreamInfo as StreamInfo,
)
from ttt_jax.batching import (
    batched as batched,
    sample_keys as sample_keys,
    unbatched as unbatched,
)
from ttt_jax.inner import inner_loop as inner_loop
from ttt_jax.predictors import (
    augmented as augmented,
    episodic as episodic,
    source as source,
    vote as vote,
)
from ttt_jax.statistics import (
    SourceStatistics as SourceStatistics,
    source_statistics as source_statistics,
)
from ttt_jax.streams import online as online

_ON_DEMAND = ("checkpoint", "data", "models")


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"ttt_jax.{name}")
    raise AttributeError(f"module 'ttt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_DEMAND])

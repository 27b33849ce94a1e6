"""Diagnostics: will adapting help, does it hurt, and which step size and number of steps to take.

Pure functions, traceable and free of labels, except those that say so: :func:`gradient_alignment`
and :func:`harm` evaluate with labels, and a function that chooses with labels is called
``oracle_...``, like the fields of its result. Those of layers load :mod:`ttt_jax.layers` when they
are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ttt_jax.diagnostics.alignment import (
    Alignment as Alignment,
    gradient_alignment as gradient_alignment,
    guaranteed_step as guaranteed_step,
    secant_smoothness as secant_smoothness,
    shared_parameters as shared_parameters,
)
from ttt_jax.diagnostics.features import (
    FeatureShift as FeatureShift,
    feature_shift as feature_shift,
)
from ttt_jax.diagnostics.maps import step_size_map as step_size_map
from ttt_jax.diagnostics.monitors import (
    Harm as Harm,
    agreement as agreement,
    auxiliary_accuracy as auxiliary_accuracy,
    drift as drift,
    effective_classes as effective_classes,
    harm as harm,
    predicted_classes as predicted_classes,
)
from ttt_jax.diagnostics.probes import Probe as Probe, probe as probe, summary as summary
from ttt_jax.diagnostics.selectors import (
    Choice as Choice,
    OracleChoice as OracleChoice,
    largest_change as largest_change,
    lowest_entropy as lowest_entropy,
    oracle_select as oracle_select,
    select_label_free as select_label_free,
)

if TYPE_CHECKING:
    from ttt_jax.diagnostics.layer_steps import (
        InnerSteps as InnerSteps,
        inner_steps as inner_steps,
        ttt_steps as ttt_steps,
    )

_OF_LAYERS = ("InnerSteps", "inner_steps", "ttt_steps")

__all__ = [
    "Alignment",
    "Choice",
    "FeatureShift",
    "Harm",
    "InnerSteps",
    "OracleChoice",
    "Probe",
    "agreement",
    "auxiliary_accuracy",
    "drift",
    "effective_classes",
    "feature_shift",
    "gradient_alignment",
    "guaranteed_step",
    "harm",
    "inner_steps",
    "largest_change",
    "lowest_entropy",
    "oracle_select",
    "predicted_classes",
    "probe",
    "secant_smoothness",
    "select_label_free",
    "shared_parameters",
    "step_size_map",
    "summary",
    "ttt_steps",
]


def __getattr__(name: str) -> Any:
    if name in _OF_LAYERS:
        return getattr(importlib.import_module("ttt_jax.diagnostics.layer_steps"), name)
    raise AttributeError(f"module 'ttt_jax.diagnostics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_LAYERS})

"""From the outcome of a trial to its result rows."""

from typing import Any

import numpy as np

from experiments.methods import Method
from experiments.runner import Outcome
from experiments.trials import Trial


def make_rows(
    method: Method,
    settings: dict[str, Any],
    trial: Trial,
    outcome: Outcome,
    source_wrong: np.ndarray,
    probes: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """A row per domain and severity of a trial, each from its own images of the stream."""
    aux = probes[method.probe] if method.probe is not None else None
    rows = []
    for (domain, severity), here in outcome.cells().items():
        row = {"domain": domain, "severity": severity, "sequence": trial.sequence}
        row |= _measured(
            method,
            settings,
            outcome.take(here),
            source_wrong[here],
            None if aux is None else aux[here],
        )
        if trial.sequence != "none" and method.reset == "per_domain":
            row["reset"] = "per_sequence"
        rows.append(row)
    return rows


def _measured(
    method: Method,
    settings: dict[str, Any],
    outcome: Outcome,
    source_wrong: np.ndarray,
    aux_before: np.ndarray | None,
) -> dict[str, Any]:
    """What one method did on one domain."""
    wrong = outcome.wrong()
    count = len(wrong)
    forwards, backwards = method.cost(settings)
    row: dict[str, Any] = {
        "status": "ok",
        "error": float(wrong.mean()),
        "num_examples": count,
        "num_steps": settings.get("num_steps", 0),
        "scope": method.scope,
        "reset": method.reset,
        "predict": settings.get("predict", method.predict),
        "seconds": outcome.seconds,
        "compile_seconds": outcome.compile_seconds,
        "samples_per_second": count / outcome.seconds,
        "turned_right": float((source_wrong & ~wrong).mean()),
        "turned_wrong": float((~source_wrong & wrong).mean()),
        "forwards_per_sample": forwards,
        "backwards_per_sample": backwards,
        "non_finite": int((~outcome.ok).sum()),
        "resets": int(outcome.reset.sum()),
        "settings": settings,
    }
    if method.traced:
        by_step = outcome.logits.argmax(-1) != outcome.label[:, None]
        row["error_by_step"] = [float(value) for value in by_step.mean(axis=0)]
    if aux_before is not None and outcome.aux is not None:
        after = outcome.aux[:, -1] if method.traced else outcome.aux
        row["aux_loss_before"] = float(aux_before.mean())
        row["aux_loss_after"] = float(np.nanmean(after))
    return row

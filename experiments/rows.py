"""From the outcome of a trial to its result rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.methods import Method
from experiments.outcome import Outcome, predicted
from experiments.trials import Trial

# A share of a method's images from which on a fallback to the source is said at the end.
_MANY_LOST = 0.1


def class_groups(labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Thirds of the classes by their number of training images: many, medium and few.

    Many and few are ``round(C / 3)`` classes each, 3 of 10; medium are the others. Of classes of
    equal size the lower label counts as the larger.

    Args:
      labels: int ``[N]``, of the training images.
      num_classes: C, at least 2.

    Returns:
      ``{"many", "medium", "few"}``: the labels of each group.
    """
    counts = np.bincount(labels, minlength=num_classes)
    order = np.argsort(-counts, kind="stable")
    third = round(num_classes / 3)
    return {
        "many": order[:third],
        "medium": order[third : num_classes - third],
        "few": order[num_classes - third :],
    }


def not_adapted(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per method that fell back to the source on many images."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        if row["status"] == "ok":
            both = counts.setdefault(row["method"], [0, 0])
            both[0] += row["non_finite"]
            both[1] += row["num_examples"]
    return [
        f"{name}: steps were not finite on {lost} of {count} images, which were not adapted; a "
        f"smaller methods.{name}.learning_rate may help."
        for name, (lost, count) in counts.items()
        if lost > _MANY_LOST * count
    ]


def make_rows(
    method: Method,
    settings: dict[str, Any],
    trial: Trial,
    outcome: Outcome,
    source_class: np.ndarray,
    probes: dict[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """A row per domain and severity of a trial, each from its own images of the stream.

    Args:
      method: what was run.
      settings: its settings.
      trial: the domains, severities and order of the images.
      outcome: of the method on the trial.
      source_class: int ``[N]``, what the unadapted model predicts, -1 for a nan.
      probes: mean auxiliary loss of the unadapted model per image, by ``method.probe``.
      groups: as :func:`class_groups` makes them: rows have the error of each group's images too.
    """
    aux = probes[method.probe] if method.probe is not None else None
    rows = []
    for (domain, severity), here in outcome.cells().items():
        row = {"domain": domain, "severity": severity, "sequence": trial.sequence}
        row |= _measured(
            method,
            settings,
            outcome.take(here),
            source_class[here],
            None if aux is None else aux[here],
        )
        row |= _by_group(outcome.take(here), groups)
        if trial.sequence != "none" and method.reset == "per_domain":
            row["reset"] = "per_sequence"
        rows.append(row)
    return rows


def _by_group(outcome: Outcome, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    wrong = outcome.wrong()
    inside = {name: np.isin(outcome.label, classes) for name, classes in groups.items()}
    return {
        f"error_{name}": float(wrong[mine].mean()) for name, mine in inside.items() if mine.any()
    }


def _measured(
    method: Method,
    settings: dict[str, Any],
    outcome: Outcome,
    source_class: np.ndarray,
    aux_before: np.ndarray | None,
) -> dict[str, Any]:
    """What one method did on one domain."""
    wrong = outcome.wrong()
    count = len(wrong)
    source_wrong = source_class != outcome.label
    found = predicted(outcome.final)
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
        "agreement": float(((found == source_class) & (found >= 0)).mean()),
        "forwards_per_sample": forwards,
        "backwards_per_sample": backwards,
        "non_finite": int((~outcome.ok).sum()),
        "resets": int(outcome.reset.sum()),
        "settings": settings,
    }
    if method.scope != "per_sample":
        # Not a mean over images, so that ranges of them could not be joined.
        row["predicted_classes_before"] = _classes(source_class)
        row["predicted_classes_after"] = _classes(found)
    if method.scope == "stream":
        row["drift"] = outcome.drift
    if outcome.program_steps:
        row["program_steps"] = outcome.program_steps
    if method.measurement is not None:
        row["source_seconds"] = outcome.source_seconds
    if method.traced:
        by_step = predicted(outcome.logits) != outcome.label[:, None]
        row["error_by_step"] = [float(value) for value in by_step.mean(axis=0)]
    if aux_before is not None and outcome.aux is not None:
        after = outcome.aux[:, -1] if method.traced else outcome.aux
        row["aux_loss_before"] = float(aux_before.mean())
        row["aux_loss_after"] = float(np.nanmean(after))
    return row


def _classes(found: np.ndarray) -> float | None:
    """The effective number of predicted classes, as ``ttt_jax.diagnostics.predicted_classes``."""
    _, counts = np.unique(found[found >= 0], return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(counts) else None

"""Metrics of image classification, over logits or a dict ``{"logits", "aux"}``."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ttt_jax import metrics as lib
from ttt_jax.task import Examples, Metric


def metrics(num_classes: int, groups: Mapping[str, np.ndarray]) -> dict[str, Metric]:
    """All metrics by their names in rows.

    Args:
      num_classes: C.
      groups: labels by group, as :func:`class_groups` makes them: each has an error of its own.
    """
    named = {
        "error": lib.error(predicted),
        "turned_right": lib.helped(predicted),
        "turned_wrong": lib.harmed(predicted),
        "agreement": lib.agreement(predicted),
        "cross_entropy": lib.cross_entropy(final),
        "predicted_classes_before": lib.predicted_classes(
            num_classes, lambda output, source: predicted(source)
        ),
        "predicted_classes_after": lib.predicted_classes(
            num_classes, lambda output, source: predicted(output)
        ),
        "error_by_step": lib.by_step(_wrong_by_step),
        "aux_loss_before": lib.mean(_aux_before),
        "aux_loss_after": lib.ratio(_aux_after),
    }
    for group, labels in groups.items():
        named[f"error_{group}"] = _group_error(labels)
    return named


def logits_of(output: Any) -> np.ndarray:
    """Logits ``[N, C]``, or ``[N, S + 1, C]`` of a traced method."""
    return np.asarray(output["logits"] if isinstance(output, Mapping) else output)


def final(output: Any) -> np.ndarray:
    """Logits of the prediction that counts, ``[N, C]``."""
    logits = logits_of(output)
    return logits if logits.ndim == 2 else logits[:, -1]


def predicted(output: Any) -> np.ndarray:
    """The class of the prediction that counts, int ``[N]``; -1 where it is nan."""
    return lib.classes(final(output))


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


def _group_error(labels: np.ndarray) -> Metric:
    def of(output: Any, source: Any, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        inside = np.isin(examples.y, labels)
        return inside & (predicted(output) != examples.y), inside

    return lib.ratio(of)


def _wrong_by_step(output: Any, examples: Examples) -> np.ndarray | None:
    logits = logits_of(output)
    return None if logits.ndim == 2 else lib.classes(logits) != examples.y[:, None]


def _aux(output: Any) -> tuple[str, np.ndarray] | None:
    """The name and the values ``[N]`` (``[N, S + 1]`` traced) of the reading beside the logits."""
    readings = output.get("aux") if isinstance(output, Mapping) else None
    return next(iter(readings.items()), None) if readings else None


def _aux_before(output: Any, source: Any, examples: Examples) -> np.ndarray | None:
    reading = _aux(output)
    return None if reading is None else source["aux"][reading[0]]


def _aux_after(output: Any, source: Any, examples: Examples) -> tuple[Any, Any] | None:
    reading = _aux(output)
    if reading is None:
        return None
    values = np.asarray(reading[1])
    values = values if values.ndim == 1 else values[:, -1]
    lost = np.isnan(values)
    return np.where(lost, np.zeros_like(values), values), ~lost

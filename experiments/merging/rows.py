"""Rows of several ranges of images as one, and rows that should be the same."""

import math
from collections.abc import Sequence
from typing import Any

# A share of a row's images.
_SHARES = ("error", "turned_right", "turned_wrong", "agreement")
_MEANS = ("aux_loss_before", "aux_loss_after", "cross_entropy")
_SUMS = ("num_examples", "seconds", "non_finite", "updated", "resets")
# Of all images together; those of ranges do not say it.
_TOGETHER = ("predicted_classes_before", "predicted_classes_after")
# Of work that ranges do at different times, or each for itself.
_LONGEST = ("compile_seconds", "source_seconds")
_TIMES = ("seconds", "samples_per_second", "compile_seconds", "source_seconds")
# What differs by rounding on two machines.
_ROUNDED = (*_MEANS, "drift")
_ROUNDING = 1e-4


def joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one key over several ranges of images, as the row of all of them.

    Args:
      rows: finished rows as ``experiments.adapt`` writes them. Shares (``error``, ``turned_right``,
        ``turned_wrong``, ``agreement``, ``error_by_step``) become those of all images, mean losses
        the mean over them; numbers of images and seconds are added; of ``compile_seconds`` and
        ``source_seconds`` the longest is taken. Every other field is equal in all rows.

    Returns:
      The row, with ``samples_per_second`` of the whole, and without the numbers of predicted
      classes, which those of ranges do not say.

    Raises:
      ValueError: rows of a method that takes several images at once or of a gradual sequence, rows
        that differ in what is no measurement, or rows with errors of groups of classes, whose
        sizes they do not say.
    """
    rows = [{name: v for name, v in row.items() if name not in _TOGETHER} for row in rows]
    first = rows[0]
    if first["scope"] != "per_sample":
        raise ValueError(
            "its images adapt together (a batch or a stream), so one part must have them all"
        )
    if first.get("sequence") == "gradual":
        raise ValueError(
            "an image's place in a gradual sequence says how severe its corruption is, so one part "
            "must have them all; cut by --methods instead"
        )
    measured = {*_SHARES, *_MEANS, *_SUMS, *_LONGEST, "samples_per_second", "error_by_step"}
    for row in rows[1:]:
        for name in sorted({*first, *row}):
            if name.startswith("error_") and name not in measured:
                raise ValueError(
                    "it has errors of groups of classes, but not how many images these have in a "
                    "range; cut by --domains instead"
                )
            here, there = (name in one for one in (first, row))
            if here != there and name in measured:
                raise ValueError(
                    f"one part lacks {name}, as made by another version of the program; run that "
                    "part again"
                )
            if here != there or (name not in measured and first[name] != row[name]):
                raise ValueError(f"{name} is {first.get(name)!r} and {row.get(name)!r}")
    counts = [row["num_examples"] for row in rows]
    total = sum(counts)

    def share(values: Sequence[float]) -> float:
        # Numbers of images, so that the whole's share is the very one of a single run.
        return sum(round(v * n) for v, n in zip(values, counts, strict=True)) / total

    whole = dict(first)
    for name in first:
        values = [row[name] for row in rows]
        if name in _SHARES:
            whole[name] = share(values)
        elif name == "error_by_step":
            whole[name] = [share(step) for step in zip(*values, strict=True)]
        elif name in _MEANS:
            whole[name] = sum(v * n for v, n in zip(values, counts, strict=True)) / total
        elif name in _SUMS:
            whole[name] = sum(values)
        elif name in _LONGEST:
            whole[name] = max(values)
    whole["samples_per_second"] = total / whole["seconds"]
    return whole


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """A field in which two rows of the same images differ, and both values; times apart."""
    for name in sorted({*one, *other} - {*_TIMES}):
        mine, theirs = one.get(name), other.get(name)
        if mine != theirs and not (name in _ROUNDED and _close(mine, theirs)):
            return name, mine, theirs
    return None


def _close(mine: Any, theirs: Any) -> bool:
    return None not in (mine, theirs) and math.isclose(mine, theirs, rel_tol=_ROUNDING)

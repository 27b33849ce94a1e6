"""Reads ``experiments/results`` for the pages of results: errors by method, seed and domain."""

import json
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"

Errors = dict[str, dict[int, dict[str, float]]]


def read(name: str) -> dict[str, Any]:
    """The record ``experiments/results/NAME.json``."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def errors(
    record: Mapping[str, Any],
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True,
    *,
    role: str = "reported",
) -> Errors:
    """Errors in percent, ``[method][seed][domain]``, of the rows of one role that ``keep`` takes.

    Raises:
      ValueError: two rows fall on one place: ``keep`` must tell them apart.
    """
    found: Errors = {}
    for row in record["rows"]:
        if row["split_role"] == role and keep(row):
            place = found.setdefault(row["method"], {}).setdefault(row["seed"], {})
            if row["domain"] in place:
                raise ValueError(
                    f"two rows are {row['method']}, seed {row['seed']}, {row['domain']}; "
                    "keep rows of one training, dtype or held-out domain."
                )
            place[row["domain"]] = 100 * row["error"]
    return found


def mean(by_domain: Mapping[str, float]) -> float:
    """The mean over the shifted domains, ``clean`` left out."""
    return statistics.mean(error for domain, error in by_domain.items() if domain != "clean")


def change(adapted: Mapping[str, float], unadapted: Mapping[str, float]) -> float:
    """How much the mean error changes, in percent of the unadapted one's; negative is better."""
    return 100 * (mean(adapted) / mean(unadapted) - 1)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """The mean, and its standard error where there are several values."""
    values = list(values)
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text

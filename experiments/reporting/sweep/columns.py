"""Rows packed for the page: columns, with every repeated value written once."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from experiments.reporting.rows import ReportError
from experiments.reporting.summary import BACKWARD_IN_FORWARDS
from experiments.reporting.sweep.gains import baseline_rank, gains
from experiments.reporting.sweep.source import settings_of
from experiments.reporting.tables import domain_rank

TEXT = (
    "trial",
    "label",
    "method",
    "dataset",
    "domain",
    "split_role",
    "status",
    "message",
    "scope",
    "checkpoint",
    "sequence",
    "settings",
)
NUMBERS = (
    "severity",
    "seed",
    "error",
    "num_steps",
    "num_examples",
    "seconds",
    "forwards_per_sample",
    "backwards_per_sample",
    "turned_right",
    "turned_wrong",
)
# Of a row, not of its settings: they say which images it is of.
_PLACES = ("dataset", "domain", "severity", "seed")
_PARTS = re.compile(r"(?:^| )(seeds|methods|domains)=(\S*)")

Columns = dict[str, list[Any]]


def plain(table: pa.Table) -> Columns:
    """The columns the report knows as lists; NaN and infinity become None, as missing values are.

    Raises:
      ReportError: a column of another type, or an error that is no fraction.
    """
    found: Columns = {}
    for name in TEXT + NUMBERS:
        if name not in table.column_names:
            found[name] = [None] * table.num_rows
            continue
        column, kind = table[name], table.schema.field(name).type
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (text if name in TEXT else number) and not pa.types.is_null(kind):
            what = "text" if name in TEXT else "numbers"
            raise ReportError(f"the column `{name}` must hold {what}, got {kind}.")
        values = column.to_pylist()
        if pa.types.is_floating(kind):
            values = [v if v is not None and math.isfinite(v) else None for v in values]
        found[name] = values
    for trial, value in zip(found["trial"], found["error"], strict=True):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ReportError(
                f"`error` must be a fraction in [0, 1], got {value!r} in trial {trial}."
            )
    _name_failed(found)
    return found


def _name_failed(columns: Columns) -> None:
    """The row that says that a trial failed: what it was to make is in its label, if one thing."""
    for place, status in enumerate(columns["status"]):
        if status == "ok" or columns["method"][place] is not None:
            continue
        parts = dict(_PARTS.findall(columns["label"][place] or ""))
        for name, part in (("method", "methods"), ("domain", "domains")):
            if parts.get(part) and "," not in parts[part]:
                columns[name][place] = parts[part]
        if (seed := parts.get("seeds", "")).isdigit():
            columns["seed"][place] = int(seed)


def derived(columns: Columns) -> Columns:
    """What the page shows beside the columns of the table.

    ``gain`` (:func:`~experiments.reporting.sweep.gains.gains`), ``cost`` of a prediction in plain
    forwards, ``milliseconds`` per image, ``learning_rate`` and every other setting that differs
    between rows.
    """
    made: Columns = {"gain": gains(columns), "cost": [], "milliseconds": []}
    passes = zip(columns["forwards_per_sample"], columns["backwards_per_sample"], strict=True)
    for forwards, backwards in passes:
        cost = None if forwards is None else forwards + BACKWARD_IN_FORWARDS * (backwards or 0)
        made["cost"].append(cost)
    for seconds, count in zip(columns["seconds"], columns["num_examples"], strict=True):
        known = seconds is not None and count
        made["milliseconds"].append(1000 * seconds / count if known else None)
    known = {text: settings_of(text) for text in {*columns["settings"]} if text is not None}
    names = sorted({name for values in known.values() for name in values} - {"num_steps"})
    for name in names:
        values = {text: _plain(found.get(name)) for text, found in known.items()}
        different = {value for value in values.values() if value is not None}
        if name == "learning_rate" or len(different) > 1:
            # A setting may be called what a column is.
            taken = name in columns or name in made
            made[f"settings.{name}" if taken else name] = [
                values.get(text) for text in columns["settings"]
            ]
    made.setdefault("learning_rate", [None] * len(columns["trial"]))
    return made


def _plain(value: Any) -> float | str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return value if isinstance(value, str) else str(value)


def setting_ids(columns: Columns) -> list[str]:
    """What a row shares with those of other seeds and domains: all that its trial changed else."""
    other = {label: _PARTS.sub("", label or "").strip() for label in {*columns["label"]}}
    pairs = zip(columns["label"], columns["settings"], strict=True)
    return [f"{other[label]}\0{settings}" for label, settings in pairs]


def place_ids(columns: Columns) -> list[tuple[Any, ...]]:
    """Which images a row is of, and which seed: means over different ones do not compare."""
    return list(zip(*(columns[name] for name in _PLACES), strict=True))


def encode(values: Sequence[Any], order: Sequence[Any] | None = None) -> dict[str, Any]:
    """A column as ``{"values", "codes"}`` (-1: missing), or ``{"raw"}`` if few values repeat.

    Args:
      values: numbers (written with six digits), or texts; None where missing.
      order: that of the values; sorted if left out. Rows sort by it.
    """
    numeric = all(value is None or isinstance(value, int | float) for value in values)
    if numeric:
        values = [v if v is None or isinstance(v, int) else float(f"{v:.6g}") for v in values]
    else:
        values = [None if value is None else str(value) for value in values]
    different = {value for value in values if value is not None}
    kind = "number" if numeric else "text"
    if numeric and len(different) > len(values) / 3:
        return {"kind": kind, "raw": list(values)}
    listed = sorted(different) if order is None else [v for v in order if v in different]
    code = {value: place for place, value in enumerate(listed)}
    codes = [-1 if value is None else code[value] for value in values]
    return {"kind": kind, "values": listed, "codes": codes}


def ids(keys: Sequence[Any]) -> list[int]:
    """A small number per key, in order of appearance."""
    known: dict[Any, int] = {}
    return [known.setdefault(key, len(known)) for key in keys]


def method_order(columns: Columns) -> list[str]:
    """Baselines first, then by name."""
    best: dict[str, int] = {}
    for method, steps in zip(columns["method"], columns["num_steps"], strict=True):
        if method is not None:
            rank = baseline_rank(method, steps)
            best[method] = min(best.get(method, 99), 99 if rank is None else rank)
    return sorted(best, key=lambda method: (best[method], method))


def payload(table: pa.Table) -> Mapping[str, Any]:
    """All that the page's script needs, ready for JSON.

    Returns:
      ``rows``, their number; ``columns``, by name, as :func:`encode` gives them; ``settings``, the
      names of the columns that are settings; ``place`` and ``setting``, the numbers of
      :func:`place_ids` and :func:`setting_ids`; ``baselines``, the methods that do not adapt.

    Raises:
      ReportError: a column that is not what it should be.
    """
    columns = plain(table)
    more = derived(columns)
    orders: dict[str, Sequence[Any]] = {
        "trial": list(dict.fromkeys(columns["trial"])),
        "method": method_order(columns),
        "domain": sorted({*columns["domain"]} - {None}, key=lambda d: (domain_rank(d), d)),
    }
    hidden = {"settings", "checkpoint", "sequence", "turned_right", "turned_wrong"}
    hidden |= {"forwards_per_sample", "backwards_per_sample"}
    shown = {name: values for name, values in columns.items() if name not in hidden} | more
    ranks = zip(columns["method"], columns["num_steps"], strict=True)
    return {
        "rows": table.num_rows,
        "columns": {name: encode(values, orders.get(name)) for name, values in shown.items()},
        "settings": [n for n in more if n not in ("gain", "cost", "milliseconds")],
        "place": ids(place_ids(columns)),
        "setting": ids(setting_ids(columns)),
        "baselines": sorted({m for m, steps in ranks if baseline_rank(m, steps) is not None}),
    }

"""Reading ``results.jsonl``: every line is checked, nothing is dropped in silence."""

import collections
import json
import math
import pathlib
from typing import Any, NamedTuple

_IDENTITY = ("method", "dataset", "domain", "severity", "seed", "split_role", "status")
_MEASURED = ("error", "num_examples", "num_steps", "scope")
_RECORDED = ("reset", "predict", "seconds", "samples_per_second", "checkpoint")
_SCOPES = ("per_sample", "batch", "stream")
_ROLES = ("reported", "validation")
_NUMBERS = (
    "num_examples",
    "num_steps",
    "seconds",
    "samples_per_second",
    "aux_loss_before",
    "aux_loss_after",
    "forwards_per_sample",
    "backwards_per_sample",
    "non_finite",
    "resets",
    "predicted_classes_before",
    "predicted_classes_after",
)
GROUPS = ("many", "medium", "few")
"""Classes by their number of training images; ``error_many`` is the error of the first, ..."""
_BY_GROUP = tuple(f"error_{name}" for name in GROUPS)
_FRACTIONS = ("error", "turned_right", "turned_wrong", *_BY_GROUP)


class ReportError(Exception):
    """A report cannot be made; the message says which file, which line and why."""


class Row(NamedTuple):
    """One line of ``results.jsonl``: one method on one domain, severity and seed.

    The errors, ``turned_right``, ``turned_wrong`` and the entries of ``error_by_step`` are
    fractions in [0, 1]; ``seconds`` is in seconds. A field the writer left out is ``None``.
    """

    method: str
    dataset: str
    domain: str
    severity: float
    seed: int
    split_role: str
    status: str
    message: str = ""
    error: float | None = None
    num_examples: float | None = None
    num_steps: float | None = None
    scope: str | None = None
    reset: str | None = None
    predict: str | None = None
    seconds: float | None = None
    samples_per_second: float | None = None
    checkpoint: str | None = None
    error_by_step: tuple[float, ...] | None = None
    aux_loss_before: float | None = None
    aux_loss_after: float | None = None
    turned_right: float | None = None
    turned_wrong: float | None = None
    error_many: float | None = None
    error_medium: float | None = None
    error_few: float | None = None
    forwards_per_sample: float | None = None
    backwards_per_sample: float | None = None
    non_finite: float | None = None
    resets: float | None = None
    predicted_classes_before: float | None = None
    predicted_classes_after: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the row holds a measurement."""
        return self.status == "ok"


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be a number, got {value!r}")
    # A diverged loss is written as NaN; it is a gap in a table, not a broken file.
    return float(value) if math.isfinite(value) else None


def _fraction(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` must be a fraction in [0, 1], got {value!r}")
    return float(value)


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")


def parse_row(record: Any) -> Row:
    """Checks one decoded line.

    Args:
      record: what ``json.loads`` gave.

    Returns:
      The :class:`Row`; fields the report does not know are ignored.

    Raises:
      ValueError: a field is missing, of the wrong type or out of range.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a row must be a JSON object, got {type(record).__name__}")
    needed = _IDENTITY + (_MEASURED + _RECORDED if record.get("status") == "ok" else ())
    missing = [name for name in needed if name not in record]
    if missing:
        raise ValueError(f"missing {', '.join(f'`{name}`' for name in missing)}")
    _choice("status", record["status"], ("ok", "failed"))
    _choice("split_role", record["split_role"], _ROLES)
    for name in ("method", "dataset", "domain"):
        if not isinstance(record[name], str) or not record[name]:
            raise ValueError(f"`{name}` must be a non-empty string, got {record[name]!r}")
    if isinstance(record["seed"], bool) or not isinstance(record["seed"], int):
        raise ValueError(f"`seed` must be an integer, got {record['seed']!r}")
    values: dict[str, Any] = {name: record[name] for name in _IDENTITY}
    values["severity"] = _number("severity", record["severity"])
    if values["severity"] is None or values["severity"] < 0:
        raise ValueError(f"`severity` must be at least 0, got {record['severity']!r}")
    for name in _NUMBERS:
        values[name] = _number(name, record.get(name))
    for name in _FRACTIONS:
        values[name] = _fraction(name, record.get(name))
    for name in ("reset", "predict", "checkpoint"):
        values[name] = None if record.get(name) is None else str(record[name])
    steps = record.get("error_by_step")
    if steps is not None:
        if not isinstance(steps, list) or not steps:
            raise ValueError(f"`error_by_step` must be a non-empty list, got {steps!r}")
        values["error_by_step"] = tuple(
            _fraction(f"error_by_step[{k}]", step) for k, step in enumerate(steps)
        )
        if None in values["error_by_step"]:
            raise ValueError("`error_by_step` must hold fractions only, got null")
    values["scope"] = record.get("scope")
    if record["status"] == "failed":
        values["message"] = str(record.get("message") or "no message recorded")
        values["error"] = None
        return Row(**values)
    _choice("scope", record["scope"], _SCOPES)
    for name in ("error", "num_examples", "num_steps"):
        if values[name] is None:
            raise ValueError(f"a row with status ok needs `{name}`, got {record[name]!r}")
    if values["num_examples"] <= 0:
        raise ValueError(f"`num_examples` must be positive, got {record['num_examples']!r}")
    return Row(**values)


def read_rows(path: pathlib.Path) -> tuple[list[Row], list[str]]:
    """Reads a results file.

    Args:
      path: a JSON-lines file.

    Returns:
      The rows in file order, and notes for the reader (a last line cut off by a killed
      writer is skipped with a note).

    Raises:
      ReportError: the file is missing, unreadable or holds no row; a line is malformed; two
        lines are the same measurement.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ReportError(
            f"{path}: no results here. Run `python -m experiments.adapt --workdir={path.parent}` "
            "first, or give the folder of a run or of a sweep."
        ) from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}.") from error
    rows: list[Row] = []
    notes: list[str] = []
    lines_of: dict[tuple, list[int]] = collections.defaultdict(list)
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            # Only what follows the last newline can be the half line of a killed writer.
            if number == len(lines):
                notes.append(
                    f"The last line of {path.name} (line {number}) is cut off and was skipped; "
                    "running the experiment again completes it."
                )
                continue
            raise ReportError(f"{path}, line {number}: not valid JSON: {error}.") from error
        try:
            row = parse_row(record)
        except ValueError as error:
            raise ReportError(f"{path}, line {number}: {error}.") from error
        rows.append(row)
        lines_of[
            row.method, row.dataset, row.domain, row.severity, row.seed, row.split_role
        ].append(number)
    doubled = {key: found for key, found in lines_of.items() if len(found) > 1}
    if doubled:
        shown = "; ".join(
            f"method={key[0]} dataset={key[1]} domain={key[2]} severity={key[3]:g} seed={key[4]} "
            f"split_role={key[5]} (lines {', '.join(map(str, found))})"
            for key, found in list(doubled.items())[:5]
        )
        more = f"; and {len(doubled) - 5} more" if len(doubled) > 5 else ""
        raise ReportError(f"{path}: the same measurement is written twice: {shown}{more}.")
    if not rows:
        raise ReportError(f"{path}: holds no complete row, so there is nothing to report yet.")
    return rows, notes


def read_side_file(path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """Reads ``run.json`` or ``selection.json``; a broken one becomes a note, not an error.

    Args:
      path: the file, which may be absent.

    Returns:
      Its object (empty if absent or broken), and the notes.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        return {}, [f"{path.name} could not be read ({error}); what it holds is not shown."]
    if not isinstance(value, dict):
        return {}, [f"{path.name} must hold a JSON object; it is not shown."]
    return value, []

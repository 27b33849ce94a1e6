"""Reads a run, a sweep or a kept result file into one frame; nothing is dropped in silence."""

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from experiments import journal, launch
from experiments.report import sweep

TEXTS = ("method", "dataset", "domain", "split_role", "status", "message", "scope")
NUMBERS = ("severity", "seed", "num_examples")
IDENTITY = ("method", "dataset", "domain", "severity", "seed", "split_role", "status")
_ALLOWED = {
    "status": ("ok", "failed"),
    "split_role": ("reported", "validation"),
    "scope": ("per_sample", "batch", "stream"),
}
# Shares of all examples, shown in percent. Other measures are shown as they are.
_SHARES = re.compile(
    r"error|harmed|agreement|solved|accuracy|mean_iou|turned_(right|wrong)|gain|saved|padding"
)
_LABEL_PARTS = re.compile(r"(?:^| )(seeds|methods|domains)=(\S*)")
_NOT_TAGS = ("label", "trial", "checkpoint", "chooses", *TEXTS)
# What rows of other tags than these tell apart; a row names its own.
_PLACE = ("dataset", "domain", "severity", "sequence")
_NOT_MEASURES = (*NUMBERS, "chance")
# What joins parts of a run says nothing to a reader.
_NOT_COLUMNS = ("settings", "sums", "tags")


class ReportError(Exception):
    """A report cannot be made; the message says which file, which line and why."""


class Results(NamedTuple):
    """Rows and what is known of them.

    Attributes:
      frame: a line per row, failed ones too. Settings are columns, lists stay lists. Rows of one
        data set and equal tags have the same number as ``place``.
      settings: the columns that are settings.
      primary: the measure that chooses settings; lower is better.
      measures: every numeric column that is a measure, the primary one first.
      curves: the columns that hold a list of numbers per row.
      tags: columns of text beside the identity of a row.
      run: the content of ``run.json``.
      selection: the content of ``selection.json``.
      notes: what reading brought up, in whole sentences.
      trials: trials ``done``, ``failed``, ``running`` and ``waiting``; None where there are none.
      folder: where the rows lie.
    """

    frame: pd.DataFrame
    settings: tuple[str, ...]
    primary: str
    measures: tuple[str, ...]
    curves: tuple[str, ...]
    tags: tuple[str, ...]
    run: dict[str, Any]
    selection: dict[str, Any]
    notes: list[str]
    trials: dict[str, int] | None
    folder: pathlib.Path


def is_share(name: str) -> bool:
    """Whether a measure is a share of the examples, which is shown in percent."""
    return _SHARES.match(name) is not None


def results(path: str | pathlib.Path) -> Results:
    """Returns the rows of a run's folder, a sweep's folder or a kept ``.json`` file.

    Raises:
      ReportError: nothing to read, or a row that breaks a rule; names file, line and rule.
    """
    path = pathlib.Path(path)
    if path.is_file():
        record, notes = side_file(path)
        if not isinstance(record.get("rows"), list):
            raise ReportError(f"{path}: no `rows` in it. {' '.join(notes)}".strip())
        run = {k: v for k, v in record.items() if k not in ("rows", "selection", "appended")}
        rows = [_checked(row, f"{path}, row {n}") for n, row in enumerate(record["rows"], 1)]
        return collect(rows, path, run=run, selection=record.get("selection"))
    if sweep.is_sweep(path):
        try:
            rows, trials, run_file, notes = sweep.read(path)
        except ValueError as error:
            raise ReportError(str(error)) from error
        rows = [_typed(_named(row), f"trial {row['trial']}") for row in rows]
        run, more = side_file(run_file)
        return collect(rows, path, run=run, notes=notes + more, trials=trials)
    rows, notes = json_lines(path / "results.jsonl")
    run, run_notes = side_file(path / "run.json")
    selection, more = side_file(path / "selection.json")
    return collect(rows, path, run=run, selection=selection, notes=[*notes, *run_notes, *more])


def collect(
    rows: Sequence[Mapping[str, Any]],
    folder: pathlib.Path,
    *,
    run: dict[str, Any] | None = None,
    selection: dict[str, Any] | None = None,
    notes: Iterable[str] = (),
    trials: dict[str, int] | None = None,
) -> Results:
    """Returns :class:`Results`: the kind of every column is read off its values."""
    names = dict.fromkeys([*(name for row in rows for name in row), *TEXTS, *NUMBERS])
    columns = {name: [row.get(name) for row in rows] for name in names if name not in _NOT_COLUMNS}
    kinds = {name: _kind(values) for name, values in columns.items()}
    frame = pd.DataFrame({name: pd.Series(v, dtype=object) for name, v in columns.items()})
    for name in (name for name, kind in kinds.items() if kind == "number"):
        numbers = pd.to_numeric(frame[name]).astype(float)
        frame[name] = numbers.where(numbers.map(math.isfinite))
    spread = [_settings(row) for row in rows]
    varied = []
    for name in sorted({key for row in spread for key in row} - {"num_steps"}):
        values = [row.get(name) for row in spread]
        if name == "learning_rate" or len({*values} - {None}) > 1:
            varied.append(f"settings.{name}" if name in frame else name)
            frame[varied[-1]] = pd.Series(values, dtype=object)
    own = [name for row in rows for name in row.get("tags") or ()]
    places = [name for name in dict.fromkeys([*_PLACE, *own]) if name in frame]
    frame["place"] = frame.groupby(places, dropna=False).ngroup()
    measures = [n for n, kind in kinds.items() if kind == "number" and n not in _NOT_MEASURES]
    chooses = [name for name in (*columns.get("chooses", ()), "error") if name in measures]
    primary = [*chooses, *measures, ""][0]
    return Results(
        frame,
        tuple(varied),
        primary,
        tuple(dict.fromkeys([primary, *measures])) if primary else (),
        tuple(name for name, kind in kinds.items() if kind == "list"),
        tuple(name for name, kind in kinds.items() if kind == "text" and name not in _NOT_TAGS),
        run or {},
        selection or {},
        list(notes),
        trials,
        folder,
    )


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    held = row.get("settings") or {}
    if isinstance(held, str):
        try:
            held = json.loads(held)
        except ValueError:
            held = None
    if not isinstance(held, dict):
        raise ReportError(f"`settings` must be a JSON object, got {row['settings']!r}.")
    return {k: v if _is_number(v) else str(v) for k, v in held.items() if v is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(values: Sequence[Any]) -> str:
    values = [value for value in values if value is not None]
    if all(map(_is_number, values)):
        return "number" if values else "empty"
    if all(isinstance(value, str) for value in values):
        return "text"
    lists = all(isinstance(value, list) and value for value in values)
    return "list" if lists and all(_is_number(x) for value in values for x in value) else "other"


def _typed(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row, if its fields are of the right types."""

    def refuse(name: str, rule: str) -> None:
        raise ReportError(f"{where}: `{name}` must {rule}, got {row[name]!r}.")

    for name, value in row.items():
        if value is None:
            continue
        if name in TEXTS and not isinstance(value, str):
            refuse(name, "hold text")
        share = name in ("error", "turned_right", "turned_wrong")
        if (share or name in NUMBERS) and not _is_number(value):
            refuse(name, "hold numbers")
        if share and math.isfinite(value) and not 0.0 <= value <= 1.0:
            refuse(name, "be a fraction in [0, 1]")
        if value not in _ALLOWED.get(name, (value,)):
            refuse(name, f"be one of {', '.join(_ALLOWED[name])}")
    # A task without domains has its stream as the domain.
    if row.get("stream") is not None and row.get("domain") is None:
        row = {**row, "domain": row["stream"], "severity": 0}
    return row


def _checked(row: Any, where: str) -> dict[str, Any]:
    """A row of a run, whose identity must be complete."""
    if not isinstance(row, dict):
        raise ReportError(f"{where}: a row must be a JSON object, got {type(row).__name__}.")
    row = _typed(row, where)
    missing = [name for name in IDENTITY if row.get(name) is None]
    if missing:
        raise ReportError(f"{where}: missing {', '.join(f'`{name}`' for name in missing)}.")
    count = row.get("num_examples")
    if row["status"] == "ok" and not (count and count > 0):
        raise ReportError(f"{where}: `num_examples` must be positive, got {count!r}.")
    return row


def json_lines(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the rows of a JSON-lines file and its shards, and notes (a last line cut off).

    Raises:
      ReportError: no file, no row, a malformed line, or one measurement twice.
    """
    files = journal.files(path)
    if not files:
        raise ReportError(
            f"{path}: no results here. Run `python -m experiments.adapt --workdir={path.parent}` "
            "first, or give the folder of a run or of a sweep."
        )
    parts = [_one_file(file) for file in files]
    # What failed in a shard may have succeeded in another one since.
    done: dict[tuple[Any, ...], int] = {}
    for n, (found, _) in enumerate(parts):
        for row in (row for row in found if row["status"] == "ok"):
            done.setdefault(journal.identity(row), n)
    pairs = [(row, n) for n, (found, _) in enumerate(parts) for row in found]
    rows = [row for row, n in pairs if done.get(journal.identity(row), n) == n]
    return rows, [note for _, notes in parts for note in notes]


def _one_file(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        rows, whole = journal.read(path, lambda row: ())
    except launch.UserError as error:
        raise ReportError(str(error)) from error
    if not rows:
        raise ReportError(f"{path}: holds no complete row, so there is nothing to report yet.")
    first: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, 1):
        rows[number - 1] = row = _checked(row, f"{path}, line {number}")
        # Tags of other kinds of task are part of what a row is, too.
        texts = tuple((k, v) for k, v in sorted(row.items()) if isinstance(v, str))
        line = first.setdefault((*texts, row["severity"], row["seed"]), number)
        if line != number:
            named = " ".join(f"{name}={row[name]}" for name in IDENTITY[:-1])
            raise ReportError(
                f"{path}: the same measurement is written twice: {named} (lines {line}, {number})."
            )
    cut = (
        f"The last line of {path.name} (line {len(rows) + 1}) is cut off and was skipped; running "
        "the experiment again completes it."
    )
    return rows, [] if whole else [cut]


def side_file(path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the object in a JSON file (empty if absent or broken), and notes."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        return {}, [f"{path.name} could not be read ({error}); what it holds is not shown."]
    if not isinstance(value, dict):
        return {}, [f"{path.name} must hold a JSON object; it is not shown."]
    return value, []


def kept_objects(
    path: pathlib.Path, make: Callable[[Any], dict[str, Any]], what: str, said: list[str]
) -> list[dict[str, Any]]:
    """``make`` of each object of a file that a run keeps; [] without it, or if damaged: said."""
    try:
        return [make(held) for held in json.loads(path.read_text("utf-8"))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, KeyError, TypeError, IndexError) as error:
        said.append(f"{path} is damaged ({error!r}); its {what} are not shown; remove it.")
        return []


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A failed trial's row has the method, domain and seed that its label names, if only one."""
    if row.get("status") == "ok" or row.get("method") is not None:
        return row
    parts = dict(_LABEL_PARTS.findall(row.get("label") or ""))
    named = {name: parts.get(f"{name}s", "") for name in ("method", "domain")}
    named = {name: part for name, part in named.items() if part and "," not in part}
    seed = {"seed": int(parts["seeds"])} if parts.get("seeds", "").isdigit() else {}
    return {**row, **named, **seed}

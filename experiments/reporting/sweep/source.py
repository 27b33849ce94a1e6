"""What a report of a sweep reads: the table, or the trials' own rows where there is none yet."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from experiments import launch
from experiments.reporting.rows import ReportError, read_side_file
from experiments.sweeping import collect, progress
from experiments.sweeping.unit import Unit

NEEDED = ("trial", "status")


class Sweep(NamedTuple):
    """What a sweep's folder holds.

    Attributes:
      table: the rows of all trials, with at least the columns of :data:`NEEDED`.
      counts: trials ``done``, ``failed``, ``running`` and ``waiting``.
      planned: whether the plan was read, so that the counts are of all trials there are.
      run: the content of one trial's ``run.json``; empty if there is none.
      notes: what reading the files brought up, in whole sentences.
    """

    table: pa.Table
    counts: dict[str, int]
    planned: bool
    run: dict[str, Any]
    notes: list[str]

    @property
    def trials(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    @property
    def finished(self) -> bool:
        """Whether every trial is done or has failed for good."""
        return not self.counts["running"] and not self.counts["waiting"]


def is_sweep(folder: pathlib.Path) -> bool:
    """Whether a folder is that of a sweep, and not of a single run."""
    names = (collect.TABLE, progress.PLAN, "trials")
    return not (folder / "results.jsonl").exists() and any((folder / n).exists() for n in names)


def read(folder: pathlib.Path) -> Sweep:
    """Reads a sweep, finished or not; nothing is written, so it may go on meanwhile.

    Raises:
      ReportError: a damaged file, a table that is no sweep's, or no row yet.
    """
    notes: list[str] = []
    try:
        units = _plan(folder, notes)
        counts = _counts(folder, units) if units else None
        table = _table(folder, units, counts, notes)
    except launch.UserError as error:
        raise ReportError(str(error)) from error
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise ReportError(f"{folder}: the rows of its trials cannot be read: {first}.") from error
    if not table.num_rows:
        raise ReportError(
            f"{folder}: no trial has a row yet, so there is nothing to report; "
            f"`python -m experiments.sweep --status={folder}` says how far the sweep is."
        )
    missing = [name for name in NEEDED if name not in table.column_names]
    if missing:
        raise ReportError(
            f"{folder / collect.TABLE}: not a table of a sweep: it lacks "
            f"{', '.join(f'`{name}`' for name in missing)} among {', '.join(table.column_names)}."
        )
    run, run_notes = _provenance(folder, units)
    return Sweep(table, counts or _counted(table), counts is not None, run, notes + run_notes)


def _plan(folder: pathlib.Path, notes: list[str]) -> list[Unit]:
    if not (folder / progress.PLAN).exists():
        notes.append(f"There is no {progress.PLAN} here, so trials without a row are not known of.")
        return []
    try:
        return progress.load(folder)
    except launch.UserError:
        notes.append(
            f"{progress.PLAN} could not be read, so trials without a row are not known of; running "
            "the sweep again writes it anew."
        )
        return []


def _counts(folder: pathlib.Path, units: Sequence[Unit]) -> dict[str, int]:
    counts = progress.measure(folder, units).counts
    counts["waiting"] += counts.pop("blocked")
    return {name: counts[name] for name in ("done", "failed", "running", "waiting")}


def _counted(table: pa.Table) -> dict[str, int]:
    trials, statuses = table["trial"].to_pylist(), table["status"].to_pylist()
    failed = {t for t, status in zip(trials, statuses, strict=True) if status != "ok"}
    return {"done": len({*trials} - failed), "failed": len(failed), "running": 0, "waiting": 0}


def _table(
    folder: pathlib.Path, units: Sequence[Unit], counts: dict[str, int] | None, notes: list[str]
) -> pa.Table:
    path = folder / collect.TABLE
    if counts and (counts["running"] or counts["waiting"]):
        notes.append(
            "The sweep is not finished: "
            + ", ".join(f"{count:,} {name}" for name, count in counts.items())
            + ". What follows is what its trials have written so far; means are over these alone."
        )
        return collect.table(collect.rows(folder, units))
    if not path.exists():
        notes.append(f"There is no {path.name} yet; the rows are those in the trials' folders.")
        found = units or [
            Unit("trial", place.parent.name, "", None, "")
            for place in sorted((folder / "trials").glob("*/results.jsonl"))
        ]
        return collect.table(collect.rows(folder, found))
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ReportError(
            f"{path} is damaged ({str(error).splitlines()[0].rstrip('.')}); remove it, and the "
            "report takes the rows in the trials' folders."
        ) from error
    planned = {unit.id for unit in units if unit.kind == "trial"}
    if planned and "trial" in table.column_names and planned != {*table["trial"].to_pylist()}:
        notes.append(
            f"{path.name} is not that of the present plan; the rows are those in the trials' "
            "folders."
        )
        return collect.table(collect.rows(folder, units))
    return table


def _provenance(folder: pathlib.Path, units: Sequence[Unit]) -> tuple[dict[str, Any], list[str]]:
    """What the first trial that ran recorded: a trial's id covers the code and the versions."""
    known = (unit.folder(folder) for unit in units if unit.kind == "trial")
    for place in known if units else sorted((folder / "trials").glob("*")):
        if (place / "run.json").exists():
            return read_side_file(place / "run.json")
    return {}, []


def settings_of(text: str) -> dict[str, Any]:
    """The settings of a row, which the table holds as JSON text.

    Raises:
      ReportError: the text is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ReportError(f"`settings` must be a JSON object, got {text!r}.")
    return value

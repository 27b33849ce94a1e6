"""Reads a sweep's folder: its table, or the trials' own rows where there is none yet."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from experiments import launch
from experiments.sweeping import collect, progress
from experiments.sweeping.unit import Unit

_NEEDED = ("trial", "status")


class Sweep(NamedTuple):
    """What a sweep's folder holds.

    Attributes:
      rows: of all trials, each with its ``trial`` and ``status``.
      counts: trials ``done``, ``failed``, ``running`` and ``waiting``.
      run_file: the ``run.json`` of the first trial that ran; None if none did.
      notes: what reading the files brought up, in whole sentences.
    """

    rows: list[dict[str, Any]]
    counts: dict[str, int]
    run_file: pathlib.Path | None
    notes: list[str]


def is_sweep(folder: pathlib.Path) -> bool:
    """Whether a folder is that of a sweep, and not of a single run."""
    names = (collect.TABLE, progress.PLAN, "trials")
    return not (folder / "results.jsonl").exists() and any((folder / n).exists() for n in names)


def read(folder: pathlib.Path) -> Sweep:
    """Returns a sweep, finished or not; nothing is written, so it may go on meanwhile.

    Raises:
      ValueError: a damaged file, a table that is no sweep's, or no row yet.
    """
    notes: list[str] = []
    units = _plan(folder, notes)
    counts = _counts(folder, units) if units else None
    try:
        rows = _rows(folder, units, counts, notes)
    except (pa.ArrowException, OSError, TypeError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{folder}: the rows of its trials cannot be read: {first}.") from error
    if not rows:
        raise ValueError(
            f"{folder}: no trial has a row yet, so there is nothing to report; "
            f"`python -m experiments.sweep --status={folder}` says how far the sweep is."
        )
    missing = [name for name in _NEEDED if name not in rows[0]]
    if missing:
        raise ValueError(
            f"{folder / collect.TABLE}: not a table of a sweep: it lacks "
            f"{', '.join(f'`{name}`' for name in missing)} among {', '.join(rows[0])}."
        )
    if counts is None:
        trials = {row["trial"] for row in rows}
        failed = {row["trial"] for row in rows if row["status"] != "ok"}
        done = len(trials - failed)
        counts = {"done": done, "failed": len(failed), "running": 0, "waiting": 0}
    folders = [unit.folder(folder) for unit in units if unit.kind == "trial"]
    folders = folders or sorted((folder / "trials").glob("*"))
    found = (place / "run.json" for place in folders if (place / "run.json").exists())
    return Sweep(rows, counts, next(found, None), notes)


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


def _rows(
    folder: pathlib.Path, units: Sequence[Unit], counts: dict[str, int] | None, notes: list[str]
) -> list[dict[str, Any]]:
    path = folder / collect.TABLE
    if counts and (counts["running"] or counts["waiting"]):
        notes.append(
            "The sweep is not finished: "
            + ", ".join(f"{count:,} {name}" for name, count in counts.items())
            + ". What follows is what its trials have written so far; means are over these alone."
        )
        return collect.rows(folder, units)
    if not path.exists():
        notes.append(f"There is no {path.name} yet; the rows are those in the trials' folders.")
        written = units or [
            Unit("trial", place.parent.name, "", None, "")
            for place in sorted((folder / "trials").glob("*/results.jsonl"))
        ]
        return collect.rows(folder, written)
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({str(error).splitlines()[0].rstrip('.')}); remove it, and the "
            "report takes the rows in the trials' folders."
        ) from error
    planned = {unit.id for unit in units if unit.kind == "trial"}
    if planned and "trial" in table.column_names and planned != {*table["trial"].to_pylist()}:
        notes.append(
            f"{path.name} is not that of the present plan; the rows are those in the trials' "
            "folders."
        )
        return collect.rows(folder, units)
    return table.to_pylist()

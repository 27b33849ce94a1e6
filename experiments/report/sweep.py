"""Reads a sweep's folder: its table, or the trials' own rows where there is none yet."""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import journal, launch
from experiments.sweeping import collect, progress
from experiments.sweeping.unit import Unit

Rows = list[dict[str, Any]]


def is_sweep(folder: pathlib.Path) -> bool:
    """Whether a folder is that of a sweep, and not of a single run."""
    names = (collect.TABLE, progress.PLAN, "trials")
    return not journal.files(folder / "results.jsonl") and any((folder / n).exists() for n in names)


def read(folder: pathlib.Path) -> tuple[Rows, dict[str, int], pathlib.Path, list[str]]:
    """Reads a sweep, finished or not; nothing is written, so it may go on meanwhile.

    Returns:
      The rows of all trials, each with its ``trial`` and ``status``; how many trials are ``done``,
      ``failed``, ``running`` and ``waiting``; the ``run.json`` of the first that ran; what reading
      the files brought up, in whole sentences.

    Raises:
      ValueError: a damaged file, a table that is no sweep's, or no row yet.
    """
    notes: list[str] = []
    counts: dict[str, int] = {}
    try:
        units = progress.load(folder)
        found = progress.measure(folder, units).counts
        found["waiting"] += found["blocked"] + found["unknown"]
        counts = {name: found[name] for name in ("done", "failed", "running", "waiting")}
    except launch.UserError:
        places = sorted((folder / "trials").glob("*/results.jsonl"))
        units = [Unit("trial", place.parent.name, "", None, "") for place in places]
        fault = "could not be read" if (folder / progress.PLAN).exists() else "is missing"
        notes.append(
            f"{progress.PLAN} {fault}, so trials without a row are not known of; running the sweep "
            "again writes it anew."
        )
    rows = _table(folder, units, counts, notes)
    if rows is None:
        try:
            rows = collect.rows(folder, units, notes)
        except (OSError, TypeError, ValueError, launch.UserError) as error:
            first = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"{folder}: the rows of its trials cannot be read: {first}."
            ) from error
    if not rows:
        raise ValueError(
            f"{folder}: no trial has a row yet, so there is nothing to report; "
            f"`python -m experiments.sweep --status={folder}` says how far the sweep is."
        )
    if missing := ", ".join(f"`{name}`" for name in ("trial", "status") if name not in rows[0]):
        raise ValueError(
            f"{folder / collect.TABLE}: not a table of a sweep: it lacks {missing} among "
            f"{', '.join(rows[0])}."
        )
    if not counts:
        failed = {row["trial"] for row in rows if row["status"] != "ok"}
        done = len({row["trial"] for row in rows} - failed)
        counts = {"done": done, "failed": len(failed), "running": 0, "waiting": 0}
    ran = (unit.folder(folder) / "run.json" for unit in units if unit.kind == "trial")
    return rows, counts, next(filter(pathlib.Path.exists, ran), folder / "run.json"), notes


def _table(
    folder: pathlib.Path, units: Sequence[Unit], counts: dict[str, int], notes: list[str]
) -> Rows | None:
    """The rows of the sweep's table; None, with a note, where the trials' folders know more."""
    path = folder / collect.TABLE
    if counts.get("running") or counts.get("waiting"):
        states = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        notes.append(
            f"The sweep is not finished: {states}. What follows is what its trials have written so "
            "far; means are over these alone."
        )
        return None
    if not path.exists():
        notes.append(f"There is no {path.name} yet; the rows are those in the trials' folders.")
        return None
    import pyarrow as pa  # the page of a run alone needs none
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({str(error).splitlines()[0].rstrip('.')}); remove it, and the "
            "report takes the rows in the trials' folders."
        ) from error
    planned = {unit.id for unit in units if unit.kind == "trial"}
    if counts and "trial" in table.column_names and planned != {*table["trial"].to_pylist()}:
        notes.append(
            f"{path.name} is not that of the present plan; the rows are those in the trials' "
            "folders."
        )
        return None
    return table.to_pylist()

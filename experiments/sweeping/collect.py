"""The rows of all trials in one table."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import journal, launch
from experiments.sweeping import state as state_lib
from experiments.sweeping.unit import Unit

TABLE = "results.parquet"


def rows(
    workdir: pathlib.Path, units: Sequence[Unit], notes: list[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of the trials in the order of the sweep, each with its ``trial``.

    A trial that failed for good, or whose model did, or whose rows are damaged, has one row with
    ``status`` and ``message``. Nothing is written, so a trial may be at work meanwhile.

    Args:
      workdir: of the sweep.
      units: of the sweep.
      notes: to which files whose last line is cut off are added.
    """
    made: list[dict[str, Any]] = []
    broken: dict[str | None, str] = {}
    for unit in units:
        folder = unit.folder(workdir)
        state = state_lib.read(folder)
        if state.state == "failed":
            broken[unit.id] = state.message
        elif unit.needs in broken:
            broken[unit.id] = f"its model failed: {broken[unit.needs]}"
        if unit.kind != "trial":
            continue
        found = []
        if (folder / "results.jsonl").exists():
            written, fault = _written(folder / "results.jsonl")
            if fault and not written:
                broken.setdefault(unit.id, fault)
            elif fault and notes is not None:
                notes.append(fault)
            # A table has one value per cell.
            found = [
                {name: value for name, value in row.items() if name not in ("sums", "tags")}
                for row in written
                if row.get("status") == "ok"
            ]
        if unit.id in broken:
            found.append({"status": "failed", "message": broken[unit.id]})
        made += [{"trial": unit.id, "label": unit.label, **row} for row in found]
    return made


def _written(path: pathlib.Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of a trial, and what is wrong with their file."""
    try:
        found, whole = journal.read(path)
    except launch.UserError as error:
        return [], str(error)
    cut = f"The last line of {path} is cut off and was skipped; running the sweep again mends it."
    return found, "" if whole else cut


def damaged(workdir: pathlib.Path, units: Sequence[Unit]) -> list[Unit]:
    """The units that are done, and whose rows or checkpoint are not all there any more."""
    done = [u for u in units if state_lib.read(u.folder(workdir)).state == "done"]
    return [unit for unit in done if _lacks(unit, unit.folder(workdir))]


def _lacks(unit: Unit, folder: pathlib.Path) -> bool:
    if unit.kind == "model":
        return (folder / "run.json").exists() and not any(folder.glob("checkpoints/seed_*"))
    path = folder / "results.jsonl"
    return not path.exists() or _written(path)[1] != ""


def up_to_date(workdir: pathlib.Path, units: Sequence[Unit]) -> bool:
    """Whether the table holds the rows of the trials, in order, and no other."""
    import pyarrow as pa  # the page of a run alone needs none
    import pyarrow.parquet as pq

    names = ["trial", "label", "status"]
    try:
        held = pq.read_table(workdir / TABLE, columns=names).to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return False
    return held == [{name: row[name] for name in names} for row in rows(workdir, units)]


def write(workdir: pathlib.Path, found: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Writes rows to ``results.parquet``; settings, which differ in their keys, are JSON text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = workdir / TABLE
    names = dict.fromkeys(name for row in found for name in row)
    columns = {
        name: [
            json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
            for value in (row.get(name) for row in found)
        ]
        for name in names
    }
    with launch.replacing(path) as draft:
        pq.write_table(pa.table(columns), draft)
    return path

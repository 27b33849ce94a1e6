"""The rows of all trials in one table."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import journal, launch
from experiments.sweeping import state as state_lib
from experiments.sweeping.unit import Unit

TABLE = "results.parquet"


def rows(workdir: pathlib.Path, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """The rows of the trials in the order of the sweep, each with its ``trial``.

    A trial that failed for good, or whose model did, has one row with ``status`` and ``message``.
    Nothing is written, so a trial may be at work meanwhile.
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
            written, _ = journal.read(folder / "results.jsonl")
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

"""The rows of all trials in one table."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    broken = {}
    for unit in units:
        folder = unit.folder(workdir)
        state = state_lib.read(folder)
        if state.state == "failed":
            broken[unit.id] = state.message
        if unit.kind != "trial":
            continue
        found = []
        if (folder / "results.jsonl").exists():
            written, _ = journal.read(folder / "results.jsonl")
            # Sums join parts of a row; the table has rows that are whole.
            found = [
                {name: value for name, value in row.items() if name != "sums"}
                for row in written
                if row.get("status") == "ok"
            ]
        message = broken.get(unit.id)
        if message is None and unit.needs in broken:
            message = f"its model failed: {broken[unit.needs]}"
        if message is not None:
            found = [*found, {"status": "failed", "message": message}]
        made += [{"trial": unit.id, "label": unit.label, **row} for row in found]
    return made


def up_to_date(workdir: pathlib.Path, units: Sequence[Unit]) -> bool:
    """Whether every trial is done and the table holds their rows, in order, and no other."""
    trials = [unit for unit in units if unit.kind == "trial"]
    if any(state_lib.read(unit.folder(workdir)).state != "done" for unit in trials):
        return False
    try:
        held = pq.read_table(workdir / TABLE, columns=["trial", "label", "status"]).to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return False
    order = dict.fromkeys((row["trial"], row["label"]) for row in held)
    whole = list(order) == [(unit.id, unit.label) for unit in trials]
    return whole and all(row["status"] == "ok" for row in held)


def table(found: Sequence[dict[str, Any]]) -> pa.Table:
    """The rows as columns; settings, which differ in their keys, are JSON text."""
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(found):
        for name, value in row.items():
            column = columns.setdefault(name, [None] * number)
            column.append(json.dumps(value, sort_keys=True) if isinstance(value, dict) else value)
        for column in columns.values():
            if len(column) <= number:
                column.append(None)
    return pa.table(columns)


def write(workdir: pathlib.Path, found: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Replaces ``results.parquet`` with the :func:`table` of some rows."""
    path = workdir / TABLE
    with launch.replacing(path) as draft:
        pq.write_table(table(found), draft)
    return path

"""The table: one row for each function, its slips and how they came out, before and after."""

import json
import pathlib

import jax
import ml_collections

from experiments import launch, provenance
from tests.core.fuzz import (
    outcomes,
    valid_arrays,
    valid_core,
    valid_data,
    valid_few_shot,
    valid_generation,
    valid_grids,
    valid_layers,
    valid_measures,
    valid_meta,
    valid_methods,
    valid_text,
)
from tests.core.fuzz.calls import Call

# The tests measure them in so many parts, which processes share.
PARTS = 4
PATH = pathlib.Path(__file__).resolve().parents[3] / "experiments" / "results" / "fuzz.json"
COLUMNS = ("calls", "clear", "right", "unclear", "silent")
_PARTS = (
    *(valid_core, valid_methods, valid_measures, valid_arrays, valid_data, valid_generation),
    *(valid_text, valid_few_shot, valid_grids, valid_layers, valid_meta),
)
CALLS: dict[str, Call] = {name: call for part in _PARTS for name, call in part.TABLE.items()}
NOTHING_TO_SLIP = {name for part in _PARTS for name in part.NOTHING_TO_SLIP}


def measured(names: list[str] | None = None) -> list[outcomes.Outcome]:
    """Every slip of the named functions, or of all."""
    found: list[outcomes.Outcome] = []
    # Whose frame an error came from is read from its traceback, which has to be whole.
    filtering = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        for name, call in CALLS.items():
            if not names or name in names:
                found += outcomes.Runner(name, call).outcomes()
    finally:
        jax.config.update("jax_traceback_filtering", filtering)
    return found


def counts(found: list[outcomes.Outcome]) -> dict[str, dict[str, int]]:
    """The counts of each function."""
    by_name: dict[str, list[outcomes.Outcome]] = {}
    for outcome in found:
        by_name.setdefault(outcome.function, []).append(outcome)
    return {name: outcomes.counted(rows) for name, rows in by_name.items()}


Row = dict[str, str | int]


def read() -> list[Row]:
    """The committed rows: ``function``, and each column as ``before_...`` and ``after_...``."""
    rows: list[Row] = json.loads(PATH.read_text())["rows"]
    return rows


def write(found: dict[str, dict[str, int]], when: str) -> None:
    """Replaces the columns of ``when`` and keeps the others."""
    old = {row["function"]: row for row in read()} if PATH.exists() else {}
    record = provenance.of(ml_collections.ConfigDict({"when": when}))
    record["command"] = f"python -m tests.core.fuzz --write {when}"
    record["rows"] = []
    for name in CALLS:
        counts = found.get(name, {})
        new = {f"{when}_{column}": count for column, count in counts.items()}
        record["rows"].append({**old.get(name, {}), "function": name, **new})
    launch.write_json(PATH, record)

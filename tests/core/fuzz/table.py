"""The table: one row for each function, its slips and how they came out, before and after."""

import csv
import pathlib

import jax

from tests.core.fuzz import (
    outcomes,
    valid_arrays,
    valid_core,
    valid_data,
    valid_measures,
    valid_methods,
)
from tests.core.fuzz.calls import Call

# The tests measure them in so many parts, which processes share.
PARTS = 4
PATH = pathlib.Path(__file__).with_name("table.csv")
COLUMNS = ("calls", "clear", "right", "unclear", "silent")
_PARTS = (valid_core, valid_methods, valid_measures, valid_arrays, valid_data)
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


def read() -> list[dict[str, str]]:
    """The committed rows: ``function``, and each column as ``before_...`` and ``after_...``."""
    with PATH.open(newline="") as file:
        return list(csv.DictReader(file))


def silent(rows: list[dict[str, str]]) -> int:
    """How many calls with a slip return what nobody expects."""
    return sum(int(row["after_silent"]) for row in rows)


def write(found: dict[str, dict[str, int]], when: str) -> None:
    """Replaces the columns of ``when`` and keeps the others."""
    old = {row["function"]: row for row in read()} if PATH.exists() else {}
    names = [
        "function",
        *(f"{part}_{column}" for part in ("before", "after") for column in COLUMNS),
    ]
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        for name in [*CALLS]:
            row = {column: found[name][column] for column in COLUMNS} if name in found else {}
            new = {f"{when}_{column}": value for column, value in row.items()}
            writer.writerow({**old.get(name, {}), "function": name, **new})

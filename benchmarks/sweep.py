"""What does packing save: a sweep whose trials share processes, and one with a process each.

``python -m benchmarks.sweep --out=FILE --config=CONFIG`` runs the sweep of a config twice on
this machine, each time from nothing, and compares the tables. One worker trains the models before
it runs any trial, so that their time stands apart.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from experiments import launch, provenance
from experiments.sweeping import collect, progress

TIMING = {"seconds", "compile_seconds", "samples_per_second"}
PACKS = (16, 1)


def _table(folder: pathlib.Path) -> pa.Table:
    rows = pq.read_table(folder / collect.TABLE)
    return rows.drop_columns([name for name in rows.column_names if name in TIMING])


def _sweep(config: str, folder: pathlib.Path, pack: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.sweep", f"--config={config}"]
    command += [f"--workdir={folder}", f"--pack={pack}", "--workers=1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ended = time.time()
    units = progress.load(folder)
    states = progress.measure(folder, units).states
    trained = max(s.finished for unit, s in zip(units, states, strict=True) if unit.kind == "model")
    began = min(s.started for unit, s in zip(units, states, strict=True) if unit.kind == "model")
    return {
        "pack": pack,
        "trials": sum(unit.kind == "trial" for unit in units),
        "seconds_of_models": trained - began,
        "seconds": ended - trained,
    }


def run(out: str, config: str) -> dict[str, Any]:
    """Runs both, and writes the record.

    Raises:
      UserError: tables that differ, or an ``out`` that is there.
    """
    launch.new_file(out)
    record = provenance.of(ml_collections.ConfigDict({"config": config}))
    with tempfile.TemporaryDirectory() as place:
        folders = [pathlib.Path(place) / str(pack) for pack in PACKS]
        rows = [_sweep(config, folder, pack) for folder, pack in zip(folders, PACKS, strict=True)]
        if not _table(folders[0]).equals(_table(folders[1])):
            raise launch.UserError("the tables of the two sweeps differ; nothing is written.")
    record |= {"rows": rows, "speedup": rows[1]["seconds"] / rows[0]["seconds"]}
    launch.write_json(out, record)
    return record


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    record = run(*(holder.value for holder in _FLAGS))
    for row in record["rows"]:
        print(f"pack {row['pack']:2}: {row['seconds']:.1f} s for {row['trials']} trials")
    print(f"{record['speedup']:.1f} times as fast, the same rows")


if __name__ == "__main__":
    _FLAGS = (
        flags.DEFINE_string("out", None, "The JSON file to write.", required=True),
        flags.DEFINE_string("config", None, "Config file with sweep(add).", required=True),
    )
    launch.run(main)

"""The few numbers that README and pages show, each computed from the raw rows of its file.

An entry of ``experiments/results/headlines.json`` names a file, a function of this module and what
it is given (``where``), beside value, unit, digits, device and command.
``python -m experiments.report.headlines`` computes the values anew; a test does, too.
"""

import importlib
import json
import statistics
from collections.abc import Mapping
from typing import Any

from experiments.report import alignment, committed

Record = Mapping[str, Any]


def rate(record: Record, way: str, dtype: str, over: str | None = None) -> float:
    """Returns the sample-steps per second of rotation, ten steps; ``over`` divides by a way's."""
    rates = {
        row["way"]: float(row["sample_steps_per_second"])
        for row in record["rows"]
        if (row["work"], row["compute_dtype"], row["num_steps"]) == ("rotation", dtype, 10)
    }
    return rates[way] / (rates[over] if over else 1)


def mae_share(record: Record) -> float:
    """Returns the rate of TTT-MAE in percent of large matrix products of the same dtype."""
    (row,) = (r for r in record["rows"] if (r["work"], r["way"]) == ("ttt_mae", "ttt_jax"))
    return 100 * float(row["tflops"]) / record["matmul"]["tflops"][row["compute_dtype"]]


def two_device_speedup(record: Record) -> float:
    """Returns the rate of two devices over that of one."""
    rates = {row["devices"]: row["sample_steps_per_second"] for row in record["rows"]}
    return rates[2] / rates[1]


def minutes(record: Record, **where: Any) -> float:
    """Returns the minutes that adapting took for the reported, corrupted images.

    The seconds of the calls, and the one compilation that all corruptions share.
    """
    rows = [row for row in record["rows"] if where.items() <= row.items()]
    shifted = [r for r in rows if r["split_role"] == "reported" and r["domain"] != "clean"]
    seconds = sum(row["seconds"] for row in shifted)
    return (seconds + max(row["compile_seconds"] for row in rows)) / 60


def mean_error(record: Record, method: str, **where: Any) -> float:
    """Returns the mean error in percent over the shifted domains, then over the seeds."""
    errors = committed.errors(record, lambda row: where.items() <= row.items())[method]
    return statistics.mean(map(committed.mean, errors.values()))


def alignment_correlation(record: Record) -> float:
    """Returns Pearson's r of gradient alignment and gain over the sets."""
    r = alignment.correlation(record["rows"])
    if r is None:
        raise ValueError("the correlation needs three sets whose gains differ; the file has fewer.")
    return r


def computed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an entry with its value, device and command as its file has them now."""
    module, function = entry["select"].split(":")
    record = committed.read(entry["file"].rpartition("/")[2].removesuffix(".json"))
    value = getattr(importlib.import_module(module), function)(record, **entry["where"])
    fresh = {"value": round(value, entry["digits"]), "device": record["device"]}
    return {**entry, **fresh, "command": record["command"]}


if __name__ == "__main__":
    path = committed.RESULTS / "headlines.json"
    entries = {name: computed(entry) for name, entry in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(entries, indent=1) + "\n")

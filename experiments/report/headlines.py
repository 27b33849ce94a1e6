"""The few numbers that README and pages show, each computed from the raw rows of its file.

``experiments/results/headlines.json`` names for every number the file and the function here that
computes it: ``{NAME: {"value", "unit", "device", "file", "select", "command"}}``.
``python -m experiments.report.headlines`` writes it anew; a test recomputes every value.
"""

import json
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.report import alignment, committed

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
Record = Mapping[str, Any]
# A file keeps the command that made it; the program has another name today.
_RENAMED = ("python -m experiments.bench ", "python -m benchmarks.vision ")


class _Source(NamedTuple):
    """Where a number comes from, and how many decimals it is shown with."""

    file: str
    select: Callable[[Record], float]
    unit: str
    digits: int = 1


def _rate(record: Record, way: str, dtype: str, work: str = "rotation", steps: int = 10) -> float:
    """The sample-steps per second of one row; the file holds no seconds of single calls."""
    (row,) = (
        row
        for row in record["rows"]
        if (row["work"], row["way"], row["compute_dtype"], row["num_steps"])
        == (work, way, dtype, steps)
    )
    return float(row["sample_steps_per_second"])


def rotation_rate_bf16(record: Record) -> float:
    """Returns sample-steps per second of rotation, ten steps, bfloat16."""
    return _rate(record, "ttt_jax", "bfloat16")


def rotation_rate_f32(record: Record) -> float:
    """Returns sample-steps per second of rotation, ten steps, float32."""
    return _rate(record, "ttt_jax", "float32")


def torch_vmap_rate(record: Record) -> float:
    """Returns the rate of ``torch.func.vmap``."""
    return _rate(record, "torch_func_vmap", "bfloat16")


def torch_loop_rate(record: Record) -> float:
    """Returns the rate of the published loop over images."""
    return _rate(record, "torch_loop", "bfloat16")


def speedup_over_vmap(record: Record) -> float:
    """Returns how many times the rate of ``torch.func.vmap`` ours is."""
    return rotation_rate_bf16(record) / torch_vmap_rate(record)


def speedup_over_loop(record: Record) -> float:
    """Returns how many times the rate of the published loop ours is."""
    return rotation_rate_bf16(record) / torch_loop_rate(record)


def mae_share(record: Record) -> float:
    """Returns the rate of TTT-MAE in percent of large matrix products of the same dtype."""
    (row,) = (r for r in record["rows"] if (r["work"], r["way"]) == ("ttt_mae", "ttt_jax"))
    return 100 * float(row["tflops"]) / record["matmul"]["tflops"][row["compute_dtype"]]


def two_device_speedup(record: Record) -> float:
    """Returns the rate of two devices over that of one."""
    rates = {row["devices"]: row["sample_steps_per_second"] for row in record["rows"]}
    return rates[2] / rates[1]


def table_minutes(record: Record) -> float:
    """Returns the minutes that adapting took for the reported, corrupted images, in bfloat16.

    The seconds of the calls, and the one compilation that all corruptions share.
    """
    rows = [
        row
        for row in record["rows"]
        if (row["method"], row["compute_dtype"]) == ("rotation", "bfloat16")
    ]
    seconds = sum(
        row["seconds"]
        for row in rows
        if row["split_role"] == "reported" and row["domain"] != "clean"
    )
    return (seconds + max(row["compile_seconds"] for row in rows)) / 60


def _mean_error(record: Record, method: str, training: str | None = None) -> float:
    """The mean error in percent over domains, then over the seeds, from the wrong images."""
    by_seed: dict[int, list[float]] = {}
    for row in record["rows"]:
        if (
            row["method"] == method
            and row["split_role"] == "reported"
            and row["domain"] != "clean"
            and training in (None, row.get("training"))
        ):
            wrong = round(row["error"] * row["num_examples"])
            by_seed.setdefault(row["seed"], []).append(100 * wrong / row["num_examples"])
    return statistics.mean(statistics.mean(errors) for errors in by_seed.values())


def joint_error(record: Record) -> float:
    """Returns the mean error of the jointly trained model."""
    return _mean_error(record, "joint", "joint")


def source_error(record: Record) -> float:
    """Returns the mean error of the model that was trained on the main task alone."""
    return _mean_error(record, "source", "source")


def rotation_error(record: Record) -> float:
    """Returns the mean error after ten private steps of rotation."""
    return _mean_error(record, "rotation", "joint")


def augmented_error(record: Record) -> float:
    """Returns the mean error of test-time augmentation of the joint model."""
    return _mean_error(record, "augmented", "joint")


def memo_error(record: Record) -> float:
    """Returns the mean error of MEMO over crops, from the joint model."""
    return _mean_error(record, "memo", "joint")


def online_error(record: Record) -> float:
    """Returns the mean error of one rotation step per image, kept along the stream."""
    return _mean_error(record, "rotation_online", "joint")


def published_memo_error(record: Record) -> float:
    """Returns the mean error of MEMO with its published views, from its own models."""
    return _mean_error(record, "memo_augmix")


def memo_source_error(record: Record) -> float:
    """Returns the mean error of the models that the published MEMO starts from."""
    return _mean_error(record, "source")


def composition_error(record: Record) -> float:
    """Returns the mean error of the composition that validation chose."""
    return _mean_error(record, "rotation_memo_augmented_online")


def alignment_correlation(record: Record) -> float:
    """Returns Pearson's r of gradient alignment and gain over the sets."""
    r = alignment.correlation(record["rows"])
    if r is None:
        raise ValueError("the correlation needs three sets whose gains differ; the file has fewer.")
    return r


def _demo_error(method: str) -> Callable[[Record], float]:
    def select(record: Record) -> float:
        return _mean_error(record, method)

    select.__name__ = f"demo_{method}"
    return select


demo_source = _demo_error("source")
demo_norm_prior_views = _demo_error("norm_prior_views")
demo_rotation_memo_augmented = _demo_error("rotation_memo_augmented")

_RATE, _ERROR = "sample-steps/s", "% error, mean over 15 corruptions"
SOURCES = {
    "rotation_rate_bf16": _Source("bench_vision", rotation_rate_bf16, _RATE, 0),
    "rotation_rate_f32": _Source("bench_vision", rotation_rate_f32, _RATE, 0),
    "torch_vmap_rate": _Source("bench_vision", torch_vmap_rate, _RATE, 0),
    "torch_loop_rate": _Source("bench_vision", torch_loop_rate, _RATE, 0),
    "speedup_over_vmap": _Source("bench_vision", speedup_over_vmap, "times"),
    "speedup_over_loop": _Source("bench_vision", speedup_over_loop, "times"),
    "mae_share": _Source("bench_vision", mae_share, "% of the rate of matrix products"),
    "two_device_speedup": _Source("bench_devices", two_device_speedup, "times"),
    "table_minutes": _Source("cifar10c_precision", table_minutes, "minutes"),
    "joint_error": _Source("cifar10c_level5", joint_error, _ERROR),
    "source_error": _Source("cifar10c_level5", source_error, _ERROR),
    "rotation_error": _Source("cifar10c_level5", rotation_error, _ERROR),
    "augmented_error": _Source("cifar10c_level5", augmented_error, _ERROR),
    "memo_error": _Source("cifar10c_level5", memo_error, _ERROR),
    "online_error": _Source("cifar10c_level5", online_error, _ERROR),
    "published_memo_error": _Source("cifar10c_memo", published_memo_error, _ERROR),
    "memo_source_error": _Source("cifar10c_memo", memo_source_error, _ERROR),
    "composition_error": _Source("cifar10c_level5_composition", composition_error, _ERROR, 2),
    "alignment_correlation": _Source("alignment_cifar10c", alignment_correlation, "Pearson's r", 2),
    "demo_source": _Source("digits_seeds", demo_source, _ERROR),
    "demo_norm_prior_views": _Source("digits_seeds", demo_norm_prior_views, _ERROR),
    "demo_rotation_memo_augmented": _Source("digits_seeds", demo_rotation_memo_augmented, _ERROR),
}


def compute() -> dict[str, dict[str, Any]]:
    """Returns every entry of ``headlines.json``, computed from the raw rows of its file."""
    entries = {}
    for name, source in SOURCES.items():
        record = committed.read(source.file)
        entries[name] = {
            "value": round(source.select(record), source.digits),
            "unit": source.unit,
            "device": record["device"],
            "file": f"experiments/results/{source.file}.json",
            "select": f"experiments.report.headlines:{source.select.__name__}",
            "command": record["command"].replace(*_RENAMED),
        }
    return entries


if __name__ == "__main__":
    (RESULTS / "headlines.json").write_text(json.dumps(compute(), indent=1) + "\n")

"""The few numbers that README and pages show, each computed from the raw rows of its file.

An entry of ``experiments/results/headlines.json`` names a file and a function of its record here,
beside value, unit, device and command. ``python -m experiments.report.headlines`` computes the
values anew, with as many decimals as they have; a test does, too.
"""

import importlib
import json
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

from experiments.report import alignment, committed

Record = Mapping[str, Any]
# A file keeps the command that made it; the program has another name today.
_RENAMED = ("python -m experiments.bench ", "python -m benchmarks.vision ")


def rate(record: Record, way: str, of: str = "rate", over: str = "", **where: Any) -> float:
    """Returns the rate of a way of doing the rows' work; ``over`` divides by another way's."""
    rates = {row["way"]: float(row[of]) for row in record["rows"] if where.items() <= row.items()}
    return rates[way] / (rates[over] if over else 1)


def mae_share(record: Record) -> float:
    """Returns the rate of TTT-MAE in percent of large matrix products of the same dtype."""
    (row,) = (r for r in record["rows"] if (r["work"], r["way"]) == ("ttt_mae", "ttt_jax"))
    return 100 * float(row["tflops"]) / record["matmul"]["tflops"][row["compute_dtype"]]


def ratio(record: Record, of: str, by: str, above: int, below: int, **where: Any) -> float:
    """Returns what rows hold at one value of ``by`` over what they hold at another."""
    rows = {row[by]: float(row[of]) for row in record["rows"] if where.items() <= row.items()}
    return rows[above] / rows[below]


def minutes(record: Record, **where: Any) -> float:
    """Returns the minutes of adapting to the reported, corrupted images and of one compilation."""
    rows = [row for row in record["rows"] if where.items() <= row.items()]
    shifted = [r for r in rows if r["split_role"] == "reported" and r["domain"] != "clean"]
    seconds = sum(row["seconds"] for row in shifted)
    return (seconds + max(row["compile_seconds"] for row in rows)) / 60


def mean_error(record: Record, method: str, **where: Any) -> float:
    """Returns the mean error in percent over the shifted domains, then over the seeds."""
    errors = committed.errors(record, lambda row: where.items() <= row.items())[method]
    return statistics.mean(map(committed.mean, errors.values()))


def memo_rate(record: Record, over_torch: bool = False) -> float:
    """Returns the rate of MEMO on ResNet-50 at the chosen size, or over the best PyTorch."""
    (row,) = (row for row in record["rows"] if row["work"] == "memo_resnet50")
    best = max(form["rate"] for form in record["torch"] if "rate" in form)
    return float(row["rates"][str(row["chosen"])]) / (best if over_torch else 1)


def alignment_correlation(record: Record) -> float:
    """Returns Pearson's r of gradient alignment and gain over the sets."""
    r = alignment.correlation(record["rows"])
    if r is None:
        raise ValueError("the correlation needs three sets whose gains differ; the file has fewer.")
    return r


two_device_speedup = partial(ratio, of="sample_steps_per_second", by="devices", above=2, below=1)
gradient_memory = partial(ratio, of="temporary_bytes", by="chunks", above=64, below=16, way="mixed")
rotation = partial(rate, of="sample_steps_per_second", work="rotation", num_steps=10)
rotation_rate_bf16 = partial(rotation, way="ttt_jax", compute_dtype="bfloat16")
rotation_rate_f32 = partial(rotation, way="ttt_jax", compute_dtype="float32")
torch_vmap_rate = partial(rotation, way="torch_func_vmap", compute_dtype="bfloat16")
torch_loop_rate = partial(rotation, way="torch_loop", compute_dtype="bfloat16")
speedup_over_vmap = partial(rotation_rate_bf16, over="torch_func_vmap")
speedup_over_loop = partial(rotation_rate_bf16, over="torch_loop")
lora_task_steps = partial(rate, way="ttt_jax", work="tasks", tasks=32)
document_tokens = partial(rate, way="ttt_jax", work="documents", tasks=32, logits="bfloat16")
document_tokens_over_stacked = partial(document_tokens, over="stacked_graph")
memo_resnet50_over_torch = partial(memo_rate, over_torch=True)
table_minutes = partial(minutes, method="rotation", compute_dtype="bfloat16")
# The jointly trained model as it is, and one that was trained on the main task alone.
joint_error = partial(mean_error, method="joint", training="joint")
source_error = partial(mean_error, method="source", training="source")
rotation_error = partial(mean_error, method="rotation", training="joint")
augmented_error = partial(mean_error, method="augmented", training="joint")
memo_error = partial(mean_error, method="memo", training="joint")
online_error = partial(mean_error, method="rotation_online", training="joint")
published_memo_error = partial(mean_error, method="memo_augmix")
plain_source_error = partial(mean_error, method="source")
composition_error = partial(mean_error, method="rotation_memo_augmented_online")
demo_norm_prior_views = partial(mean_error, method="norm_prior_views")
demo_rotation_memo_augmented = partial(mean_error, method="rotation_memo_augmented")


def silent(record: Record) -> float:
    """Returns how many calls of the fuzz table return a wrong result in silence."""
    return float(sum(int(row["after_silent"]) for row in record["rows"]))


def nats_of_window(record: Record, window: int = 0) -> float:
    """Returns the nats per token of an isolated window under the first model of the file."""
    return float(record["rows"][0]["nats_per_token"][window])


def document_savings(record: Record, *roles: str) -> list[float]:
    """Returns the percent of bits saved per document over its best control of the same window."""
    rows = [row for row in record["rows"] if not roles or row["role"] in roles]
    return [100 * (1 - row["adapted"] / min(row["isolated"], row["sliding"])) for row in rows]


def books_saved(record: Record) -> float:
    """Returns the mean over whole books of the bits saved, in percent."""
    return statistics.mean(document_savings(record, "books"))


def documents_harmed(record: Record) -> float:
    """Returns the percent of all documents that needs more bits than its best control."""
    return 100 * statistics.mean(saved < 0 for saved in document_savings(record))


def wins(record: Record) -> float:
    """Returns on how many problems discovery finds better solutions than as many samples do."""
    best = {row["way"]: row["best"] for row in record["rows"]}
    pairs = zip(best["discover"], best["samples"], strict=True)
    return float(sum(round(a - b, 6) > 0 for a, b in pairs))  # Equal ones are so to six digits.


def computed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an entry with its value, device and command as its file has them now."""
    module, function = entry["select"].split(":")
    record = committed.read(entry["file"].rpartition("/")[2].removesuffix(".json"))
    value = getattr(importlib.import_module(module), function)(record)
    digits = len(str(entry["value"]).partition(".")[2])
    fresh = {"value": round(value, digits or None), "device": record["device"]}
    return {**entry, **fresh, "command": record["command"].replace(*_RENAMED)}


if __name__ == "__main__":
    path = committed.RESULTS / "headlines.json"
    entries = {name: computed(entry) for name, entry in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(entries, indent=1) + "\n")

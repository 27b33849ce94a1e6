"""From the rows of an evaluation to the lines of ``results.jsonl``, and back to what is missing."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import ttt_jax
from experiments import journal, launch
from experiments.settings import Candidate
from ttt_jax import audit
from ttt_jax.evaluation import Row
from ttt_jax.task import Metric

# A share of a method's instances from which on a fallback to the source is said at the end.
_MANY_LOST = 0.1
# What rows of several ranges add beside their sums, and what no two runs have in common.
_ADDED = ("num_examples", "seconds", "non_finite", "updated", "resets")
_TIMES = ("seconds", "compile_seconds", "samples_per_second")


def line(candidate: Candidate, row: Row, fields: Mapping[str, Any], unit: int) -> dict[str, Any]:
    """A finished row as JSON has it.

    Args:
      candidate: what was run.
      row: what it did.
      fields: what all rows of the seed and role share: dataset, seed, split_role, checkpoint.
      unit: how many rows its method has on its stream.
    """
    facts = candidate.facts
    return {
        "method": candidate.label,
        **fields,
        "stream": row.stream,
        "unit_rows": unit,
        **row.tags,
        "status": "ok",
        **row.values,
        # Exact, so that parts of a row are joined by adding them.
        "sums": jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), dict(row.sums)),
        "num_examples": row.num_examples,
        "scope": candidate.scope,
        "num_steps": facts["num_steps"],
        "reset": facts["reset"],
        "predict": facts["predict"],
        "seconds": row.seconds,
        "compile_seconds": row.compile_seconds,
        "samples_per_second": row.num_examples / row.seconds,
        "non_finite": row.counts["non_finite"],
        "updated": row.counts["updated"],
        "resets": row.counts["resets"],
        "settings": candidate.settings,
        "ttt_jax": ttt_jax.__version__,
    }


def failed(
    candidate: Candidate,
    error: Exception,
    fields: Mapping[str, Any],
    stream: str,
    cells: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of a method that failed on a stream, one per combination of tags."""
    message = f"{type(error).__name__}: {error}"[:500]
    common = {"method": candidate.label, **fields, "stream": stream, "unit_rows": len(cells)}
    return [{**common, **tags, "status": "failed", "message": message} for tags in cells]


def joined(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Rows of several ranges of examples as the row of all of them.

    Sums, numbers of examples and seconds are added; of ``compile_seconds`` the longest is taken.

    Args:
      rows: finished ones of one identity.
      metrics: of the task; lists of sums are arrays for their ``value``.

    Raises:
      ValueError: rows of a method that takes several examples at once or of a gradual sequence,
        rows without sums, or rows that differ in what is no measurement.
    """
    first = rows[0]
    if first["scope"] != "per_sample":
        raise ValueError(
            "its images adapt together (a batch or a stream), so one part must have them all"
        )
    if first.get("sequence") == "gradual":
        raise ValueError(
            "an image's place in a gradual sequence says how severe its corruption is, so one part "
            "must have them all; cut by --methods instead"
        )
    if not all("sums" in row for row in rows):
        raise ValueError(
            "ranges are joined by the sums of their rows, which older releases did not write; make "
            "all parts with this release, in new work folders"
        )
    for row in rows[1:]:
        both = first["sums"].keys() & row["sums"].keys()
        if found := difference(first, row, without=("sums", *_ADDED, *_TIMES, *both)):
            raise ValueError("{} is {!r} and {!r}".format(*found))
    if unknown := sorted(first["sums"].keys() - metrics.keys()):
        raise ValueError(
            f"the task has no metric {', '.join(unknown)} in this release; merge with the release "
            "that made the parts"
        )
    sums = jax.tree.map(lambda *leaves: sum(leaves), *(row["sums"] for row in rows))
    whole = {**first, "sums": sums} | {name: sum(row[name] for row in rows) for name in _ADDED}
    whole |= {name: metrics[name].value(_arrays(held)) for name, held in sums.items()}
    whole["compile_seconds"] = max(row["compile_seconds"] for row in rows)
    whole["samples_per_second"] = whole["num_examples"] / whole["seconds"]
    return whole


def _arrays(sums: Any) -> Any:
    """Sums as JSON has them, with arrays for lists of numbers."""
    if isinstance(sums, dict):
        return {name: _arrays(held) for name, held in sums.items()}
    try:
        return np.asarray(sums)
    except ValueError:  # a tuple of several shapes
        return tuple(map(_arrays, sums))


def difference(
    row: Mapping[str, Any],
    other: Mapping[str, Any],
    *,
    without: Sequence[str] = _TIMES,
    rounding: bool = False,
) -> tuple[str, Any, Any] | None:
    """A field in which two rows differ, and both values.

    Args:
      row: one of the two.
      other: the other one.
      without: fields that may differ.
      rounding: whether numbers that are not whole may differ by rounding, as on two machines.
    """
    steps = row["num_examples"] if row.get("scope") == "stream" else row.get("num_steps") or 0
    limit = audit.tolerance(steps) if rounding else 0.0

    def same(a: Any, b: Any) -> bool:
        floats = isinstance(a, float) and isinstance(b, float)
        return bool(np.isclose(a, b, limit, 0.0, equal_nan=True) if floats else a == b)

    for name in sorted({*row, *other} - {*without}):
        leaves, structure = jax.tree.flatten(row.get(name))
        others, structure_of_other = jax.tree.flatten(other.get(name))
        if structure != structure_of_other or not all(map(same, leaves, others)):
            return name, row.get(name), other.get(name)
    return None


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a row: its method, stream and tags, data, seed and role."""
    names = ("method", "dataset", "seed", "split_role")
    tags = {name: row.get(name) for name in ("stream", "domain", "severity", "document", "source")}
    if tags["stream"] is None:  # rows of earlier releases
        tags["stream"] = tags["domain"]
    return (*(row[name] for name in names), json.dumps(tags))


def finished(rows: Iterable[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    """The units ``(method, stream, seed, role)`` that have all their rows."""
    counts: dict[tuple[Any, ...], int] = {}
    wanted: dict[tuple[Any, ...], int] = {}
    for row in rows:
        stream = row.get("stream", row.get("domain"))
        unit = (row["method"], stream, row["seed"], row["split_role"])
        counts[unit] = counts.get(unit, 0) + 1
        wanted[unit] = row.get("unit_rows", 1)
    return {unit for unit, count in counts.items() if count >= wanted[unit]}


def require_checkpoint(results: journal.Journal, fields: Mapping[str, Any]) -> None:
    """Refuses rows of another checkpoint of the same seed.

    Raises:
      UserError: naming both.
    """
    for row in results.rows():
        if row["seed"] == fields["seed"] and row["checkpoint"] != fields["checkpoint"]:
            raise launch.UserError(
                f"{results.path} has rows of another checkpoint ({row['checkpoint']}, now "
                f"{fields['checkpoint']}). Use another --workdir, or remove the file."
            )


def write_instances(folder: pathlib.Path, rows: Sequence[Row], fields: Mapping[str, Any]) -> None:
    """Writes what every instance of a unit adds to its metrics, for paired intervals.

    ``folder/METHOD__STREAM__SEED__ROLE.npz`` has ``id [N]``, ``metrics [M]``, ``sums [N, M]``, the
    tags ``[N]`` each, and ``method, stream, seed, role``. It holds the metrics that are means.
    """
    first = rows[0]
    means = [name for name, sums in first.each.items() if _is_mean(sums)]
    columns = [
        np.concatenate([np.asarray(row.each[name][0], np.float32) for row in rows])
        for name in means
    ]
    tags = {
        name: np.concatenate([np.full(row.num_examples, row.tags[name]) for row in rows])
        for name in first.tags
    }
    unit = {"method": first.method, "stream": first.stream}
    unit |= {"seed": fields["seed"], "role": fields["split_role"]}
    name = "__".join(str(value).replace("/", "_") for value in unit.values())
    arrays = {name: np.asarray(value) for name, value in unit.items()}
    ids = np.concatenate([row.id for row in rows])
    arrays |= {"id": ids, "metrics": np.asarray(means), "sums": np.stack(columns, axis=1)}
    launch.write_npz(folder / f"{name}.npz", {**tags, **arrays}, compressed=True)


def _is_mean(sums: Any) -> bool:
    if not isinstance(sums, tuple) or len(sums) != 2:
        return False
    above, below = (np.asarray(leaf) for leaf in sums)
    return above.ndim == below.ndim == 1 and bool((below == 1).all())


def not_adapted(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line per method that fell back to the source on many instances."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        if row["status"] == "ok":
            both = counts.setdefault(row["method"], [0, 0])
            both[0] += row["non_finite"]
            both[1] += row["num_examples"]
    return [
        f"{name}: steps were not finite on {lost} of {count} instances, which were not adapted; a "
        f"smaller methods.{name}.learning_rate may help."
        for name, (lost, count) in counts.items()
        if lost > _MANY_LOST * count
    ]

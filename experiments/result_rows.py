"""From the rows of an evaluation to the lines of ``results.jsonl``, and back to what is missing."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import ttt_jax
from experiments import journal, launch
from experiments.settings import Candidate
from ttt_jax.evaluation import Row
from ttt_jax.task import Examples, Task, cells, joined_tags

# A share of a method's instances from which on a fallback to the source is said at the end.
_MANY_LOST = 0.1


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
        "tags": list(row.tags),
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


def chances(task: Task, batches: Sequence[Examples]) -> list[dict[str, float]]:
    """Per row of a stream the value of a constant answer, ``{}`` where the metric has none."""
    tags = joined_tags(batches)
    parts = [mask for _, mask in cells(tags, sum(len(batch.id) for batch in batches))]
    chance = task.metrics[task.chooses].chance
    if chance is None:
        return [{} for _ in parts]
    y = jax.tree.map(lambda *a: np.concatenate(a), *(batch.y for batch in batches))
    return [{"chance": chance(jax.tree.map(lambda leaf, m=m: leaf[m], y))} for m in parts]


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
    return [
        {**common, "tags": list(tags), **tags, "status": "failed", "message": message}
        for tags in cells
    ]


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

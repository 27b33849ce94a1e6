"""What every task must hold, checked on its own data."""

import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ttt_jax import _arguments
from ttt_jax.base import Params

_ROLES = ("validation", "reported")
RULE = _arguments.having("a Task", "init", "heads", "streams")


def broken_rules(task: Any, *, seed: int = 0, max_batches: int = 2) -> list[str]:
    """The rules that a :class:`ttt_jax.task.Task` breaks, a sentence each.

    Args:
      task: as the programs get it.
      seed: of its streams, its training data and its parameters.
      max_batches: how many batches of each stream are read.
    """
    params = jax.jit(task.init)(jax.random.key(seed))
    broken: list[str] = []
    for name in (task.chooses, *task.ties):
        if name not in task.metrics:
            broken.append(f"chooses and ties must name metrics ({list(task.metrics)}); got {name}.")
    heads = task.heads()
    if not heads:
        return [*broken, "heads() must give at least one model function; it is empty."]
    head = jax.jit(next(iter(heads.values())))
    seen: dict[str, set[int]] = {}
    for role in _ROLES:
        streams = task.streams(role, seed)
        if not streams:
            broken.append(f"streams({role!r}, seed) must have a stream; it is empty.")
        for name, batches in streams.items():
            where = f"{role} stream {name!r}"
            parts = list(_first(batches, max_batches))
            if not parts:
                broken.append(f"The {where} must have a batch; it is empty.")
            for batch in parts:
                broken += _of_batch(batch, where)
                seen.setdefault(role, set()).update(_fingerprints(batch.x))
            if parts and not broken:
                broken += _repeats(batches, parts, where)
                broken += _of_metrics(task, head, params, parts[0], where)
    training = list(_first(task.training(seed), max_batches))
    if not training:
        broken.append("training(seed) must have a batch; it is empty.")
    for batch in training:
        broken += _of_batch(batch, "training split")
        seen.setdefault("training", set()).update(_fingerprints(batch.x))
    broken += _shared(seen)
    if training and not broken:
        broken += _of_loss(task, params, training[0], jax.random.key(seed))
    return broken


def _first(batches: Any, count: int) -> Iterator[Any]:
    for number, batch in enumerate(batches):
        if number == count:
            return
        yield batch


def _of_batch(batch: Any, where: str) -> list[str]:
    ids = np.asarray(batch.id)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        return [f"id of the {where} must be integers [N]; got {ids.dtype} {ids.shape}."]
    trees = {"x": batch.x, "y": batch.y, **{f"tag {k!r}": v for k, v in batch.tags.items()}}
    broken = [
        f"{name} of the {where} must have a leading axis of {len(ids)}; got {np.shape(leaf)}."
        for name, tree in trees.items()
        for leaf in jax.tree.leaves(tree)
        if np.shape(leaf)[:1] != (len(ids),)
    ]
    if len(set(ids.tolist())) < len(ids):
        broken.append(f"Each id of a batch of the {where} must be there once, as keys follow it.")
    return broken


def _fingerprints(x: Any) -> set[int]:
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(x)]
    count = len(leaves[0])
    return {zlib.crc32(b"".join(leaf[i].tobytes() for leaf in leaves)) for i in range(count)}


def _shared(seen: dict[str, set[int]]) -> list[str]:
    names = list(seen)
    return [
        f"The {first} and the {second} instances must differ; {len(seen[first] & seen[second])} "
        "are in both."
        for number, first in enumerate(names)
        for second in names[number + 1 :]
        if seen[first] & seen[second]
    ]


def _repeats(batches: Any, parts: list[Any], where: str) -> list[str]:
    again = list(_first(batches, len(parts)))
    same = len(again) == len(parts) and all(
        np.array_equal(a, b)
        for first, second in zip(parts, again, strict=True)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
    return [] if same else [f"The {where} must give the same batches each time it is iterated."]


def _of_metrics(task: Any, head: Any, params: Params, batch: Any, where: str) -> list[str]:
    output = jax.tree.map(np.asarray, head(params, batch.x))
    count = len(batch.id)
    broken = []
    for name, metric in task.metrics.items():
        sums = metric.of(output, output, batch)
        if sums is None:
            continue
        if any(np.shape(leaf)[:1] != (count,) for leaf in jax.tree.leaves(sums)):
            broken.append(f"Sums of the metric {name} must be [N, ...], one per instance.")
            continue
        half = count // 2
        total = jax.tree.map(lambda leaf: np.asarray(leaf).sum(0), sums)
        parts = jax.tree.map(
            lambda leaf, at=half: np.asarray(leaf)[:at].sum(0) + np.asarray(leaf)[at:].sum(0), sums
        )
        values = [np.asarray(metric.value(tree), np.float64) for tree in (total, parts)]
        if not np.allclose(values[0], values[1], rtol=1e-5, equal_nan=True):
            broken.append(
                f"The metric {name} of the {where} must be a value of sums: parts differ."
            )
    return broken


def _of_loss(task: Any, params: Params, batch: Any, key: jax.Array) -> list[str]:
    broken = []
    value, grads = jax.jit(jax.value_and_grad(task.loss))(params, batch._replace(tags={}), key)
    if value.shape != () or not np.isfinite(value):
        broken.append(f"loss must be a finite scalar; got {np.asarray(value)}.")
    if not any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(grads)):
        broken.append("loss must have a gradient in the parameters; all of it is zero.")
    if task.augment is not None:
        x = jax.tree.map(lambda leaf: leaf[0], batch.x)
        view = jax.eval_shape(task.augment, x, key)
        if jax.tree.map(np.shape, x) != jax.tree.map(lambda leaf: leaf.shape, view):
            broken.append("augment must keep the shapes of an instance.")
    return broken

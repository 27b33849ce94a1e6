"""Choosing settings on the validation streams of a task, and on nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ttt_jax.evaluation import Evaluation, Method, Row
from ttt_jax.task import Task

__all__ = ["Trial", "best", "score", "tried"]


class Trial(NamedTuple):
    """How one candidate did on the validation streams.

    Attributes:
      scores: the metric that chooses, then those that decide between equals: means over the rows.
        Lower is better; a value that is not finite counts as infinity.
      message: what went wrong, empty if nothing; its scores are then infinite.
    """

    scores: Mapping[str, float]
    message: str = ""


def score(task: Task, rows: Iterable[Row]) -> Mapping[str, float]:
    """Means over rows of the metrics that choose, in order of importance.

    Args:
      task: its ``chooses`` and ``ties`` name the metrics.
      rows: of one candidate on validation streams.

    Raises:
      ValueError: no row.
    """
    rows = list(rows)
    if not rows:
        raise ValueError(f"score needs at least one validation row of {task.name}; got none.")
    names = (task.chooses, *task.ties)
    return {name: float(np.mean([row.values[name] for row in rows])) for name in names}


def tried(evaluation: Evaluation, task: Task, label: str, method: Method) -> Trial:
    """One candidate on all validation streams.

    Args:
      evaluation: of the role ``"validation"``.
      task: what is evaluated.
      label: of the method.
      method: the candidate.
    """
    rows: list[Row] = []
    for streams in evaluation.groups(method):
        rows += evaluation.rows(label, method, streams)
    return Trial(score(task, rows))


def best(trials: Sequence[Trial]) -> int:
    """The position of the trial with the lowest scores; the first of equals.

    Raises:
      ValueError: no trial.
    """
    if not trials:
        raise ValueError("best needs at least one trial; got none.")

    def key(index: int) -> tuple[float, ...]:
        values = trials[index].scores.values()
        if trials[index].message:
            return (np.inf,)
        return tuple(value if np.isfinite(value) else np.inf for value in values)

    return min(range(len(trials)), key=key)

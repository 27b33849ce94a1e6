"""What the rows say together: means over tasks with their intervals, gains and harm.

Everything follows from the bits of the rows, so that it can be computed anew from the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# In-context learning has to beat chance by so many points for a task to count as learned from.
_MARGIN = 5.0
_DRAWS = 2000


def bits(right: np.ndarray) -> str:
    """``"0110..."``, a digit per query."""
    return "".join(str(int(each)) for each in right)


def accuracy(written: str) -> float:
    """Percent of ones."""
    return 100.0 * written.count("1") / len(written)


def interval(values: Sequence[float]) -> list[float]:
    """The mean, and the 2.5 and 97.5 percentiles of means over resampled tasks."""
    taken = np.asarray(values, np.float64)
    rng = np.random.default_rng(0)
    means = taken[rng.integers(0, len(taken), (_DRAWS, len(taken)))].mean(1)
    return [float(taken.mean()), *(float(end) for end in np.percentile(means, (2.5, 97.5)))]


def learned_from(tasks: Mapping[str, Any], shown: Mapping[str, str]) -> list[str]:
    """The tasks in which in-context learning beats chance by five points.

    The queries that choose the tasks are those that in-context learning is compared on: its luck on
    them counts for it, and against what it is compared with.
    """
    return [
        name
        for name, about in tasks.items()
        if accuracy(shown[name]) >= 100.0 * about["chance"] + _MARGIN
    ]


def summary(tasks: Mapping[str, Any], row: Mapping[str, Any], shown: Mapping[str, str]) -> Any:
    """What a row says over all tasks, and over those that are learned from in context.

    Args:
      tasks: by name, with ``chance``.
      row: with ``bits`` by task.
      shown: the bits of in-context learning by task.

    Returns:
      By group of tasks, or None for a group without one: ``tasks``, how many; ``accuracy`` and
      ``gain`` over in-context learning in points, each a mean with an interval over tasks;
      ``tasks_harmed``, the share of tasks below in-context learning; ``queries_harmed`` and
      ``queries_mended``, the shares of all queries that were right and are wrong, and the reverse.
    """
    groups = {"all": list(tasks), "learned_from": learned_from(tasks, shown)}
    return {name: _summary(group, row["bits"], shown) for name, group in groups.items()}


def _summary(names: Sequence[str], made: Mapping[str, str], shown: Mapping[str, str]) -> Any:
    if not names:
        return None
    own = [accuracy(made[name]) for name in names]
    before = [accuracy(shown[name]) for name in names]
    pairs = [pair for name in names for pair in zip(shown[name], made[name], strict=True)]
    return {
        "tasks": len(names),
        "accuracy": interval(own),
        "gain": interval(np.subtract(own, before).tolist()),
        "tasks_harmed": float(np.mean(np.less(own, before))),
        "queries_harmed": pairs.count(("1", "0")) / len(pairs),
        "queries_mended": pairs.count(("0", "1")) / len(pairs),
    }


def lines(record: Mapping[str, Any]) -> list[str]:
    """The table as text: a line per task and the means, a column per row of the record."""
    rows, tasks = record["rows"], record["tasks"]
    labels = [label(row) for row in rows]
    width = max(map(len, [*tasks, "mean where in-context learns"]))
    widths = [max(len(each), 6) for each in ("chance", *labels)]

    def line(name: str, cells: Sequence[str]) -> str:
        columns = (f"{cell:>{size}}" for cell, size in zip(cells, widths, strict=True))
        return f"{name:<{width}}  {'  '.join(columns)}"

    made = [line("task", ["chance", *labels])]
    for name, about in tasks.items():
        own = [accuracy(row["bits"][name]) for row in rows]
        made.append(line(name, [f"{each:.1f}" for each in (100 * about["chance"], *own)]))
    for group, name in (("all", "mean"), ("learned_from", "mean where in-context learns")):
        parts = [row["summary"][group] for row in rows]
        if parts[0]:
            made.append(line(name, ["", *[f"{each['accuracy'][0]:.1f}" for each in parts]]))
            made.append(line("  gain", ["", *[f"{each['gain'][0]:+.1f}" for each in parts]]))
            harmed = [f"{100 * each['tasks_harmed']:.0f} %" for each in parts]
            made.append(line("  tasks harmed", ["", *harmed]))
    return made


def label(row: Mapping[str, Any]) -> str:
    """The way of a row, with its step size and steps where it has adapted."""
    if "rate" not in row:
        return str(row["way"])
    return f"{row['way']} {row['rate']:g}x{row['steps']}"

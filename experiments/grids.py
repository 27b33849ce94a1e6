"""Few-shot tasks as grids: demonstrations, and what was answered before and after adapting."""

import pathlib
from typing import Any

import jax
import numpy as np

from experiments import examples
from ttt_jax import evaluation
from ttt_jax.task import Examples, Metric, Task, take

FILE = "grids.json"
_MOST_TASKS = 8
_MOST_ANSWERS = 2


def _tokens(output: Any, source: Any, batch: Examples) -> dict[str, np.ndarray]:
    """Of the answers, which are no figure of a row; those of a traced method's last step."""
    after = np.asarray(output)
    after = after if after.ndim == np.ndim(source) else after[:, -1]
    return {"before": np.asarray(source), "after": after}


def keeper(task: Task) -> examples.Keeper:
    """Keeps what one method answers to the first tasks of a stream; they have a head ``attempts``.

    ``grids.json`` has an object per task: ``stream``, ``name``, ``demonstrations`` (pairs of
    grids), and ``queries``, each with ``input``, ``output``, ``views`` and, ``before`` and
    ``after``, its answers with their votes.
    """
    attempts = task.heads()["attempts"]

    def add(source: evaluation.Evaluation, row: evaluation.Row, path: pathlib.Path) -> None:
        batches = source.batches(row.stream)
        y = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(batch.y for batch in batches))
        every = Examples(np.concatenate([batch.id for batch in batches]), (), y, {})
        held = take(every, [every.id.tolist().index(number) for number in row.id[:_MOST_TASKS]])
        sides = {
            side: attempts(row.each["grids"][side][:_MOST_TASKS], held)
            for side in ("before", "after")
        }
        made = []
        for place, (shown, views) in enumerate(zip(y["task"], y["views"], strict=True)):
            if place == len(held.id):
                break
            pairs = [[cells.tolist() for cells in pair] for pair in shown.demonstrations]
            queries = []
            for number, query in enumerate(shown.queries):
                asked = {"input": query.input.tolist(), "output": query.output.tolist()}
                for side, tried in sides.items():
                    ranking = tried[place][number].ranking
                    best = zip(ranking.answers, ranking.counts, strict=True)
                    asked[side] = [[a.tolist(), n] for a, n in [*best][:_MOST_ANSWERS]]
                queries.append(asked | {"views": len(views)})
            made.append({"stream": row.stream, "name": shown.name, "demonstrations": pairs})
            made[-1]["queries"] = queries
        examples.keep_stream(path, row.stream, made)

    return examples.Keeper(FILE, {"grids": Metric(_tokens, lambda sums: 0.0)}, add)

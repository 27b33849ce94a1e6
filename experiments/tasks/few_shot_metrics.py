"""Metrics of few-shot grid tasks: the answers of several views vote for two attempts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import metrics as lib, votes
from ttt_jax.task import Examples, Metric
from ttt_jax.views.grid import GridView
from ttt_jax.views.grid_arrays import answers

ATTEMPTS = 2


class Attempts(NamedTuple):
    """What the views of a query answered, and its true output.

    Attributes:
      ranking: distinct answers by votes, all of them.
      truth: integers ``[H, W]``.
    """

    ranking: votes.Ranking
    truth: np.ndarray

    def solved(self, attempts: int = ATTEMPTS) -> bool:
        """Whether one of the first attempts is right."""
        return any(np.array_equal(each, self.truth) for each in self.ranking.answers[:attempts])

    def right_cells(self) -> float:
        """Right cells of the first attempt, 0 where its shape is another one."""
        first = next(iter(self.ranking.answers), None)
        same = first is not None and first.shape == self.truth.shape
        return float((first == self.truth).sum()) if same else 0.0


def attempts(output: Any, examples: Examples) -> list[list[Attempts]]:
    """By instance and query, from tokens ``[N, Q, V, T]``; the last step of a traced method's."""
    tokens = np.asarray(output)
    tokens = tokens if tokens.ndim == 4 else tokens[:, -1]
    made = []
    for tried, task, views in zip(tokens, examples.y["task"], examples.y["views"], strict=True):
        # What stands after the queries is padding.
        made.append(
            [
                Attempts(votes.majority(_cast(row, views), attempts=len(views)), query.output)
                for row, query in zip(tried, task.queries, strict=False)
            ]
        )
    return made


def _cast(tokens: np.ndarray, views: Sequence[GridView]) -> list[votes.Vote]:
    return [votes.Vote(*pair) for pair in zip(answers(tokens, views), views, strict=True)]


def of() -> dict[str, Metric]:
    """All metrics by name; a task is solved if all its queries are, each in two attempts."""

    def solved(output: Any, examples: Examples, count: int = ATTEMPTS) -> np.ndarray:
        tried = attempts(output, examples)
        return np.array([all(each.solved(count) for each in task) for task in tried])

    def cells(output: Any, examples: Examples) -> np.ndarray:
        tried = attempts(output, examples)
        return np.array(
            [sum(a.right_cells() for a in task) / sum(a.truth.size for a in task) for task in tried]
        )

    def share(output: Any, source: Any, examples: Examples) -> np.ndarray:
        """Of the votes for the first attempt."""
        views, tried = len(examples.y["views"][0]), attempts(output, examples)
        first = [[sum(a.ranking.counts[:1]) / views for a in task] for task in tried]
        return np.array([np.mean(each) for each in first])

    def by_step(output: Any, examples: Examples) -> np.ndarray | None:
        tokens = np.asarray(output)
        if tokens.ndim == 4:
            return None
        steps = [solved(tokens[:, step], examples) for step in range(tokens.shape[1])]
        return np.stack(steps, 1)

    every = np.iinfo(np.int32).max
    return {
        "error": lib.mean(lambda output, source, e: ~solved(output, e)),
        "solved": lib.mean(lambda output, source, e: solved(output, e)),
        "solved_in_one_attempt": lib.mean(lambda output, source, e: solved(output, e, 1)),
        "solved_by_some_view": lib.mean(lambda output, source, e: solved(output, e, every)),
        "turned_right": lib.mean(lambda output, source, e: solved(output, e) & ~solved(source, e)),
        "turned_wrong": lib.mean(lambda output, source, e: ~solved(output, e) & solved(source, e)),
        "cells": lib.mean(lambda output, source, e: cells(output, e)),
        "cell_error": lib.mean(lambda output, source, e: 1.0 - cells(output, e)),
        "vote_share": lib.mean(share),
        "solved_by_step": lib.by_step(by_step),
    }

"""Votes: which of the answers that several views gave is right, and whether to adapt at all.

Host side, after the predictions are mapped back. Answers are equal when their content is: arrays
of the same shape and integers, or values that compare equal.

* :func:`majority`, :func:`hierarchical`: by counts of answers
* :func:`product_of_experts`: by the probability of each candidate under every view
* :func:`shares`: the share of the votes as a confidence
* :func:`prefer`: how many steps to take, none where adapting harms
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import _arguments, _grids

__all__ = [
    "Ranking",
    "Vote",
    "hierarchical",
    "majority",
    "prefer",
    "product_of_experts",
    "shares",
]

# Answers that a group sends to the pool, and that are kept of the pool.
_CANDIDATES = 3


class Vote(NamedTuple):
    """What one view answered.

    Attributes:
      answer: a grid (an array ``[H, W]`` of integers) or any value with a hash; None is no answer.
      view: which view gave it; only ``group`` of :func:`hierarchical` looks at it.
    """

    answer: Any
    view: Any


class Ranking(NamedTuple):
    """Distinct answers, best first.

    Attributes:
      answers: at most as many as there are attempts.
      counts: the votes of each; of :func:`hierarchical`, how often it is in the pool.
      missing: the votes for None, of all.
    """

    answers: tuple[Any, ...]
    counts: tuple[int, ...]
    missing: int


class _Tally:
    """Answers counted by content, in the order in which they were seen first."""

    def __init__(self, answers: Sequence[Any]):
        self.answers: dict[Hashable, Any] = {}
        self.counts: Counter[Hashable] = Counter()
        for answer in answers:
            key = _grids.content("votes' answer", answer)
            self.answers.setdefault(key, answer)
            self.counts[key] += 1

    def ranked(self) -> list[Hashable]:
        """Keys by count, the first seen first among equals."""
        return sorted(self.answers, key=lambda key: -self.counts[key])


def _answered(votes: Sequence[Vote]) -> list[Vote]:
    return [vote for vote in votes if vote.answer is not None]


@_arguments.checked(attempts=_arguments.count())
def majority(votes: Sequence[Vote], attempts: int = 2) -> Ranking:
    """The answers with the most votes; of equal ones the first seen goes first.

    Args:
      votes: in any number; votes for None are counted apart and never win.
      attempts: how many answers are kept.

    Raises:
      TypeError: an answer that is no array of integers and has no hash.

    References:
      Wang et al., `Self-Consistency Improves Chain of Thought Reasoning in Language Models
      <https://arxiv.org/abs/2203.11171>`_, 2023.

    Examples:
      >>> ranking = majority([Vote(answer, None) for answer in ("a", "b", None, "b", "c")])
      >>> ranking.answers, ranking.counts, ranking.missing
      (('b', 'a'), (2, 1), 1)
    """
    answered = _answered(votes)
    tally = _Tally([vote.answer for vote in answered])
    best = tally.ranked()[:attempts]
    return Ranking(
        tuple(tally.answers[key] for key in best),
        tuple(tally.counts[key] for key in best),
        len(votes) - len(answered),
    )


@_arguments.checked()
def shares(votes: Sequence[Vote]) -> list[tuple[Any, float]]:
    """Each distinct answer and its share of all votes, best first.

    Votes for None are votes against every answer, so that shares add up to 1 without them alone.
    The first share is a confidence in the first answer, to be calibrated on other tasks.

    Raises:
      TypeError: as of :func:`majority`.
    """
    tally = _Tally([vote.answer for vote in _answered(votes)])
    return [(tally.answers[key], tally.counts[key] / len(votes)) for key in tally.ranked()]


@_arguments.checked(attempts=_arguments.count(), identity=None)
def hierarchical(
    votes: Sequence[Vote],
    group: Callable[[Any], Hashable],
    attempts: int = 2,
    *,
    identity: Hashable = 0,
) -> Ranking:
    """Two rounds of votes over grids: in groups of like views, then among the groups' candidates.

    1. All votes, and then those of each group, send their three most frequent grids to a pool. A
       group with fewer distinct ones makes up for the others: by the grid of the most frequent rows
       unless that is a candidate, else by the one of the most frequent columns, be it a repeat (so
       that a group of one mind sends its grid three times). Rows are counted at the height of the
       most frequent shape, among grids of its width; columns likewise.
    2. The pool's three most frequent grids are found in the same way and are the answers. If the
       second and the third are equally frequent, the one with more votes in the identity's group is
       the second.

    Args:
      votes: their answers are grids, mapped back to the task's own frame; None is left out.
      group: ``group(view)`` names the group of a view, such as its symmetry.
      attempts: how many answers are kept, at most 3.
      identity: the name of the group of views that turn nothing.

    Returns:
      Distinct grids; fewer than ``attempts`` where there are no others.

    Raises:
      ValueError: more than three attempts, or a grid without cells.
      TypeError: an answer that is no grid.

    References:
      Akyürek et al., `The Surprising Effectiveness of Test-Time Training for Few-Shot Learning
      <https://arxiv.org/abs/2411.07279>`_, 2025, and their code (github.com/ekinakyurek/marc,
      ``arclib/voting.py``). There the order of a Python set ranks equals, so that of two leaders
      one can be lost. Here the first seen of equal grids and shapes goes first and of equal rows
      the smallest; the third takes the place of the second for more votes of the identity alone;
      and a repeat of the first answer is no second attempt.
    """
    if attempts > _CANDIDATES:
        raise ValueError(f"attempts must be at most {_CANDIDATES}; got {attempts}.")
    answered = [
        vote._replace(answer=_grids.require("votes' answer", vote.answer))
        for vote in _answered(votes)
    ]
    groups: dict[Hashable, list[np.ndarray]] = {}
    for vote in answered:
        name = _grids.content("group", group(vote.view))
        groups.setdefault(name, []).append(vote.answer)
    unturned = groups.pop(_grids.content("identity", identity), [])
    pool = [
        grid
        for grids in ([vote.answer for vote in answered], unturned, *groups.values())
        for grid in _top_three(grids)
    ]
    tally, of_identity = _Tally(pool), _Tally(unturned)
    finalists = {_grids.content("votes' answer", grid): grid for grid in _top_three(pool)}
    best = list(finalists)
    if len(best) == _CANDIDATES and tally.counts[best[1]] == tally.counts[best[2]]:
        best[1:] = sorted(best[1:], key=lambda key: -of_identity.counts[key])
    best = best[:attempts]
    return Ranking(
        tuple(finalists[key] for key in best),
        tuple(tally.counts[key] for key in best),
        len(votes) - len(answered),
    )


def _top_three(grids: list[np.ndarray]) -> list[np.ndarray]:
    """The three most frequent grids, made up for by majorities of lines; none of none."""
    if not grids:
        return []
    tally = _Tally(grids)
    chosen = [tally.answers[key] for key in tally.ranked()[:_CANDIDATES]]
    if len(chosen) < _CANDIDATES:
        by_rows, by_columns = _of_frequent_rows(grids), _of_frequent_rows([g.T for g in grids]).T
        while len(chosen) < _CANDIDATES:
            known = any(np.array_equal(by_rows, grid) for grid in chosen)
            chosen.append(by_columns if known else by_rows)
    return chosen


def _of_frequent_rows(grids: list[np.ndarray]) -> np.ndarray:
    """Each row the most frequent of its place, among grids of the most frequent shape's width."""
    # A Counter keeps the order in which shapes were seen first.
    height, width = Counter(grid.shape for grid in grids).most_common(1)[0][0]
    wide = [grid.tolist() for grid in grids if grid.shape[1] == width]
    rows = [
        _most_frequent([grid[place] for grid in wide if len(grid) > place])
        for place in range(height)
    ]
    return np.array(rows, grids[0].dtype)


def _most_frequent(rows: list[list[int]]) -> tuple[int, ...]:
    # The smallest of equals: with the first seen, two grids would never make a third.
    counts = Counter(map(tuple, rows))
    return min(counts, key=lambda row: (-counts[row], row))


@_arguments.checked(
    log_probs=_arguments.array(2, kinds="fiu", host=True, like="[candidates, views]"),
    bonus=_arguments.number(0.0),
    proposed=_arguments.array(2, kinds="b", host=True, like="[candidates, views]"),
)
def product_of_experts(
    log_probs: np.ndarray, bonus: float = 0.0, proposed: np.ndarray | None = None
) -> np.ndarray:
    """Candidates by the sum of their log-probabilities under all views, the best first.

    A candidate that is impossible in one view (-inf) comes after all others, and one with a NaN or
    +inf after these; of equal ones the first goes first.

    Args:
      log_probs: ``[candidates, views]``, in nats.
      bonus: nats added for each view that found a candidate; 3 in the authors' code.
      proposed: bool ``[candidates, views]``: whether the answer of the view was the candidate.

    Returns:
      int64 ``[candidates]``: indices of candidates.

    Raises:
      ValueError: no view, shapes that differ, or a bonus without ``proposed``.

    References:
      Franzen et al., `Product of Experts with LLMs: Boosting Performance on ARC Is a Matter of
      Perspective <https://arxiv.org/abs/2505.07859>`_, 2025. Their code (da-fr/arc-prize-2024 on
      GitHub, ``training_code/selection.py``) also adds each log-probability with which a search
      found the candidate, and 3: those searches are further columns here, 0 and not found where
      they found another one. The 3 that it adds in views that score every candidate rank nothing.

    Examples:
      >>> print(product_of_experts(np.log([[0.9, 0.1], [0.5, 0.4], [0.6, 0.01]])))
      [1 0 2]
    """
    log_probs = np.asarray(log_probs, np.float64)
    if not log_probs.shape[1]:
        raise ValueError(f"log_probs must have a view; got the shape {log_probs.shape}.")
    if proposed is None and bonus:
        raise ValueError(
            f"bonus needs proposed, the views that proposed each candidate; got {bonus}."
        )
    if proposed is not None and proposed.shape != log_probs.shape:
        raise ValueError(
            f"proposed must have the shape of log_probs, {log_probs.shape}; got {proposed.shape}."
        )
    with np.errstate(invalid="ignore"):
        scores = log_probs.sum(1)
    if proposed is not None and bonus:
        scores = scores + bonus * np.asarray(proposed).sum(1)
    broken = np.isnan(scores) | (log_probs == np.inf).any(1)
    # The last key is the first to sort by; indices settle what is left.
    return np.lexsort((np.arange(len(scores)), -np.where(broken, 0.0, scores), broken))


@_arguments.checked(
    clone=_arguments.array(2, kinds="fiu", host=True, like="[tasks, steps]"),
    source=_arguments.array(1, kinds="fiu", host=True, like="[tasks]"),
    margin=_arguments.number(0.0),
)
def prefer(clone: np.ndarray, source: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """How many steps each task's clone should take, by its loss on a demonstration held out.

    A guard against harm: the source stays (0 steps) unless a clone is better by more than the
    margin. Losses have to come from examples that the clone did not learn from, and what is
    predicted is best adapted anew, for that many steps on all demonstrations.

    Args:
      clone: ``[tasks, steps]``: held-out loss after 1, 2, ... steps (a negative log-probability).
        NaN and +inf are never chosen, nor is -inf.
      source: ``[tasks]``: the same loss of the source; where it is NaN, the source stays.
      margin: of the loss, not negative.

    Returns:
      int64 ``[tasks]``: 0 for the source, k for the clone after k steps; of equal losses the one
      after fewer steps.

    Raises:
      ValueError: shapes that differ, or a negative margin.

    Examples:
      >>> clone = [[0.9, 0.5, 0.7], [1.2, float("nan"), 1.1]]
      >>> print(prefer(clone, [1.0, 1.0]), prefer(clone, [1.0, 1.0], margin=0.6))
      [2 0] [0 0]
    """
    clone, source = np.asarray(clone, np.float64), np.asarray(source, np.float64)
    if len(clone) != len(source):
        raise ValueError(
            f"source must have a loss for each of the {len(clone)} rows of clone; got the shape "
            f"{source.shape}."
        )
    if not clone.shape[1]:
        return np.zeros(len(source), np.int64)
    losses = np.where(np.isfinite(clone), clone, np.inf)
    best = losses.argmin(1)
    with np.errstate(invalid="ignore"):
        better = losses[np.arange(len(losses)), best] < source - margin
    return np.where(better, best + 1, 0)

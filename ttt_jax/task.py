"""A task: data, a model and its scores, as functions. Loops and programs know nothing else.

Images, documents, few-shot grids and frames are all :class:`Task` values; the loop over them is
:func:`ttt_jax.evaluation.evaluate`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from ttt_jax import _arguments, _contract
from ttt_jax.base import Key, Params, PyTree

__all__ = [
    "Examples",
    "Metric",
    "Task",
    "TrainingData",
    "cells",
    "in_batches",
    "joined_tags",
    "take",
]


class Examples(NamedTuple):
    """N test instances. A predictor sees ``x`` alone; a key follows ``id``.

    Attributes:
      id: int64 ``[N]``.
      x: pytree ``[N, ...]``: images, tokens with their mask, ``{"demos", "query"}``, frames.
      y: pytree ``[N, ...]``: what scoring needs.
      tags: ``[N]`` each: domain, severity, class group, document source.
    """

    id: np.ndarray
    x: PyTree
    y: PyTree
    tags: Mapping[str, np.ndarray]


class Metric(NamedTuple):
    """Sums over instances and what they amount to: parts of a run are joined by adding sums.

    Attributes:
      of: ``of(output, source_output, examples) -> sums``, a pytree of arrays ``[N, ...]``; None
        where the output has not what the metric needs. Curves have one more axis.
      value: ``value(sums)`` over the N instances -> the number (or curve) of a row.
      chance: ``chance(y)`` over the N instances -> the lowest value of an answer that is the same
        for all, so that reports mark who is no better; None where that is not known.
    """

    of: Callable[[PyTree, PyTree, Examples], PyTree]
    value: Callable[[PyTree], Any]
    chance: Callable[[PyTree], float] | None = None


@runtime_checkable
class TrainingData(Protocol):
    """Training examples that a long run resumes without reading what it has seen.

    ``Task.training`` may return any iterable of :class:`Examples`, one pass over the training
    split; one with ``steps`` is resumed at a step number.
    """

    def __iter__(self) -> Iterator[Examples]:
        """One pass over the split, as source statistics need it."""

    def steps(self, start: int) -> Iterator[Examples]:
        """Endless training batches from step ``start``: step k is the same wherever it began."""


class Task(NamedTuple):
    """A data set, a model and its scores.

    Attributes:
      name: for people and rows.
      init: ``init(key) -> params``: the layout that a checkpoint is checked against.
      heads: ``heads(**serving) -> {name: model function}``, for instance ``norm="batch"``. The
        first is what the source prediction is made with and what metrics see; methods take the
        others by the names of their arguments, with constants of the model such as
        ``num_classes``.
      augment: one random view of one instance, ``(x, key) -> x``; None where there is none.
      loss: ``loss(params, examples, key) -> scalar``, the main task, for training.
      training: ``training(seed)``: batches of the training split, an iterable of
        :class:`Examples` or :class:`TrainingData`.
      streams: ``streams(role, seed) -> {name: batches}``, role ``"validation"`` or
        ``"reported"``. One entry is one stream: predictors map over it, a ``Stream`` scans it and
        is pristine at its start.
      metrics: by name; the number of a row is ``values[name]``.
      chooses: the metric that chooses settings; lower is better.
      ties: metrics that decide between settings of equal ``chooses``, in order; lower is better.
    """

    name: str
    init: Callable[[Key], Params]
    heads: Callable[..., Mapping[str, Any]]
    augment: Callable[[PyTree, Key], PyTree] | None
    loss: Callable[[Params, Examples, Key], jax.Array]
    training: Callable[[int], Iterable[Examples]]
    streams: Callable[[str, int], Mapping[str, Iterable[Examples]]]
    metrics: Mapping[str, Metric]
    chooses: str
    ties: tuple[str, ...] = ()


@_arguments.checked(index=None)
def take(examples: Examples, index: Any) -> Examples:
    """The examples at an index: a slice, positions or a mask ``[N]``."""
    kinds = (slice, int, np.integer, list, np.ndarray, jax.Array)
    if not isinstance(index, kinds) and type(index) is not tuple:
        raise TypeError(f"index must be a slice, or integers; got {_contract.described(index)}.")
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], examples)


@_arguments.checked(batches=_arguments.iterable, size=_arguments.integer, count=_arguments.integer)
def in_batches(
    batches: Iterable[Examples], size: int, count: int | None = None
) -> Iterator[Examples]:
    """Examples in batches of another size, the last shorter.

    Args:
      batches: in any sizes.
      size: of every batch but the last, at least 1.
      count: how many examples in all; None for all there are.

    Raises:
      ValueError: ``size`` or ``count`` below 1.
    """
    if size < 1 or (count is not None and count < 1):
        raise ValueError(f"size and count must be at least 1; got {size} and {count}.")
    held: Examples | None = None
    for batch in batches:
        if count is not None:
            batch = take(batch, slice(count))
            count -= len(batch.id)
        held = batch if held is None else _joined(held, batch)
        while len(held.id) >= size:
            yield take(held, slice(size))
            held = take(held, slice(size, None))
        if count == 0:
            break
    if held is not None and len(held.id):
        yield held


def _joined(first: Examples, second: Examples) -> Examples:
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)


@_arguments.checked()
def joined_tags(batches: Sequence[Examples]) -> dict[str, np.ndarray]:
    """The tags of all examples of some batches, ``[N]`` each."""
    return jax.tree.map(lambda *a: np.concatenate(a), *(dict(batch.tags) for batch in batches))


@_arguments.checked(count=_arguments.count(0))
def cells(tags: Mapping[str, np.ndarray], count: int) -> Iterator[tuple[dict, np.ndarray]]:
    """The distinct combinations of the tags, in order of appearance, and where each is."""
    columns = [np.asarray(column).tolist() for column in tags.values()]
    lengths = {name: len(column) for name, column in zip(tags, columns, strict=True)}
    if set(lengths.values()) - {count}:
        raise ValueError(f"tags must have count = {count} values each; got {lengths} of them.")
    rows = list(zip(*columns, strict=True)) if columns else [()] * count
    positions: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        positions.setdefault(row, []).append(index)
    for combination, indices in positions.items():
        mask = np.zeros(count, bool)
        mask[indices] = True
        yield dict(zip(tags, combination, strict=True)), mask

"""Few-shot tasks of grids as arrays of fixed shapes: what a model learns from, and what it answers.

Everything is NumPy on the host. :func:`demonstrations` fills rows with a task's demonstrations
under drawn views, :func:`queries` has its inputs under given views, for
:func:`ttt_jax.models.complete_grids`, and :func:`answers` maps what the model says back into the
task's own frame, for :mod:`ttt_jax.votes`. Tasks whose arrays have the same shapes go side by side:
:func:`sizes` says which shapes hold all of them. :func:`training_rows` is a batch to train a model
with.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import _arguments, _grids
from ttt_jax.data import grid_sequences
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.data.grid_sequences import Item
from ttt_jax.views.grid import GridView, apply, inverse, random

__all__ = [
    "Sizes",
    "answer_length",
    "answers",
    "demonstrations",
    "item",
    "queries",
    "sizes",
    "training_rows",
]

_FIELDS = ("token", "row", "column", "part")
_PATIENCE = 4


class Sizes(NamedTuple):
    """Shapes that hold every task of some, under any view.

    Attributes:
      pair: tokens of the longest demonstration.
      query: tokens of legend and input of the longest query; 0 without queries.
      answer: tokens of the longest answer, as :func:`answer_length` has it.
      queries: the most queries of a task.
    """

    pair: int
    query: int
    answer: int
    queries: int


@_arguments.checked()
def sizes(tasks: Sequence[FewShotTask]) -> Sizes:
    """The shapes that some tasks need; their queries' outputs are not read.

    Raises:
      ValueError: no task, or one without demonstrations.
    """
    _require_demonstrations(tasks)

    def longest(*grids: np.ndarray) -> int:
        turned = [np.transpose(grid) for grid in grids]
        return max(grid_sequences.length_of(*part) for part in (grids, turned))

    answer = max(answer_length(task) for task in tasks)
    return Sizes(
        pair=max(longest(*pair) for task in tasks for pair in task.demonstrations),
        query=max((longest(query.input) for task in tasks for query in task.queries), default=0),
        answer=answer,
        queries=max(len(task.queries) for task in tasks),
    )


def _require_demonstrations(tasks: Sequence[FewShotTask]) -> None:
    if not tasks:
        raise ValueError("tasks must have at least one task; got [].")
    for task in tasks:
        if not task.demonstrations:
            raise ValueError(
                f"tasks must have demonstrations each; {task.name!r} has none: got ()."
            )


@_arguments.checked(number=_arguments.count(0))
def item(view: GridView, example: Example, *, number: int = 0, tag: Any = None) -> Item:
    """The sequence of an example under a view, ready for :func:`ttt_jax.data.grid_sequences.pack`.

    Args:
      view: of input and output.
      example: without an output the sequence ends with the input.
      number: of the task in the tables of :class:`ttt_jax.models.GridDecoder`.
      tag: comes back from the packing.

    Raises:
      TypeError: an input or output that is no grid.
      ValueError: no such view, or no grid of 1 to 30 rows and columns with colors from 0 to 9.
    """
    given, answer = example
    grids = [apply(view, _grids.require("example's input", given))]
    if answer is not None:
        grids.append(apply(view, _grids.require("example's output", answer)))
    sequence = grid_sequences.encode(*grids, colors=view.colors)
    return Item(sequence, number, view.symmetry, tag)


@_arguments.checked(
    rows=_arguments.count(),
    length=_arguments.count(),
    most=_arguments.count(),
    number=_arguments.count(0),
)
def demonstrations(
    task: FewShotTask,
    rng: np.random.Generator,
    *,
    rows: int,
    length: int,
    most: int,
    keep_colors: Sequence[int] = (0,),
    number: int = 0,
) -> dict[str, np.ndarray]:
    """Rows of a task's demonstrations, each time under another random view.

    All demonstrations come equally often, one round after the other in random order. A view is one
    of the eight symmetries and a permutation of the colors that are not kept.

    Args:
      task: at least one demonstration.
      rng: draws order and views.
      rows: R.
      length: T, tokens of a row, at least those of the longest demonstration.
      most: M, sequences of a row at most.
      keep_colors: colors that no view changes; all ten for symmetries alone.
      number: of the task in the tables of the model.

    Returns:
      The leaves of :class:`ttt_jax.data.grid_sequences.Packed`, ``[R, T]`` and ``[R, M]``, and
      ``example``, int32 ``[R, M]``: which demonstration a sequence shows, -1 for none.

    Raises:
      ValueError: a task without demonstrations, or one with a demonstration that has no room.
    """
    if not task.demonstrations:
        raise ValueError(f"task must have a demonstration to learn from; {task.name!r} has none.")

    def drawn() -> Iterator[Item]:
        while True:
            for place in rng.permutation(len(task.demonstrations)).tolist():
                view = random(rng, keep_colors=keep_colors)
                yield item(view, task.demonstrations[place], number=number, tag=place)

    packed, tags = next(grid_sequences.pack(drawn(), rows, length, most, patience=_PATIENCE))
    example = np.full((rows, most), -1, np.int32)
    for row, slot, place in tags:
        example[row, slot] = place
    return {**packed._asdict(), "example": example}


@_arguments.checked(
    rows=_arguments.count(),
    length=_arguments.count(),
    most=_arguments.count(),
    unknown=_arguments.number(0.0, 1.0),
)
def training_rows(
    tasks: Sequence[FewShotTask],
    rng: np.random.Generator,
    *,
    rows: int,
    length: int,
    most: int,
    keep_colors: Sequence[int] = (0,),
    unknown: float = 0.2,
) -> dict[str, np.ndarray]:
    """A batch to train a decoder of many tasks with: random demonstrations under random views.

    Task k has the number ``k + 1``. A share of all sequences has number 0 instead, so that this
    number comes to stand for a task that the decoder does not know, from which copies set out.

    Args:
      tasks: K, drawn evenly; queries are left out.
      rng: draws.
      rows: R.
      length: T, tokens of a row.
      most: M, sequences of a row at most.
      keep_colors: colors that no view changes.
      unknown: that share.

    Returns:
      The leaves of :class:`ttt_jax.data.grid_sequences.Packed`.

    Raises:
      ValueError: no task, one without demonstrations, or a demonstration that has no room.
    """
    _require_demonstrations(tasks)

    def drawn() -> Iterator[Item]:
        while True:
            place = int(rng.integers(len(tasks)))
            pairs = tasks[place].demonstrations
            pair = pairs[int(rng.integers(len(pairs)))]
            number = 0 if rng.random() < unknown else 1 + place
            yield item(random(rng, keep_colors=keep_colors), pair, number=number)

    packed, _ = next(grid_sequences.pack(drawn(), rows, length, most, patience=_PATIENCE))
    return packed._asdict()


@_arguments.checked(length=_arguments.count(), count=_arguments.count(), number=_arguments.count(0))
def queries(
    task: FewShotTask,
    views: Sequence[GridView],
    *,
    length: int,
    count: int | None = None,
    number: int = 0,
) -> dict[str, np.ndarray]:
    """The inputs of a task's Q queries under V views, for :func:`ttt_jax.models.complete_grids`.

    Args:
      task: its queries' outputs are not read.
      views: V, such as :func:`ttt_jax.views.grid.draw` gives.
      length: P, tokens of legend and input, padded at the end.
      count: Q, at least the task's queries, the others of length 0, for which nothing is decoded;
        ``None`` for as many as there are.
      number: of the task in the tables of the model.

    Returns:
      ``token``, ``row``, ``column`` and ``part``, int8 ``[Q, V, P]``; ``length``, ``task`` and
      ``view``, int32 ``[Q, V]``.

    Raises:
      ValueError: no view, more queries than ``count``, or an input that has no room.
    """
    if not views:
        raise ValueError("views must have at least one view; got [].")
    if count is not None and count < len(task.queries):
        raise ValueError(
            f"count must be at least the {len(task.queries)} queries of {task.name!r}; got {count}."
        )
    shape = (count or len(task.queries), len(views))
    made = {name: np.zeros((*shape, length), np.int8) for name in _FIELDS}
    made |= {name: np.zeros(shape, np.int32) for name in ("length", "task", "view")}
    for place, query in enumerate(task.queries):
        for column, view in enumerate(views):
            sequence = item(view, query._replace(output=None), number=number).sequence
            size = len(sequence.token)
            if size > length:
                raise ValueError(
                    f"length must be at least the {size} tokens of query {place} of "
                    f"{task.name!r}; got {length}."
                )
            for name in _FIELDS:
                made[name][place, column, :size] = getattr(sequence, name)
            made["length"][place, column], made["task"][place, column] = size, number
            made["view"][place, column] = view.symmetry
    return made


@_arguments.checked()
def answer_length(task: FewShotTask) -> int:
    """Tokens of the longest answer that a task's demonstrations lead to, under any view.

    Answers have the size of a demonstration's output or, where all outputs are larger or smaller
    than their inputs by one ratio, of the query by that ratio; where all outputs are as large as
    their inputs, that of the query alone. The queries' outputs are not read.

    Raises:
      ValueError: a task without demonstrations.
    """
    shapes = [(np.shape(pair.input), np.shape(pair.output)) for pair in task.demonstrations]
    if not shapes:
        raise ValueError(f"task must have a demonstration to go by; {task.name!r} has none.")
    ratios = {tuple(b / a for a, b in zip(*pair, strict=True)) for pair in shapes}
    sizes = [shape for _, shape in shapes]
    if len(ratios) == 1:
        (ratio,) = ratios
        if ratio == (1.0, 1.0) and task.queries:
            sizes = []
        for query in task.queries:
            sides = zip(np.shape(query.input), ratio, strict=True)
            most = grid_sequences.MOST_CELLS
            sizes.append(tuple(int(np.clip(round(side * r), 1, most)) for side, r in sides))
    return max(max(h * (w + 1), w * (h + 1)) + 1 for h, w in sizes)


@_arguments.checked(tokens=_arguments.array(2, kinds="iu", host=True))
def answers(tokens: np.ndarray, views: Sequence[GridView]) -> list[np.ndarray | None]:
    """The grids that predicted tokens spell under V views, in the task's own frame.

    Args:
      tokens: integers ``[V, T]``, as :func:`ttt_jax.models.complete_grids` gives them.
      views: V, under which they were predicted.

    Returns:
      A grid per view; None where the tokens spell none.

    Raises:
      ValueError: another number of views.
    """
    if len(tokens) != len(views):
        raise ValueError(
            f"views must be as many as rows of tokens, {len(tokens)}; got {len(views)}."
        )
    grids = [grid_sequences.decode(row) for row in np.asarray(tokens)]
    return [
        None if grid is None else apply(inverse(view), grid)
        for grid, view in zip(grids, views, strict=True)
    ]

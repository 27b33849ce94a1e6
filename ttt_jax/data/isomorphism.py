"""Whether an answer was trained on: as it is, or turned, mirrored and recolored.

A model that saw a pair under random symmetries and permutations of colors knows all its forms.
:func:`canonical` is one form for all of them, :func:`leaks` what two sets of tasks share.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ttt_jax import _arguments, _grids
from ttt_jax.data.few_shot import Example, FewShotTask

__all__ = ["Leak", "canonical", "leaks"]

Form = tuple[tuple[int, ...], tuple[int, ...], bytes]


class Leak(NamedTuple):
    """An example of training that is a query of evaluation with its answer.

    Attributes:
      training: the name of the task that was trained on.
      example: the index among its demonstrations and, after them, its queries.
      evaluation: the name of the task of the query.
      query: the index among its queries.
      exact: whether the pairs are equal; otherwise up to symmetry and colors.
    """

    training: str
    example: int
    evaluation: str
    query: int
    exact: bool


@_arguments.checked()
def canonical(example: Example) -> Form:
    """The smallest form of a pair of grids over the eight symmetries, with its colors renamed.

    One symmetry acts on both grids. Colors become 0, 1, ... in the order in which they appear, in
    the input row by row and then in the output; no color is an exception, the background neither.
    Two pairs have equal forms exactly when a symmetry and a renaming make them equal.

    Returns:
      The shapes of input and output, and their cells: a key for sets and dicts.

    Raises:
      TypeError: input or output is no array ``[H, W]`` of integers.
      ValueError: a grid without cells.

    Examples:
      >>> import numpy as np
      >>> grid = np.array([[0, 1, 1], [2, 1, 1]])
      >>> turned, recolored = np.rot90(grid), np.array([5, 0, 9])[grid]
      >>> canonical(Example(grid, turned)) == canonical(Example(turned, np.rot90(turned)))
      True
      >>> canonical(Example(grid, grid)) == canonical(Example(recolored, recolored))
      True
      >>> canonical(Example(grid, grid)) == canonical(Example(grid, recolored))
      False
    """
    grids = [
        _grids.require(f"example.{name}", grid)
        for name, grid in zip(Example._fields, example, strict=True)
    ]
    colors = np.unique(np.concatenate([grid.ravel() for grid in grids]))
    grids = [np.searchsorted(colors, grid) for grid in grids]
    return min(_form(grids, len(colors), symmetry) for symmetry in _grids.SYMMETRIES)


def _form(grids: list[np.ndarray], num_colors: int, symmetry: int) -> Form:
    turned = [_grids.turned(grid, symmetry) for grid in grids]
    cells = np.concatenate([grid.ravel() for grid in turned])
    # Where each color appears first; the rank of that place is its new name.
    first = (cells == np.arange(num_colors)[:, None]).argmax(1)
    names = np.argsort(np.argsort(first)).astype(np.uint16)
    return turned[0].shape, turned[1].shape, names[cells].tobytes()


@_arguments.checked()
def leaks(training: Sequence[FewShotTask], evaluation: Sequence[FewShotTask]) -> list[Leak]:
    """The examples of training that hold a query of evaluation and its output.

    Everything trained on has to be given: demonstrations and queries are compared, and queries
    without an output are no training. Grids are compared as they are and in canonical form, other
    values as they are. One call with an evaluation set's own demonstrations as the training, as
    ``[task._replace(queries=()) for task in evaluation]``, finds tasks that show their answer.

    Args:
      training: tasks whose examples were trained on.
      evaluation: tasks whose queries, with their outputs, are to stay unknown.

    Returns:
      One entry for each example and query that match, in the order of training.

    Raises:
      ValueError: a query of evaluation has no output, so that it cannot be compared.
    """
    queries: dict[Hashable, list[tuple[FewShotTask, int, Hashable]]] = {}
    for task in evaluation:
        for place, query in enumerate(task.queries):
            if query.output is None:
                raise ValueError(
                    f"evaluation must have the outputs of all queries; query {place} of "
                    f"{task.name!r} has None: leave it out, as it cannot be compared."
                )
            queries.setdefault(_form_of(query), []).append((task, place, _exactly(query)))
    # Most examples are of other shapes, and their forms need not be computed.
    shapes = {_shapes(query) for task in evaluation for query in task.queries}
    return [
        Leak(trained.name, index, task.name, place, exactly == _exactly(example))
        for trained in training
        for index, example in _known(trained)
        if _shapes(example) in shapes
        for task, place, exactly in queries.get(_form_of(example), ())
    ]


def _known(task: FewShotTask) -> Iterator[tuple[int, Example]]:
    for index, example in enumerate((*task.demonstrations, *task.queries)):
        if example.output is not None:
            yield index, example


def _shapes(example: Example) -> Hashable:
    """The shapes of both parts, the same for each symmetry; of text none."""
    shapes = [np.shape(part) for part in example]
    return min(tuple(shapes), tuple(shape[::-1] for shape in shapes))


def _form_of(example: Example) -> Hashable:
    grids = all(_grids.is_grid(part) for part in example)
    return canonical(example) if grids else _exactly(example)


def _exactly(example: Example) -> Hashable:
    pairs = zip(Example._fields, example, strict=True)
    return tuple(_grids.content(f"example.{name}", part) for name, part in pairs)

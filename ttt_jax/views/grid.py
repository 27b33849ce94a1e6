"""Invertible views of grids: one of eight symmetries, and a permutation of the ten colors.

A model answers a view of a task; :func:`inverse` maps its answer back. All of it is NumPy on the
host. Symmetry s is ``s % 4`` quarter turns, as ``np.rot90`` makes them, and a transposition after
them from 4 on; colors are renamed by a table.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ttt_jax import _arguments, _grids
from ttt_jax.data.few_shot import Example, FewShotTask

__all__ = [
    "GridView",
    "all_symmetries",
    "apply",
    "compose",
    "draw",
    "identity",
    "inverse",
    "random",
    "view_task",
]

_NUM_COLORS = 10


class GridView(NamedTuple):
    """A view.

    Attributes:
      symmetry: from 0, which changes nothing, to 7.
      colors: what the colors 0 to 9 become: each of them once.
    """

    symmetry: int
    colors: tuple[int, ...]


@_arguments.checked()
def identity() -> GridView:
    """The view that changes nothing."""
    return GridView(0, tuple(range(_NUM_COLORS)))


@_arguments.checked()
def all_symmetries() -> list[GridView]:
    """The eight symmetries without a change of colors, the identity first."""
    return [identity()._replace(symmetry=symmetry) for symmetry in _grids.SYMMETRIES]


@_arguments.checked(grid=_arguments.array(2, kinds="iu", host=True))
def apply(view: GridView, grid: np.ndarray) -> np.ndarray:
    """The view of a grid.

    Args:
      view: a symmetry and a permutation of colors.
      grid: integers ``[H, W]`` from 0 to 9.

    Returns:
      A new array of the grid's dtype, ``[H, W]`` or, for odd symmetries under 4 and even ones
      from 4 on, ``[W, H]``.

    Raises:
      ValueError: no such view, a grid without cells, or a color outside of the table.

    Examples:
      >>> print(apply(GridView(1, (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)), np.array([[0, 1, 2]])))
      [[1]
       [2]
       [0]]
    """
    _check("view", view)
    grid = _grids.require("grid", grid)
    if grid.min() < 0 or grid.max() >= _NUM_COLORS:
        wrong = grid[(grid < 0) | (grid >= _NUM_COLORS)][0]
        raise ValueError(
            f"grid must have colors from 0 to {_NUM_COLORS - 1}; got {wrong} in a grid of shape "
            f"{grid.shape}."
        )
    return np.array(view.colors, grid.dtype)[_grids.turned(grid, view.symmetry)]


@_arguments.checked()
def inverse(view: GridView) -> GridView:
    """The view that undoes another: ``apply(inverse(view), apply(view, grid))`` is the grid."""
    _check("view", view)
    symmetry = view.symmetry
    # Turns are undone by the rest of a whole turn; a mirror image by the same mirror.
    back = -symmetry % 4 if symmetry < 4 else symmetry
    return GridView(back, tuple(np.argsort(view.colors).tolist()))


@_arguments.checked()
def compose(first: GridView, second: GridView) -> GridView:
    """One view for two: ``apply(second, apply(first, grid))``."""
    _check("first", first)
    _check("second", second)
    mirrored = first.symmetry >= 4
    # A turn before a transposition is the opposite turn after it.
    quarters = first.symmetry + (-second.symmetry if mirrored else second.symmetry)
    symmetry = quarters % 4 + 4 * (mirrored != (second.symmetry >= 4))
    return GridView(symmetry, tuple(second.colors[color] for color in first.colors))


@_arguments.checked(count=_arguments.count())
def draw(
    rng: np.random.Generator,
    count: int,
    *,
    keep_colors: Sequence[int] = (0,),
    with_identity: bool = True,
) -> list[GridView]:
    """Distinct random views, as evenly over the eight symmetries as ``count`` allows.

    Args:
      rng: draws the order of the symmetries, and the colors.
      count: how many; at most 8 times the permutations of the colors that are not kept.
      keep_colors: colors that stay as they are, as the background 0 does by default.
      with_identity: whether the identity comes first; otherwise it is not among the views.

    Raises:
      ValueError: fewer views exist, or ``keep_colors`` has other than distinct colors.
    """
    free = _free(keep_colors)
    total = len(_grids.SYMMETRIES) * math.factorial(len(free)) - (not with_identity)
    if count > total:
        raise ValueError(
            f"count must be at most {total}, the views that keep_colors {list(keep_colors)} leaves"
            f"; got {count}."
        )
    others = (1 + rng.permutation(len(_grids.SYMMETRIES) - 1)).tolist()
    # Last without the identity, as then one view fewer has this symmetry.
    order = [0, *others] if with_identity else [*others, 0]
    seen = {identity()}
    views = [identity()] if with_identity else []
    for symmetry in itertools.islice(itertools.cycle(order), len(views), count):
        view = GridView(symmetry, _recolored(rng, free))
        while view in seen:
            view = view._replace(colors=_recolored(rng, free))
        seen.add(view)
        views.append(view)
    return views


def _recolored(rng: np.random.Generator, free: list[int]) -> tuple[int, ...]:
    colors = np.arange(_NUM_COLORS)
    colors[free] = rng.permutation(free)
    return tuple(colors.tolist())


@_arguments.checked()
def random(rng: np.random.Generator, *, keep_colors: Sequence[int] = (0,)) -> GridView:
    """One random view, which may be the identity: any symmetry, any permutation of free colors.

    Args:
      rng: draws it.
      keep_colors: colors that stay as they are; all ten for a symmetry alone.

    Raises:
      ValueError: ``keep_colors`` has other than distinct colors.
    """
    return GridView(int(rng.integers(len(_grids.SYMMETRIES))), _recolored(rng, _free(keep_colors)))


def _free(keep_colors: Sequence[int]) -> list[int]:
    """The colors that views may change."""
    kept = list(keep_colors)
    if len(set(kept)) < len(kept) or not set(kept) <= set(range(_NUM_COLORS)):
        raise ValueError(
            f"keep_colors must be distinct colors from 0 to {_NUM_COLORS - 1}; got {kept}."
        )
    return [color for color in range(_NUM_COLORS) if color not in kept]


@_arguments.checked()
def view_task(view: GridView, task: FewShotTask) -> FewShotTask:
    """The task with every grid seen through one view; outputs that are None stay None.

    Raises:
      TypeError: an input or output is no grid.
      ValueError: as of :func:`apply`.
    """

    def viewed(example: Example) -> Example:
        given, answer = example
        grid = apply(view, _grids.require("task's input", given))
        if answer is None:
            return Example(grid, None)
        return Example(grid, apply(view, _grids.require("task's output", answer)))

    return task._replace(
        demonstrations=tuple(viewed(example) for example in task.demonstrations),
        queries=tuple(viewed(example) for example in task.queries),
    )


def _check(name: str, view: GridView) -> None:
    symmetry, colors = view
    if not _is_whole(symmetry) or symmetry not in _grids.SYMMETRIES:
        raise ValueError(f"{name} must have a symmetry from 0 to 7; got {symmetry!r}.")
    whole = isinstance(colors, tuple) and all(map(_is_whole, colors))
    if not whole or sorted(colors) != list(range(_NUM_COLORS)):
        raise ValueError(
            f"{name} must have colors in a tuple with each of 0 to {_NUM_COLORS - 1} once; got "
            f"{colors!r}."
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)

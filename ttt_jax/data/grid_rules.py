"""Few-shot tasks of small grids with drawn rules: for tests, demos and training without data.

* ``recolor``: colors 1 to 9 change places
* ``reflect``: one of the seven symmetries that change a grid
* ``shift``: one row or column around the edge
* ``fill``: the background gets a color
* ``crop``: one half, rounded up, along an axis
"""

from collections.abc import Callable

import numpy as np

from ttt_jax import _arguments, _grids
from ttt_jax.data.few_shot import Example, FewShotTask, generated

__all__ = ["FAMILIES", "draw_rule", "draw_task"]

FAMILIES = ("recolor", "reflect", "shift", "fill", "crop")
"""Kinds of rules."""
_COLORS_OF_A_TASK = 3
_BACKGROUND = 0.4


@_arguments.checked(family=_arguments.text)
def draw_rule(family: str, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A rule of a family: a function of a grid ``[H, W]`` to the grid that it becomes.

    Args:
      family: of :data:`FAMILIES`.
      rng: draws which rule.

    Raises:
      ValueError: no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}.")
    if family == "recolor":
        table = np.concatenate([[0], 1 + rng.permutation(9)])
        return lambda grid: table[grid]
    if family == "reflect":
        symmetry = int(rng.integers(1, len(_grids.SYMMETRIES)))
        return lambda grid: _grids.turned(grid, symmetry)
    axis, other = (int(value) for value in rng.integers(2, size=2))
    if family == "shift":
        return lambda grid: np.roll(grid, 2 * other - 1, axis)
    if family == "fill":
        color = int(rng.integers(1, 10))
        return lambda grid: np.where(grid == 0, color, grid)

    def half(grid: np.ndarray) -> np.ndarray:
        size = (grid.shape[axis] + 1) // 2
        first = other * (grid.shape[axis] - size)
        return grid.take(np.arange(first, first + size), axis)

    return half


@_arguments.checked(
    family=_arguments.text,
    seed=_arguments.count(0),
    demonstrations=_arguments.count(),
    side=_arguments.count(2),
)
def draw_task(family: str, seed: int, *, demonstrations: int = 3, side: int = 5) -> FewShotTask:
    """A task of one drawn rule: demonstrations, and one query with its output.

    Grids have 2 to ``side`` rows and columns, three colors of the task and a background of 0. No
    two inputs are equal, and every output differs from its input.

    Args:
      family: of :data:`FAMILIES`.
      seed: of rule and grids, not negative.
      demonstrations: how many.
      side: cells along a side, at most.

    Raises:
      ValueError: no such family, or a count out of range.
    """
    rng = np.random.default_rng(seed)
    rule, palette = draw_rule(family, rng), 1 + rng.permutation(9)[:_COLORS_OF_A_TASK]

    def example(rng: np.random.Generator) -> Example:
        shape = rng.integers(2, side + 1, 2)
        cells = np.where(rng.random(shape) < _BACKGROUND, 0, rng.choice(palette, shape))
        return Example(cells.astype(np.int32), rule(cells).astype(np.int32))

    def changes(pair: Example) -> bool:
        return not np.array_equal(*pair)

    pairs = generated(example, demonstrations + 1, seed, accept=(changes,))
    return FewShotTask(f"{family} {seed}", tuple(pairs[:-1]), tuple(pairs[-1:]))

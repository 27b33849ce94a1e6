"""Views of grids and back, against symmetries written with lists."""

import itertools
import math

import numpy as np
import pytest

from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.views import grid as views

PLAIN = tuple(range(10))


def by_lists(symmetry, rows):
    """So many quarter turns against the clock, then a transposition."""
    for _ in range(symmetry % 4):
        rows = [list(row) for row in zip(*rows, strict=True)][::-1]
    return [list(row) for row in zip(*rows, strict=True)] if symmetry >= 4 else rows


def random_view(rng, symmetry):
    return views.GridView(symmetry, tuple(rng.permutation(10).tolist()))


SHAPES = [(1, 1), (1, 30), (30, 1), (2, 2), (3, 3), (4, 7), (30, 30), (29, 30)]


@pytest.mark.parametrize("shape", SHAPES)
def test_views_are_those_of_lists_and_come_back(shape):
    rng = np.random.default_rng(shape)
    for symmetry, dtype in itertools.product(range(8), (np.int8, np.uint8, np.int32, np.int64)):
        grid = rng.integers(10, size=shape).astype(dtype)
        before = grid.copy()
        view = random_view(rng, symmetry)
        seen = views.apply(view, grid)
        recolored = [[view.colors[color] for color in row] for row in grid.tolist()]
        assert seen.tolist() == by_lists(symmetry, recolored) and seen.dtype == dtype
        back = views.apply(views.inverse(view), seen)
        np.testing.assert_array_equal(back, grid)
        seen[:] = 0
        np.testing.assert_array_equal(grid, before)


def test_two_views_are_one():
    rng = np.random.default_rng(0)
    for first_symmetry, second_symmetry in itertools.product(range(8), repeat=2):
        first, second = random_view(rng, first_symmetry), random_view(rng, second_symmetry)
        both = views.compose(first, second)
        for shape in ((1, 1), (2, 3), (5, 5), (30, 11)):
            grid = rng.integers(10, size=shape)
            np.testing.assert_array_equal(
                views.apply(both, grid), views.apply(second, views.apply(first, grid))
            )
        assert views.compose(first, views.inverse(first)) == views.identity()
        assert views.compose(views.inverse(first), first) == views.identity()


def test_the_eight_symmetries_are_distinct_and_change_no_color():
    grid = np.arange(6).reshape(2, 3)
    assert views.all_symmetries()[0] == views.identity() == views.GridView(0, PLAIN)
    seen = {views.apply(view, grid).tobytes() for view in views.all_symmetries()}
    assert len(seen) == 8
    assert all(view.colors == PLAIN for view in views.all_symmetries())


@pytest.mark.parametrize("with_identity", [True, False])
@pytest.mark.parametrize("keep", [(0,), (), (3, 0, 9), tuple(range(2, 10))])
def test_drawn_views_are_distinct_even_and_keep_colors(keep, with_identity):
    total = 8 * math.factorial(10 - len(keep)) - (not with_identity)
    count = min(43, total)
    drawn = views.draw(
        np.random.default_rng(0), count, keep_colors=keep, with_identity=with_identity
    )
    assert len(set(drawn)) == len(drawn) == count
    assert (views.identity() in drawn) == with_identity
    assert not with_identity or drawn[0] == views.identity()
    sizes = [sum(view.symmetry == symmetry for view in drawn) for symmetry in range(8)]
    assert max(sizes) - min(sizes) <= 1
    assert all(view.colors[color] == color for view in drawn for color in keep)
    assert all(sorted(view.colors) == list(PLAIN) for view in drawn)
    if total < 100:
        with pytest.raises(
            ValueError, match=rf"count must be at most {total}, .*; got {total + 1}"
        ):
            views.draw(
                np.random.default_rng(0), total + 1, keep_colors=keep, with_identity=with_identity
            )


def test_draws_follow_their_generator():
    first, again, other = (views.draw(np.random.default_rng(seed), 20) for seed in (0, 0, 1))
    assert first == again != other
    # Colors 1 to 9 of 19 views: 171 places of which each color should be kept in about 19.
    changed = sum(view.colors[color] != color for view in first[1:] for color in range(1, 10))
    assert 130 < changed < 171


@pytest.mark.parametrize("keep", [(0, 0), (10,), (-1,)])
def test_kept_colors_are_distinct_colors(keep):
    with pytest.raises(ValueError, match=r"keep_colors must be distinct colors .* got"):
        views.draw(np.random.default_rng(0), 2, keep_colors=keep)


def test_a_task_is_seen_through_one_view():
    rng = np.random.default_rng(0)
    grids = [rng.integers(10, size=shape) for shape in ((2, 3), (1, 4), (5, 5), (3, 1))]
    task = FewShotTask("t", (Example(*grids[:2]),), (Example(grids[2], None), Example(*grids[2:])))
    view = random_view(rng, 6)
    seen = views.view_task(view, task)
    assert seen.name == "t" and seen.queries[0].output is None
    made = [*seen.demonstrations[0], seen.queries[0].input, seen.queries[1].output]
    for grid, other in zip(grids, made, strict=True):
        np.testing.assert_array_equal(other, views.apply(view, grid))
    back = views.view_task(views.inverse(view), seen)
    np.testing.assert_array_equal(back.queries[1].output, grids[3])
    with pytest.raises(TypeError, match=r"task's input must be a grid.* got str 'a'"):
        views.view_task(view, FewShotTask("text", (Example("a", "b"),), ()))


@pytest.mark.parametrize("color", [10, -1, 255])
def test_colors_outside_of_the_table_are_refused(color):
    grid = np.array([[0, 1, color]])
    with pytest.raises(ValueError, match=rf"grid must have colors from 0 to 9; got {color} in"):
        views.apply(views.identity(), grid)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (views.GridView(8, PLAIN), "symmetry from 0 to 7; got 8"),
        (views.GridView(True, PLAIN), "symmetry from 0 to 7; got True"),
        (views.GridView(0, PLAIN[:9]), "each of 0 to 9 once"),
        (views.GridView(0, (0, *PLAIN[:9])), "each of 0 to 9 once"),
        (views.GridView(0, (*PLAIN[:9], 9.0)), "each of 0 to 9 once"),
        (views.GridView(0, list(PLAIN)), "colors in a tuple"),
    ],
)
def test_what_is_no_view_is_refused(view, words):
    for use in (views.inverse, lambda v: views.apply(v, np.zeros((1, 1), int))):
        with pytest.raises(ValueError, match=f"view must have .*{words}"):
            use(view)
    with pytest.raises(ValueError, match=f"second must have .*{words}"):
        views.compose(views.identity(), view)


def test_grids_without_cells_are_refused():
    with pytest.raises(ValueError, match=r"grid must have at least one cell; got .*\(0, 3\)"):
        views.apply(views.identity(), np.zeros((0, 3), int))

"""Drawn tasks have one rule each, which changes every grid, and follow their seed."""

import numpy as np
import pytest

from ttt_jax.data import grid_rules


@pytest.mark.parametrize("family", grid_rules.FAMILIES)
def test_a_task_follows_its_seed_and_its_rule(family):
    task = grid_rules.draw_task(family, 7, demonstrations=4, side=5)
    rule = grid_rules.draw_rule(family, np.random.default_rng(7))
    pairs = [*task.demonstrations, *task.queries]
    assert (len(task.demonstrations), len(task.queries), task.name) == (4, 1, f"{family} 7")
    for pair in pairs:
        np.testing.assert_array_equal(rule(pair.input), pair.output)
        assert (
            not np.array_equal(*pair) and 2 <= min(pair.input.shape) <= max(pair.input.shape) <= 5
        )
        assert pair.output.dtype == np.int32 and 0 <= pair.output.min() <= pair.output.max() <= 9
    assert len({pair.input.tobytes() + bytes(pair.input.shape) for pair in pairs}) == 5
    again = grid_rules.draw_task(family, 7, demonstrations=4, side=5)
    assert str(again) == str(task) != str(grid_rules.draw_task(family, 8, demonstrations=4, side=5))


def test_each_family_by_hand():
    cells = np.array([[0, 1, 2], [3, 0, 4]])

    def results(family):
        rules = (grid_rules.draw_rule(family, np.random.default_rng(seed)) for seed in range(40))
        return [rule(cells) for rule in rules]

    assert all((made == 0).sum() == 2 and len(np.unique(made)) == 5 for made in results("recolor"))
    assert {made.shape for made in results("reflect")} == {(2, 3), (3, 2)}
    assert {made.tobytes() for made in results("shift")} == {
        np.roll(cells, by, axis).tobytes() for by in (-1, 1) for axis in (0, 1)
    }
    assert all((made[cells > 0] == cells[cells > 0]).all() for made in results("fill"))
    assert {str(made.tolist()) for made in results("crop")} == {
        "[[0, 1, 2]]",
        "[[3, 0, 4]]",
        "[[0, 1], [3, 0]]",
        "[[1, 2], [0, 4]]",
    }


def test_another_family_is_refused():
    with pytest.raises(ValueError, match=r"family must be one of recolor, .*; got 'turn'"):
        grid_rules.draw_task("turn", 0)

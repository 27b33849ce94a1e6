"""Few-shot tasks as arrays: rows hold demonstrations under their views, and answers return."""

import numpy as np
import pytest

from ttt_jax.data import grid_rules, grid_sequences
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.views import grid, grid_arrays

TASK = grid_rules.draw_task("recolor", 3, demonstrations=3, side=4)
ROWS = {"rows": 4, "length": 128, "most": 6}


def spelled(rows, row, place, part):
    """The grid of one part of a packed sequence."""
    at = (rows["segment"][row] == place) & (rows["part"][row] == part)
    tokens = rows["label"][row] if part == grid_sequences.OUTPUT else rows["token"][row]
    return grid_sequences.decode(tokens[at])


def test_rows_hold_all_demonstrations_under_views():
    rows = grid_arrays.demonstrations(TASK, np.random.default_rng(0), **ROWS, number=5)
    counts = np.bincount(rows["example"][rows["example"] >= 0], minlength=3)
    assert counts.max() - counts.min() <= 1 and counts.sum() >= 8
    symmetries = set()
    for row, place in np.argwhere(rows["example"] >= 0):
        legend = rows["token"][row][(rows["segment"][row] == place) & (rows["part"][row] == 0)]
        view = grid.GridView(int(rows["view"][row, place]), (0, *legend.tolist()))
        pair = TASK.demonstrations[rows["example"][row, place]]
        for part, cells in ((grid_sequences.INPUT, pair.input), (2, pair.output)):
            np.testing.assert_array_equal(spelled(rows, row, place, part), grid.apply(view, cells))
        symmetries.add(view.symmetry)
        assert rows["task"][row, place] == 5
    assert len(symmetries) > 3
    again = grid_arrays.demonstrations(TASK, np.random.default_rng(0), **ROWS, number=5)
    assert all(np.array_equal(rows[name], again[name]) for name in rows)


def test_colors_that_are_kept_stay():
    rows = grid_arrays.demonstrations(TASK, np.random.default_rng(0), **ROWS, keep_colors=range(10))
    legends = rows["token"][(rows["part"] == grid_sequences.LEGEND) & (rows["segment"] >= 0)]
    assert (legends.reshape(-1, 9) == np.arange(1, 10)).all()


def test_queries_do_not_read_their_outputs_and_answers_come_back():
    views = grid.draw(np.random.default_rng(1), 5)
    (query,) = TASK.queries
    bare = TASK._replace(queries=(Example(query.input, None),))
    made, same = (grid_arrays.queries(task, views, length=40) for task in (TASK, bare))
    assert all(np.array_equal(made[name], same[name]) for name in made)
    assert made["token"].shape == (1, 5, 40) and made["view"].tolist() == [
        [v.symmetry for v in views]
    ]
    tokens = np.full((5, 40), grid_sequences.END)
    for row, view in zip(tokens[:4], views, strict=False):
        labels = grid_arrays.item(view, query).sequence.label
        labels = labels[labels >= 0]
        row[: len(labels)] = labels
    found = grid_arrays.answers(tokens, views)
    assert found[4] is None
    for cells in found[:4]:
        np.testing.assert_array_equal(cells, query.output)


def test_the_longest_answer_follows_the_demonstrations():
    def pair(before, after):
        return Example(np.zeros(before, int), None if after is None else np.zeros(after, int))

    same = FewShotTask("same", (pair((2, 3), (2, 3)),), (pair((5, 4), None),))
    assert grid_arrays.answer_length(same) == 5 * 5 + 1
    double = FewShotTask(
        "double", (pair((1, 2), (2, 4)), pair((2, 2), (4, 4))), (pair((3, 5), None),)
    )
    assert grid_arrays.answer_length(double) == 10 * 7 + 1
    fixed = FewShotTask(
        "fixed", (pair((9, 2), (1, 3)), pair((4, 4), (1, 3))), (pair((9, 9), None),)
    )
    assert grid_arrays.answer_length(fixed) == 3 * 2 + 1


def test_shapes_hold_every_task_under_every_view():
    tasks = [grid_rules.draw_task(family, 5, side=5) for family in grid_rules.FAMILIES]
    tasks[0] = tasks[0]._replace(queries=(*tasks[0].queries, *tasks[1].queries))
    sizes = grid_arrays.sizes(tasks)
    views = grid.all_symmetries()
    made = [
        grid_arrays.queries(task, views, length=sizes.query, count=sizes.queries) for task in tasks
    ]
    assert [each["length"].shape for each in made] == [(2, 8)] * 5
    lengths = np.stack([each["length"] for each in made])
    assert lengths.max() == sizes.query and (lengths[1:, 1] == 0).all() and (lengths[0] > 0).all()
    pairs = [pair for task in tasks for pair in task.demonstrations]
    longest = max(len(grid_arrays.item(v, p).sequence.token) for p in pairs for v in views)
    assert longest == sizes.pair and sizes.answer == max(map(grid_arrays.answer_length, tasks))


def test_training_rows_name_their_tasks_but_for_a_share():
    tasks = [grid_rules.draw_task("fill", seed, side=3) for seed in range(4)]
    rng = np.random.default_rng(0)
    rows = grid_arrays.training_rows(tasks, rng, rows=30, length=128, most=6, unknown=0.25)
    filled = (rows["segment"][:, :, None] == np.arange(6)).any(1)
    numbers = rows["task"][filled]
    assert set(numbers.tolist()) == {0, 1, 2, 3, 4} and 0.1 < (numbers == 0).mean() < 0.4
    outputs = {1 + n: {p.output.shape for p in t.demonstrations} for n, t in enumerate(tasks)}
    for row, place in zip(*np.nonzero(filled & (rows["task"] > 0)), strict=True):
        shape = spelled(rows, row, place, grid_sequences.OUTPUT).shape
        known = outputs[rows["task"][row, place]]
        assert shape in known or shape[::-1] in known


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: grid_arrays.demonstrations(
                TASK._replace(demonstrations=()), np.random.default_rng(0), **ROWS
            ),
            "task must have a demonstration to learn from; 'recolor 3' has none",
        ),
        (
            lambda: grid_arrays.demonstrations(
                TASK, np.random.default_rng(0), **{**ROWS, "length": 20}
            ),
            "A sequence must fit in a row of 20 tokens",
        ),
        (
            lambda: grid_arrays.queries(TASK, [grid.identity()], length=9),
            "length must be at least the .* tokens of query 0 of 'recolor 3'; got 9",
        ),
        (
            lambda: grid_arrays.queries(
                TASK._replace(queries=TASK.queries * 3), [grid.identity()], length=40, count=2
            ),
            "count must be at least the 3 queries of 'recolor 3'; got 2",
        ),
        (lambda: grid_arrays.sizes([]), "tasks must have at least one task"),
        (
            lambda: grid_arrays.training_rows(
                [TASK._replace(demonstrations=())], np.random.default_rng(0), **ROWS
            ),
            "tasks must have demonstrations each; 'recolor 3' has none",
        ),
        (lambda: grid_arrays.queries(TASK, [], length=9), "views must have at least one view"),
        (
            lambda: grid_arrays.answers(np.zeros((2, 4), int), [grid.identity()]),
            "views must be as many as rows of tokens, 2; got 1",
        ),
        (
            lambda: grid_arrays.answer_length(TASK._replace(demonstrations=())),
            "task must have a demonstration to go by; 'recolor 3' has none",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

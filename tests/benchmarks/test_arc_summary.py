"""What is said about records of ARC, from rows written by hand."""

import json

import numpy as np
import pytest

from benchmarks.arc import summary
from experiments import launch
from experiments.report import committed


def row(task, votes, right, log_probs=(), missing=0):
    return {
        "task": task,
        "query": 0,
        "votes": votes,
        "right": right,
        "missing": missing,
        "log_probs": list(log_probs),
    }


ROWS = [
    row("a", [3, 1], [True, False], [[-1.0], [-2.0]]),
    row("b", [2, 1, 1], [False, False, True], [[-3.0], [-2.0], [-1.0]]),
    # Of two queries, the second is never right.
    row("c", [4], [True], [[-1.0]]),
    row("c", [1], [False], [[-1.0]], missing=3),
]


def test_a_task_is_solved_by_a_rule_where_all_its_queries_are():
    assert summary.solved(ROWS, "votes") == {"a": True, "b": False, "c": False}
    assert summary.solved(ROWS, "experts") == {"a": True, "b": True, "c": False}
    assert summary.solved(ROWS, "oracle") == {"a": True, "b": True, "c": False}
    assert summary.solved(ROWS, "experts", attempts=1) == {"a": True, "b": True, "c": False}


def test_what_was_not_scored_is_chosen_by_votes():
    rows = [row("a", [2, 1, 1], [False, False, True], [[-3.0]])]
    assert summary.order_of(rows[0], "experts") == [0, 1, 2]
    rows = [row("a", [2, 1, 1], [False, False, True], [[None], [-3.0]])]
    assert summary.order_of(rows[0], "experts") == [1, 0, 2]


def test_the_figures_of_seeds_are_their_mean():
    records = [committed.read(name) for name in summary.JOINT]
    assert [record["config"]["seed"] for record in records] == [0, 1, 2]
    totals = [record["solved"]["experts"] for record in records]
    assert summary.of_seeds(records[0]) == pytest.approx(sum(totals) / 3)
    assert summary.minutes_of_seeds(records[0]) < 15


def test_differences_are_paired_over_tasks():
    better = [row(r["task"], [1], [True], [[-1.0]]) for r in ROWS]
    made = summary.gap(better, ROWS, "votes")
    assert made.value == 2 and made.low >= 0 and made.high <= 3
    assert summary.turned(better, ROWS, "votes") == (2, 0)
    assert summary.turned(ROWS, better, "votes") == (0, 2)
    same = summary.gap(ROWS, ROWS, "votes")
    assert same == (0, 0, 0)
    with pytest.raises(launch.UserError, match="tasks in common"):
        summary.gap(ROWS, [row("z", [1], [True])], "votes")


def test_an_interval_holds_its_sum_and_narrows_to_a_constant():
    values = np.random.default_rng(0).random(400) < 0.4
    made = summary.interval(values.astype(float))
    spread = 1.96 * np.sqrt(400 * values.mean() * (1 - values.mean()))
    assert made.value == values.sum()
    assert abs(made.high - made.low - 2 * spread) < 0.1 * spread
    assert summary.interval(np.ones(7)) == (7, 7, 7)


def test_the_share_of_the_votes_beside_how_often_it_is_right():
    bins, error = summary.confidence(ROWS)
    assert [(b.low, b.queries, b.right) for b in bins] == [
        (0.1, 1, 0.0),
        (0.25, 1, 0.0),
        (0.5, 1, 1.0),
        (0.9, 1, 1.0),
    ]
    assert error == pytest.approx((0.25 + 0.5 + 0.25 + 0.0) / 4)


def test_the_text_has_every_rule_and_the_difference(tmp_path, capsys):
    record = {
        "config": {"version": "arcagi1", "isolated": False, "seed": 0, "num_steps": 5},
        "device": "card",
        # What private copies took is no part of the minutes to the scores.
        "seconds": {"data": 5, "training": 60, "decoding": 15, "scoring": 10, "all": 300},
        "solved": {"votes": 1, "experts": 2, "oracle": 2},
        "rows": ROWS,
    }
    path, early = tmp_path / "a.json", tmp_path / "early.json"
    path.write_text(json.dumps(record))
    summary.main([str(path), str(path)])
    text = capsys.readouterr().out
    assert "arcagi1 joint, seed 0, 5 steps, 1.5 minutes of one card" in text
    assert "votes: 1 [" in text and "experts: 2 [" in text and "of 3" in text
    assert "less the first record, experts: 0 [0, 0]" in text
    early.write_text(json.dumps(record | {"rows": []}))
    assert summary.total(record) == 2 and summary.total(record, "votes") == 1
    assert summary.private_total(record | {"private": {"rows": ROWS[:1]}}) == summary.total(
        {"rows": ROWS[:1]}
    )
    copies = {"rows": ROWS, "steps": {"a": 1, "b": 1, "c": 1}}
    early.write_text(json.dumps(record | {"rows": [], "private": copies}))
    summary.main([str(early)])
    text = capsys.readouterr().out
    assert "experts of private copies: 2 [" in text and "less the source" not in text
    early.write_text(json.dumps(record | {"rows": []}))
    with pytest.raises(launch.UserError, match="must have answers"):
        summary.main([str(early)])
    with pytest.raises(launch.UserError, match="needs the files"):
        summary.main([])

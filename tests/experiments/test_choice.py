"""Choosing settings: killed between two candidates it goes on; failures and ties."""

import json

import numpy as np
import pytest

from experiments import choice, launch, settings
from ttt_jax import metrics
from ttt_jax.task import Task

TASK = Task(
    name="toy",
    init=lambda key: {},
    heads=lambda: {},
    augment=None,
    loss=lambda params, examples, key: 0.0,
    training=lambda seed: [],
    streams=lambda role, seed: {},
    metrics={
        "error": metrics.error(),
        "cross_entropy": metrics.cross_entropy(lambda output: output),
    },
    chooses="error",
    ties=("cross_entropy",),
)


class Runs:
    """Answers with prepared scores, or raises prepared errors, and counts."""

    seed, fingerprint, streams = 0, "abc", ("glass_blur",)

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def score(self, candidate):
        self.asked.append(candidate.settings["rate"])
        answer = self.answers[candidate.settings["rate"]]
        if isinstance(answer, BaseException):
            raise answer
        return answer


def scores(error, cross_entropy=1.0):
    return {"error": error, "cross_entropy": cross_entropy}


@pytest.fixture
def choose(tmp_path):
    grid = [
        settings.Candidate("m", {"rate": rate, "select": "all"}, "per_sample", {}, None)
        for rate in (0.1, 0.2, 0.3)
    ]

    def run(**answers):
        runs = Runs({float(rate[1:]) / 10: answer for rate, answer in answers.items()})
        path = tmp_path / "selection.json"
        try:
            made = choice.choose(path, {"m": grid}, TASK, runs)
            chosen = made["m"].settings["rate"]
        except KeyboardInterrupt:
            chosen = None
        return chosen, runs.asked, json.loads(path.read_text())

    return run


def test_the_lowest_error_then_the_lowest_cross_entropy(choose):
    chosen, asked, record = choose(r1=scores(0.3), r2=scores(0.2, 8.0), r3=scores(0.2, 1.0))
    assert (chosen, asked) == (0.3, [0.1, 0.2, 0.3])
    assert [tried["error"] for tried in record["tried"]] == [0.3, 0.2, 0.2]
    assert "glass_blur" in record["note"] and "lowest mean error" in record["note"]


def test_killed_between_candidates_it_goes_on(choose):
    chosen, asked, record = choose(r1=scores(0.1), r2=KeyboardInterrupt(), r3=scores(0.0))
    assert (chosen, asked) == (None, [0.1, 0.2])
    assert record["chosen"] == {} and len(record["tried"]) == 1
    chosen, asked, record = choose(r1=scores(0.9), r2=scores(0.2), r3=scores(0.3))
    assert (chosen, asked) == (0.1, [0.2, 0.3])
    assert [tried["error"] for tried in record["tried"]] == [0.1, 0.2, 0.3]
    assert choose(r1=scores(0.9), r2=scores(0.0), r3=scores(0.0))[:2] == (0.1, [])


def test_the_model_of_another_seed_chooses_nothing(choose, monkeypatch):
    assert choose(r1=scores(0.1), r2=KeyboardInterrupt())[0] is None
    monkeypatch.setattr(Runs, "seed", 1)
    with pytest.raises(launch.UserError, match=r"the model of seed 0, and m has .*seeds='\(0,\)'"):
        choose(r1=scores(0.0), r2=scores(0.0), r3=scores(0.0))
    monkeypatch.setattr(Runs, "seed", 0)
    assert choose(r2=scores(0.2), r3=scores(0.3))[:2] == (0.1, [0.2, 0.3])
    monkeypatch.setattr(Runs, "seed", 1)
    assert choose()[:2] == (0.1, [])


@pytest.mark.parametrize("text", ["{", "{}", '{"chosen": [], "tried": []}'])
def test_a_damaged_file(choose, tmp_path, text):
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(launch.UserError, match=r"is damaged .*; remove it"):
        choose()


def test_what_failed_is_tried_again(choose):
    failure = {"message": "no memory"}
    assert choose(r1=failure, r2=scores(0.2), r3=KeyboardInterrupt())[0] is None
    chosen, asked, record = choose(r1=scores(0.0), r2=scores(0.9), r3=scores(0.3))
    assert (chosen, asked) == (0.1, [0.1, 0.3])
    assert all("message" not in tried for tried in record["tried"])
    assert len(record["tried"]) == 3


def test_a_loss_that_is_not_finite_comes_last(choose):
    lost = scores(0.2, np.nan)
    assert choose(r1=lost, r2=scores(0.2, 9.0), r3=scores(1.0))[0] == 0.2

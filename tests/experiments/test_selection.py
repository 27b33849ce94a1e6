"""Choosing settings: killed between two candidates it goes on; failures and ties."""

import json
import types

import numpy as np
import pytest

from experiments import (
    launch,
    outcome as outcome_lib,
    runner as runner_lib,
    selection,
    team,
    trials,
)
from ttt_jax import data

LABELS = np.arange(10) % 3


def outcome(wrong, sure=4.0):
    """Ten images, the first ``wrong`` of them misclassified, with some confidence."""
    logits = np.zeros((10, 3), np.float32)
    logits[np.arange(10), (LABELS + (np.arange(10) < wrong)) % 3] = sure
    columns = {"domain": np.full(10, "fog"), "severity": np.full(10, 5), "label": LABELS}
    columns |= {"ok": np.ones(10, bool), "reset": np.zeros(10, bool), "aux": None}
    return outcome_lib.Outcome(logits, seconds=1.0, compile_seconds=0.0, **columns)


class Runner:
    """Answers with prepared outcomes, or raises prepared errors, and counts."""

    team, seed, fingerprint = team.ALONE, 0, "abc"

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def batches(self, *arguments):
        return []

    def run_all(self, name, method, settings, batches):
        self.asked.append(settings["rate"])
        answer = self.answers[settings["rate"]]
        if isinstance(answer, BaseException):
            raise answer
        return [answer]


@pytest.fixture
def choose(tmp_path):
    grid = [{"rate": rate, "select": "all"} for rate in (0.1, 0.2, 0.3)]
    method = types.SimpleNamespace(grid=grid, scope="per_sample")
    trial = trials.Trial("none", (data.streams.Plan([0], ["fog"], [5]),))

    def run(**answers):
        runner = Runner({float(rate[1:]) / 10: answer for rate, answer in answers.items()})
        path = tmp_path / "selection.json"
        try:
            chosen = selection.choose(path, {"m": method}, runner, None, [trial])["m"]["rate"]
        except KeyboardInterrupt:
            chosen = None
        return chosen, runner.asked, json.loads(path.read_text())

    return run


def test_the_lowest_error_then_the_lowest_cross_entropy(choose):
    chosen, asked, record = choose(r1=outcome(3), r2=outcome(2, sure=8.0), r3=outcome(2, sure=1.0))
    assert (chosen, asked) == (0.3, [0.1, 0.2, 0.3])
    assert [tried["error"] for tried in record["tried"]] == [0.3, 0.2, 0.2]


def test_killed_between_candidates_it_goes_on(choose):
    chosen, asked, record = choose(r1=outcome(1), r2=KeyboardInterrupt(), r3=outcome(0))
    assert (chosen, asked) == (None, [0.1, 0.2])
    assert record["chosen"] == {} and len(record["tried"]) == 1
    chosen, asked, record = choose(r1=outcome(9), r2=outcome(2), r3=outcome(3))
    assert (chosen, asked) == (0.1, [0.2, 0.3])
    assert [tried["error"] for tried in record["tried"]] == [0.1, 0.2, 0.3]
    assert choose(r1=outcome(9), r2=outcome(0), r3=outcome(0))[:2] == (0.1, [])


def test_the_model_of_another_seed_chooses_nothing(choose, monkeypatch):
    assert choose(r1=outcome(1), r2=KeyboardInterrupt())[0] is None
    monkeypatch.setattr(Runner, "seed", 1)
    with pytest.raises(launch.UserError, match=r"the model of seed 0, and m has .*seeds='\(0,\)'"):
        choose(r1=outcome(0), r2=outcome(0), r3=outcome(0))
    monkeypatch.setattr(Runner, "seed", 0)
    assert choose(r2=outcome(2), r3=outcome(3))[:2] == (0.1, [0.2, 0.3])
    monkeypatch.setattr(Runner, "seed", 1)
    assert choose()[:2] == (0.1, [])


@pytest.mark.parametrize("text", ["{", "{}", '{"chosen": [], "tried": []}'])
def test_a_damaged_file(choose, tmp_path, text):
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(launch.UserError, match=r"is damaged .*; remove it"):
        choose()


def test_what_failed_is_tried_again(choose):
    failure = runner_lib.TRIAL_ERRORS[0]("no memory")
    assert choose(r1=failure, r2=outcome(2), r3=KeyboardInterrupt())[0] is None
    chosen, asked, record = choose(r1=outcome(0), r2=outcome(9), r3=outcome(3))
    assert (chosen, asked) == (0.1, [0.1, 0.3])
    assert all("message" not in tried for tried in record["tried"])
    assert len(record["tried"]) == 3


def test_a_loss_that_is_not_finite_comes_last(choose):
    lost = outcome(2)._replace(logits=np.full((10, 3), np.nan, np.float32))
    finite = outcome(int(lost.wrong().sum()))
    assert choose(r1=lost, r2=finite, r3=outcome(10))[0] == 0.2

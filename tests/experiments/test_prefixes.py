"""Shorter runs are the beginnings of longer ones."""

import json

import numpy as np
import pytest

from experiments import adapt, prefixes, train
from experiments.methods import Method
from experiments.outcome import Outcome
from tests.experiments import tiny_config


def outcome(steps, ok=True):
    """Of three images; entry i of the trace is i."""
    trace = np.broadcast_to(np.arange(steps + 1.0), (3, steps + 1))
    return Outcome(
        logits=np.broadcast_to(trace[..., None], (3, steps + 1, 2)),
        aux=trace,
        ok=np.array([True, True, ok]),
        reset=np.zeros(3, bool),
        label=np.zeros(3, np.int32),
        domain=np.array(["fog"] * 3),
        severity=np.full(3, 5),
        seconds=6.0,
        compile_seconds=9.0,
    )


METHOD = Method("per_sample", None, ({},), lambda settings: (settings["num_steps"], 0), traced=True)


def runs_of(made):
    def run(settings):
        made.append(settings["num_steps"])
        return outcome(settings["num_steps"])

    return run


def test_a_shorter_run_is_the_beginning_of_the_longest():
    """Whichever is asked for first; its time is its share of the longest one's."""
    made = []
    known = prefixes.Prefixes({"rotation": 6})

    def found(steps, images="a", rate=0.1):
        settings = {"num_steps": steps, "learning_rate": rate}
        return known.outcome("rotation", METHOD, settings, images, runs_of(made))

    short = found(2)
    assert made == [6]
    assert short.logits.shape == (3, 3, 2) and short.aux.shape == (3, 3)
    assert short.final.tolist() == [[2.0, 2.0]] * 3
    assert (short.seconds, short.program_steps) == (2.0, 6)
    assert (found(6).final.max(), found(6).program_steps) == (6.0, 0)
    assert made == [6]
    found(2, images="b")
    found(2, rate=0.2)
    assert made == [6, 6, 6]


def test_without_a_longer_run_a_method_runs_by_itself():
    made = []
    known = prefixes.Prefixes({"rotation": 3})
    for name, method in (("other", METHOD), ("rotation", METHOD._replace(traced=False))):
        known.outcome(name, method, {"num_steps": 2}, "a", runs_of(made))
    known.outcome("rotation", METHOD, {"num_steps": 5}, "a", runs_of(made))
    assert made == [2, 2, 5]


def test_an_image_that_was_given_up_counts_for_the_whole_run():
    """It may have been given up after the steps that are asked for."""
    made = []

    def run(settings):
        made.append(settings["num_steps"])
        return outcome(settings["num_steps"], ok=settings["num_steps"] < 5)

    known = prefixes.Prefixes({"rotation": 5})
    found = known.outcome("rotation", METHOD, {"num_steps": 2}, "a", run)
    assert made == [5, 2] and found.ok.all() and found.program_steps == 0


def test_memory_is_bounded(monkeypatch):
    made = []
    known = prefixes.Prefixes({"rotation": 6})
    monkeypatch.setattr(prefixes, "_MOST_BYTES", 2 * prefixes._bytes(outcome(6)))
    for images in "abcab":
        known.outcome("rotation", METHOD, {"num_steps": 2}, images, runs_of(made))
    assert made == [6] * 5
    known.outcome("rotation", METHOD, {"num_steps": 3}, "b", runs_of(made))
    assert len(made) == 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train.run(tiny_config.get_config(), str(folder))
    return str(folder / "checkpoints" / "seed_0")


def rows(folder, model, steps, known=None, **changed):
    config = tiny_config.get_config()
    config.methods = {"rotation": config.methods.rotation}
    config.methods.rotation.update({"learning_rate": (0.1,), "num_steps": steps})
    config.update_from_flattened_dict(changed)
    assert adapt.run(config, str(folder), checkpoint_path=model, known=known) == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    left_out = ("seconds", "compile_seconds", "samples_per_second", "program_steps")
    return [{k: v for k, v in json.loads(line).items() if k not in left_out} for line in lines]


def test_rows_are_those_of_a_run_by_itself(model, tmp_path):
    alone = {steps: rows(tmp_path / f"alone_{steps}", model, steps) for steps in (1, 2)}
    assert alone[1] != alone[2]
    known = prefixes.Prefixes({"rotation": 3})
    for steps in (2, 1):
        assert rows(tmp_path / f"with_{steps}", model, steps, known) == alone[steps]


def test_splits_with_equal_ids_are_told_apart(model, tmp_path):
    """Ids count from zero in each split; outcomes are those of the images."""
    changed = {
        "adapt.corruptions": "none",
        "data.validation": "train[:20]",
        "data.test": "test[:20]",
    }
    alone = rows(tmp_path / "alone", model, 2, **changed)
    roles = {row["split_role"]: row["error"] for row in alone}
    assert set(roles) == {"validation", "reported"}
    known = prefixes.Prefixes({"rotation": 2})
    assert rows(tmp_path / "with", model, 2, known, **changed) == alone
    assert len(known._whole) == 2

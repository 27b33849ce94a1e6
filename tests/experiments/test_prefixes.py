"""Shorter runs are the beginnings of longer ones."""

import json

import numpy as np
import pytest

from experiments import adapt, prefixes, runner, train
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


def test_a_shorter_run_is_found_in_a_longer_one():
    known = prefixes.Prefixes()
    assert known.find("key", 2) is None
    known.keep("key", outcome(5))
    found = known.find("key", 2)
    assert found.logits.shape == (3, 3, 2) and found.aux.shape == (3, 3)
    assert found.final.tolist() == [[2.0, 2.0]] * 3
    assert (found.seconds, found.compile_seconds) == (3.0, 0.0)
    assert known.find("key", 5).final.max() == 5.0
    assert known.find("key", 6) is None and known.find("other", 2) is None


def test_an_image_that_was_given_up_counts_for_the_whole_run():
    """It may have been given up after the steps that are asked for."""
    known = prefixes.Prefixes()
    known.keep("key", outcome(5, ok=False))
    assert known.find("key", 2) is None


def test_the_latest_outcomes_are_kept(monkeypatch):
    monkeypatch.setattr(prefixes, "_KEPT", 2)
    known = prefixes.Prefixes()
    for key in "abc":
        known.keep(key, outcome(1))
    assert known.find("a", 1) is None and known.find("c", 1) is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train.run(tiny_config.get_config(), str(folder))
    return str(folder / "checkpoints" / "seed_0")


def rows(folder, model, steps, rate=0.1, shared=None):
    config = tiny_config.get_config()
    config.methods = {"rotation": config.methods.rotation}
    config.methods.rotation.update({"learning_rate": (rate,), "num_steps": steps})
    assert adapt.run(config, str(folder), checkpoint_path=model, shared=shared) == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    left_out = ("seconds", "compile_seconds", "samples_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in left_out} for line in lines]


def test_rows_are_those_of_a_run_by_itself(model, tmp_path, monkeypatch):
    """A process that ran three steps has the rows of one and two steps without another call."""
    shared = adapt.Shared()
    longest = rows(tmp_path / "three", model, 3, shared=shared)
    with monkeypatch.context() as patch:
        patch.setattr(runner.Runner, "_call", _refused(runner.Runner._call))
        found = {n: rows(tmp_path / f"of_three_{n}", model, n, shared=shared) for n in (1, 2)}
        with pytest.raises(AssertionError, match="rotation runs again"):
            rows(tmp_path / "other", model, 2, rate=0.2, shared=shared)
    for steps, some in found.items():
        alone = rows(tmp_path / f"alone_{steps}", model, steps)
        assert some == alone
    assert found[1] != found[2] != longest


def _refused(call):
    def only_others(self, name, *arguments):
        assert name != "rotation", "rotation runs again"
        return call(self, name, *arguments)

    return only_others

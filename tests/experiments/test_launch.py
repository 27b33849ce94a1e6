"""What every program shares: the claim on a folder, seeds, files that are there."""

import json

import pytest

from experiments import launch
from tests.experiments import tiny_config


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def on(monkeypatch, command, commit="a" * 40):
    made = launch.provenance

    def provenance(config):
        return made(config) | {"command": command, "commit": commit}

    monkeypatch.setattr(launch, "provenance", provenance)


def test_run_json_is_of_the_program_that_began_the_rows(tmp_path, monkeypatch):
    config = tiny_config.get_config()
    with monkeypatch.context() as patch:
        on(patch, "train")
        launch.claim(tmp_path, config)
    with monkeypatch.context() as patch:
        on(patch, "adapt")
        launch.claim(tmp_path, config, devices=2)
        # Again on the same machine, by the same command: nothing new.
        launch.claim(tmp_path, config, devices=2)
    (tmp_path / "results.jsonl").write_text("{}\n")
    config.seeds = (0, 1)
    with monkeypatch.context() as patch:
        on(patch, "adapt", commit="b" * 40)
        launch.claim(tmp_path, config, devices=1)
    record = run_of(tmp_path)
    assert (record["command"], record["commit"], record["devices"]) == ("adapt", "a" * 40, 2)
    assert record["config"]["seeds"] == [0, 1]
    runs = [(run["command"], run["commit"][0], run.get("devices")) for run in record["runs"]]
    assert runs == [("train", "a", None), ("adapt", "a", 2), ("adapt", "b", 1)]


@pytest.mark.parametrize(
    "made", ["results.jsonl", "selection.json", "checkpoints/seed_0", "training/seed_0/step_5"]
)
def test_a_folder_is_bound_once_something_was_made(tmp_path, made):
    config = tiny_config.get_config()
    launch.claim(tmp_path, config)
    config.adapt.severity = 3
    launch.claim(tmp_path, config)
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("{}")
    launch.claim(tmp_path, config)
    config.adapt.severity = 4
    with pytest.raises(
        launch.UserError, match=r"another configuration: adapt\.severity was 3, now 4"
    ):
        launch.claim(tmp_path, config)


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,), (0.5,)])
def test_impossible_seeds(seeds):
    config = tiny_config.get_config()
    config.seeds = seeds
    with pytest.raises(launch.UserError, match="at least one integer from 0 on, each once; got"):
        launch.check_seeds(config)


def test_a_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x/adapt.py", "--workdir=a b", "--config.seeds=(0, 1)"])
    found = launch.provenance(tiny_config.get_config())["command"]
    assert found == "python -m experiments.adapt '--workdir=a b' '--config.seeds=(0, 1)'"


def test_choices_are_some_and_each_once():
    assert launch.chosen("way", ["a", "b"], "abc") == ("a", "b")
    with pytest.raises(launch.UserError, match="way 'a' is there twice; name each once"):
        launch.chosen("way", ["a", "b", "a"], "abc")
    with pytest.raises(launch.UserError, match="unknown way ''; choose from a, b, c"):
        launch.chosen("way", [], "abc")

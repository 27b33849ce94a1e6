"""Where numbers come from: run.json, and the claim of a configuration on a folder."""

import json

import pytest

from experiments import launch, provenance
from tests.experiments import tiny_config


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def on(monkeypatch, command, commit="a" * 40):
    made = provenance.of

    def of(config):
        return made(config) | {"command": command, "commit": commit}

    monkeypatch.setattr(provenance, "of", of)


def test_run_json_is_of_the_program_that_began_the_rows(tmp_path, monkeypatch):
    config = tiny_config.get_config()
    with monkeypatch.context() as patch:
        on(patch, "train")
        provenance.claim(tmp_path, config)
    with monkeypatch.context() as patch:
        on(patch, "adapt")
        provenance.claim(tmp_path, config, devices=2)
        # Again on the same machine, by the same command: nothing new.
        provenance.claim(tmp_path, config, devices=2)
    (tmp_path / "results.jsonl").write_text("{}\n")
    config.seeds = (0, 1)
    with monkeypatch.context() as patch:
        on(patch, "adapt", commit="b" * 40)
        provenance.claim(tmp_path, config, devices=1)
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
    provenance.claim(tmp_path, config)
    config.adapt.severity = 3
    provenance.claim(tmp_path, config)
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("{}")
    provenance.claim(tmp_path, config)
    config.adapt.severity = 4
    with pytest.raises(launch.UserError, match=r"made otherwise: adapt\.severity was 3, now 4"):
        provenance.claim(tmp_path, config)


def test_a_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x/adapt.py", "--workdir=a b", "--config.seeds=(0, 1)"])
    command = provenance.of(tiny_config.get_config())["command"]
    assert command == "python -m experiments.adapt '--workdir=a b' '--config.seeds=(0, 1)'"
    monkeypatch.setattr("sys.argv", ["x/benchmarks/vision.py", "--out=F"])
    command = provenance.of(tiny_config.get_config())["command"]
    assert command == "python -m benchmarks.vision --out=F"
    monkeypatch.setattr("sys.argv", ["x/benchmarks/arc/__main__.py", "--out=F"])
    command = provenance.of(tiny_config.get_config())["command"]
    assert command == "python -m benchmarks.arc --out=F"


def test_a_command_holds_no_path_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [f"--config={tmp_path}/configs/own.py", f"--workdir={tmp_path}/runs/one"]
    monkeypatch.setattr("sys.argv", ["x/train.py", *arguments])
    said = "python -m experiments.train --config=configs/own.py --workdir=runs/one"
    assert provenance.of(tiny_config.get_config())["command"] == said


def test_a_process_of_a_sweep_names_the_command_that_was_typed(monkeypatch):
    """The environment of its job has it, see ``test_sweep_overrides``."""
    said = "python -m experiments.sweep --config=own.py --workdir=runs/sweep --pack=2"
    monkeypatch.setenv(provenance.COMMAND, said)
    monkeypatch.setattr("sys.argv", ["x/trial.py", "--config=/somewhere/own.py", "--overrides={}"])
    assert provenance.of(tiny_config.get_config())["command"] == said

"""Scalars reach every tracker that is asked for; trackers that cannot start say so."""

import json
import sys
import types

import pytest

from experiments import launch, writers


class Wandb(types.ModuleType):
    """Records what a run of Weights & Biases is given."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def define_metric(self, name, *, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


class MLflow(types.ModuleType):
    """Records what a client of MLflow is given, and numbers its runs."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.logged, self.ended, self.experiments = [], [], [], {}

    def MlflowClient(self):
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = types.SimpleNamespace(experiment_id=f"e-{name}")
        return f"e-{name}"

    def create_run(self, experiment, *, run_name):
        self.runs.append((experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"r{len(self.runs)}"))

    def log_metric(self, run, name, value, *, step):
        self.logged.append((run, name, value, step))

    def set_terminated(self, run):
        self.ended.append(run)


def test_curves_of_several_seeds_stay_apart(tmp_path, trackers):
    names = ("wandb", "mlflow", "tensorboard")
    with writers.open_writer(tmp_path, names) as writer:
        for seed in (0, 1):
            writer.scalars(3, {"train/main_loss": 0.5}, seed)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["seed"] for line in lines] == [0, 1]
    folders = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert folders == ["seed_0", "seed_1"]
    curves = ["seed_0/train/main_loss", "seed_1/train/main_loss"]
    assert [name for _, name, _, _ in trackers.mlflow.logged] == curves
    assert [[*values][1] for values in trackers.wandb.logged] == curves


@pytest.fixture
def trackers(monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    made = types.SimpleNamespace(wandb=Wandb(), mlflow=MLflow())
    for name, module in vars(made).items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


VALUES = {"train/main_loss": 0.5, "train/aux_loss": 0.25}


def write(folder, *names):
    with writers.open_writer(folder, names) as writer:
        writer.scalars(3, VALUES, 1)


def test_json_lines_are_always_written(tmp_path):
    write(tmp_path)
    write(tmp_path)
    line = {"seed": 1, "step": 3, **VALUES}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in lines] == [line, line]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard(tmp_path):
    """Read back by an independent reader of its record format: length, crc, event, crc."""
    pytest.importorskip("tensorboardX", reason="TensorBoard events need tensorboardX")
    from tensorboardX.proto import event_pb2

    write(tmp_path, "tensorboard")
    (path,) = (tmp_path / "tensorboard" / "seed_1").iterdir()
    content, place, found = path.read_bytes(), 0, {}
    while place < len(content):
        length = int.from_bytes(content[place : place + 8], "little")
        event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        place += 16 + length
    assert found == {("train/main_loss", 3): 0.5, ("train/aux_loss", 3): 0.25}


def test_a_run_of_wandb_goes_on(tmp_path, trackers):
    """One run per folder; steps are values, since they begin again with every seed."""
    write(tmp_path, "wandb")
    write(tmp_path, "wandb")
    first, second = trackers.wandb.begun
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("ttt_jax", tmp_path.name, "allow")
    assert trackers.wandb.logged == 2 * [
        {"step": 3, "seed_1/train/main_loss": 0.5, "seed_1/train/aux_loss": 0.25}
    ]
    assert trackers.wandb.finished == 2


def test_a_run_of_mlflow_goes_on(tmp_path, trackers):
    write(tmp_path, "mlflow")
    write(tmp_path, "mlflow")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "mlflow")
    assert trackers.mlflow.runs == [("e-ttt_jax", tmp_path.name), ("e-ttt_jax", "other")]
    assert trackers.mlflow.logged[:2] == [
        ("r1", "seed_1/train/main_loss", 0.5, 3),
        ("r1", "seed_1/train/aux_loss", 0.25, 3),
    ]
    assert trackers.mlflow.ended == ["r1", "r1", "r2"]


def test_all_are_closed_when_the_program_fails(tmp_path, trackers):
    with pytest.raises(ZeroDivisionError), writers.open_writer(tmp_path, ("wandb", "mlflow")):
        raise ZeroDivisionError
    assert (trackers.wandb.finished, trackers.mlflow.ended) == (1, ["r1"])


def test_trackers_that_cannot_start(tmp_path, trackers, monkeypatch):
    with pytest.raises(launch.UserError, match="unknown tracker 'visdom'; choose from tensorboard"):
        write(tmp_path, "visdom")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(launch.UserError, match="--trackers=mlflow needs mlflow, which is not"):
        write(tmp_path, "wandb", "mlflow")
    assert trackers.wandb.finished == 1

    def refuse(**settings):
        raise RuntimeError("no API key")

    monkeypatch.setattr(trackers.wandb, "init", refuse)
    with pytest.raises(launch.UserError, match="--trackers=wandb cannot start: no API key"):
        write(tmp_path, "wandb")

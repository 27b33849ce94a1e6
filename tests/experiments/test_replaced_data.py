"""Data replaced under the same name are refused by every program that goes on with its rows."""

import json

import numpy as np
import pytest

from experiments import (
    adapt,
    diagnose,
    feature_shift,
    journal,
    launch,
    provenance,
    tasks,
    train,
    trial,
)
from experiments.sweeping import plan, progress
from tests.experiments import dense_config, tiny_config

pytestmark = pytest.mark.usefixtures("dense")
SPLITS = ("train", "validation", "test")
REFUSED = r"was made otherwise: the images or labels of {} was '\w+', now '\w+'. Use another --w"


def put_sets(folder, **arrays):
    folder.mkdir(exist_ok=True)
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng(number)
        held = {"images": rng.integers(0, 255, (20, 8, 8, 1), np.uint8)}
        held["labels"] = np.arange(20) % 10
        np.savez(folder / f"{split}.npz", **held | arrays.get(split, {}))


def replace(folder, split="test"):
    held = dict(np.load(folder / f"{split}.npz"))
    np.savez(folder / f"{split}.npz", **held | {"images": 255 - held["images"]})


@pytest.fixture
def sets(tmp_path):
    put_sets(tmp_path / "sets")
    return tmp_path / "sets"


def config_of(sets):
    config = dense_config.get_config()
    config.data.name = f"npz:{sets}/{{split}}.npz"
    config.data.update(dict(zip(SPLITS, SPLITS, strict=True)))
    config.train.update({"num_steps": 1, "save_every": 1})
    config.methods = {"rotation": config.methods.rotation}
    return config


@pytest.fixture
def folder(sets, tmp_path):
    """A work folder with an initial model."""
    tiny_config.save_initial(config_of(sets), tmp_path / "run")
    return tmp_path / "run"


def data_of(folder):
    return json.loads((folder / "run.json").read_text())["data"]


def adapted(folder, sets, domains=("fog",), shard="0/1"):
    config, part = config_of(sets), adapt.Part(domains=domains)
    return adapt.run(config, str(folder), part=part, devices=1, shard=journal.shard(shard))


@pytest.mark.parametrize("split", SPLITS)
def test_adapt_refuses_every_split_that_it_read(folder, sets, split):
    assert adapted(folder, sets) == 0
    assert set(data_of(folder)) == {f"data.{name}" for name in SPLITS}
    rows = (folder / "results.jsonl").read_text()
    replace(sets, split)
    with pytest.raises(launch.UserError, match=REFUSED.format(f"data.{split}")):
        adapted(folder, sets, ("fog", "snow"))
    assert (folder / "results.jsonl").read_text() == rows
    replace(sets, split)
    assert adapted(folder, sets, ("fog", "snow")) == 0


def test_train_refuses_to_go_on(folder, sets):
    provenance.claim(folder, config_of(sets), tasks.at_hand(config_of(sets)))
    replace(sets, "train")
    with pytest.raises(launch.UserError, match=REFUSED.format("data.train")):
        train.run(config_of(sets), str(folder))


def test_shards_and_who_joins_their_rows_refuse(folder, sets):
    assert adapted(folder, sets, ("fog", "snow"), "0/2") == 0
    replace(sets)
    for shard in ("1/2", "0/1"):
        with pytest.raises(launch.UserError, match=REFUSED.format("data.test")):
            adapted(folder, sets, ("fog", "snow"), shard)
    assert not (folder / "results.jsonl").exists()
    replace(sets)
    assert adapted(folder, sets, ("fog", "snow")) == 0
    assert not list(folder.glob("results.*-of-*"))


def diagnosed(folder, sets, *corruptions, **changes):
    config = config_of(sets)
    config.data.update(changes)
    options = diagnose.Options(
        severities=(5,), corruptions=corruptions, num_images=2, learning_rates=(0.01,)
    )
    return diagnose.run(config, str(folder), options)


def test_diagnose_refuses(folder, sets):
    diagnosed(folder, sets, "fog")
    assert list(data_of(folder)) == [f"npz:{sets}/{{split}}.npz, test"]
    # It claims no folder: another configuration may go on here.
    config = config_of(sets)
    config.adapt.severity = 1
    provenance.claim(folder, config, tasks.at_hand(config))
    replace(sets)
    with pytest.raises(launch.UserError, match=REFUSED.format("data.test")):
        diagnosed(folder, sets, "fog", "contrast")
    assert len((folder / "diagnostics.jsonl").read_text().splitlines()) == 1


def test_diagnose_refuses_data_other_than_those_of_the_rows(folder, sets):
    assert adapted(folder, sets) == 0
    replace(sets)
    with pytest.raises(launch.UserError, match=REFUSED.format("data.test")):
        diagnosed(folder, sets, "fog")


def test_another_split_of_its_own_name_is_no_replaced_one(folder, sets):
    assert adapted(folder, sets) == 0
    diagnosed(folder, sets, "fog", test="test[:10]")
    assert f"npz:{sets}/{{split}}.npz, test[:10]" in data_of(folder)
    assert adapted(folder, sets, ("fog", "snow")) == 0


@pytest.mark.parametrize("split", ["test", "train"])
def test_feature_shift_refuses(folder, sets, split):
    def run(*domains):
        feature_shift.run(config_of(sets), str(folder), domains=domains, num_images=5)

    run("fog")
    replace(sets, split)
    with pytest.raises(launch.UserError, match=rf"images or labels of npz:.*, {split}.* was '"):
        run("fog", "contrast")
    assert len((folder / "feature_shift.jsonl").read_text().splitlines()) == 2


CONFIG = """
from tests.experiments import test_replaced_data


def get_config():
    return test_replaced_data.config_of({sets!r})


def sweep(add):
    add(domains=("fog",))
"""


@pytest.fixture
def planned(sets, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(sets=str(sets)))
    return str(tmp_path / "config.py")


@pytest.mark.parametrize("split", SPLITS)
def test_a_sweep_of_replaced_data_has_other_models_and_trials(planned, sets, split):
    before = {unit.id for unit in plan.units(plan.variants(planned))}
    replace(sets, split)
    assert not before & {unit.id for unit in plan.units(plan.variants(planned))}
    replace(sets, split)
    assert before == {unit.id for unit in plan.units(plan.variants(planned))}


def test_units_of_a_sweep_refuse_data_replaced_since_it_began(planned, sets, tmp_path):
    units = plan.units(plan.variants(planned))
    (tmp_path / "sweep").mkdir()
    progress.save(tmp_path / "sweep", units)
    trials = trial.Trials(planned, str(tmp_path / "sweep"))
    model, only = (unit.id for unit in units)
    assert trials.attempt(model) == ("done", "")
    replace(sets)
    outcome, message = trials.attempt(only)
    assert outcome == "blocked" and message.startswith("the images or labels have changed since")
    assert not list((tmp_path / "sweep").glob("trials/*/results.jsonl"))
    replace(sets)
    assert trials.attempt(only) == ("done", "")

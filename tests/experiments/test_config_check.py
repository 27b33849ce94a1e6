"""A config is checked as a whole, before anything is read, trained or written."""

import re
import sys

import ml_collections
import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import (
    adapt,
    config_check,
    config_files,
    config_keys,
    launch,
    provenance,
    settings,
    tasks,
    train,
)
from experiments.configs import digits, documents, few_shot, frames, series
from experiments.tasks import image_splits, images
from tests.experiments import tiny_config


def refused(change, message, config=None):
    config = config or tiny_config.get_config()
    with config.unlocked():
        change(config)
    with pytest.raises(launch.UserError, match=message) as caught:
        config_check.check(config)
    assert isinstance(caught.value, ValueError)


def put(name, value):
    def change(config):
        *sections, key = name.split(".")
        for section in sections:
            config = config[section]
        config[key] = value

    return change


UNKNOWN = {
    "methods.rotation.copeis": r"methods\.rotation: 'copeis' is no setting of .*mean copies\?",
    "train.optimzer": r"unknown key 'train\.optimzer'.*did you mean train\.optimizer\?",
    "adapt.severty": r"did you mean adapt\.severity\?",
    "data.domian": r"did you mean data\.domain\?",
    "views.rimm": r"did you mean views\.rim\?",
    "model.widht": r"unknown key 'model\.widht'.*did you mean model\.width\?",
    "sedes": r"unknown key 'sedes'.*did you mean seeds\?",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest(name):
    refused(put(name, 3), UNKNOWN[name])


@pytest.mark.parametrize("module", [documents, few_shot, frames, series])
def test_other_tasks_say_their_keys(module):
    config_check.check(module.get_config())
    refused(put("data.sidee", 3), "unknown key 'data.sidee'", module.get_config())
    refused(put("adapt.severity", 3), "unknown key 'adapt.severity'", module.get_config())
    refused(put("train.learning_rate", -1.0), "train.learning_rate", module.get_config())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.learning_rate", -0.1, r"finite number of at least 0; got -0\.1"),
        ("train.learning_rate", float("nan"), "finite number of at least 0; got nan"),
        ("train.learning_rate", "high", "got 'high'"),
        ("train.weight_decay", -1.0, r"got -1\.0"),
        ("train.momentum", 2.0, "at least 0 and at most 1"),
        ("train.num_steps", 1.5, r"train\.num_steps must be an integer of at least 1; got 1\.5"),
        ("train.num_steps", True, "integer of at least 1; got True"),
        ("train.mask_ratio", 1.0, "between 0 and 1"),
        ("methods.rotation.learning_rate", (0.1, -0.1), r"methods\.rotation\.learning_rate.*-0\.1"),
        ("methods.rotation.copies", 0, r"methods\.rotation\.copies must be at least 1.*got 0"),
        ("methods.rotation.num_steps", -1, "must be at least 0; got -1"),
        ("methods.rotation", 3, "methods.rotation must be a mapping of settings.*got 3"),
        ("methods.rotation.learning_rate", [], "lists no candidate"),
        ("adapt.severity", 6, "at least 1 and at most 5; got 6"),
        ("data.in_memory", "yes", "must be True or False; got 'yes'"),
        ("data.std", 0.0, r"above 0; got 0\.0"),
        ("data.std", (0.2, 0.0, 0.2), r"above 0; got \(0\.2, 0\.0, 0\.2\)"),
        ("views.padding", -1, "at least 0; got -1"),
        ("model.width", 0, r"model\.width must be at least 1; got 0"),
        ("model.name", "resnte", "model.name must be one of .*got 'resnte'"),
        ("task", "imagse", "config.task must be a file of experiments/tasks"),
        ("data", 3, "config.data must be a section of keys; got 3"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused(name, value, message):
    config = tiny_config.get_config().copy_and_resolve_references()
    config = ml_collections.ConfigDict(config.to_dict())
    with config.ignore_type():
        refused(put(name, value), message, config)


@pytest.mark.parametrize("name", ["data", "model", "views", "train", "adapt", "methods"])
def test_a_missing_section_is_named(name):
    refused(lambda config: config.__delattr__(name), f"no section '{name}'")


@pytest.mark.parametrize(
    "name", ["seeds", "data.test", "data.mean", "train.num_steps", "train.momentum", "adapt.stream"]
)
def test_a_missing_key_is_named(name):
    def remove(config):
        *sections, key = name.split(".")
        for section in sections:
            config = config[section]
        del config[key]

    refused(remove, f"lacks {name}, ")


def test_a_key_that_another_value_needs_is_named():
    def dirichlet(config):
        config.adapt.stream = "dirichlet"
        del config.adapt.dirichlet_gamma

    refused(dirichlet, r"lacks adapt\.dirichlet_gamma.*adapt\.stream='dirichlet' needs")
    config = tiny_config.get_config()
    with config.unlocked():
        config.train.optimizer = "adamw"
        del config.train.momentum
    config_check.check(config)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"validation": "test[:40]", "test": "test[:40]"}, "chooses settings on the images that"),
        ({"validation": "test[20:60]", "test": "test[:40]"}, "data.validation chooses settings"),
        ({"validation": "test[:50%]", "test": "test"}, "data.validation='test.:50%.'"),
        ({"train": "test"}, "data.train must not be test data; got 'test'"),
        ({"train": "test[40:]", "test": "test[:40]"}, "data.train must not be test data"),
        ({"train": "train[:40]", "test": "train[20:60]"}, "data.train trains on the images"),
    ],
)
def test_nothing_is_chosen_or_trained_on_what_is_reported(splits, message):
    refused(lambda config: config.data.update(splits), message)


def test_parts_of_the_test_split_may_choose():
    config = tiny_config.get_config()
    config.data.update({"validation": "test[40:60]", "test": "test[:40]"})
    config_check.check(config)


def test_percentages_and_numbers_are_compared_with_the_images_at_hand():
    config = tiny_config.get_config()
    config.data.update({"validation": "test[:10%]", "test": "test[:40]"})
    config_check.check(config)
    with pytest.raises(ValueError, match=r"data.validation chooses .*they share 36 images"):
        tasks.at_hand(config)


def write(folder, **arrays):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, changes in arrays.items():
        held = {
            "images": rng.integers(0, 255, (20, 8, 8, 1), np.uint8),
            "labels": np.arange(20) % 10,
        }
        np.savez(folder / f"{split}.npz", **held | changes)
    config = tiny_config.get_config()
    config.data.name = f"npz:{folder}/{{split}}.npz"
    config.data.update({"train": "train", "validation": "validation", "test": "test"})
    return config


def test_copies_of_the_reported_images_are_noticed(tmp_path):
    config = write(tmp_path, train={}, validation={}, test={})
    assert set(tasks.at_hand(config)) == {"data.train", "data.validation", "data.test"}
    copied = dict(np.load(tmp_path / "test.npz"))
    write(tmp_path, validation=copied)
    with pytest.raises(ValueError, match=r"data.validation chooses.* 20 images are in both"):
        tasks.at_hand(config)


def test_one_file_is_one_split_whatever_its_parts_are_called(tmp_path):
    config = write(tmp_path, all={})
    config.data.update({"name": f"npz:{tmp_path}/all.npz", "train": "train[:10]"})
    config.data.update({"validation": "validation[10:15]", "test": "test[12:]"})
    with pytest.raises(ValueError, match=r"data.validation chooses settings on the images"):
        config_check.check(config)


def test_classes_of_the_training_split_count_for_all(tmp_path):
    few = {"labels": np.arange(20) % 9}
    config = write(tmp_path, train={}, validation=few, test=few)
    assert images.load_data(config, "test").num_classes == 10
    config = write(tmp_path, train=few, validation=few, test={})
    with pytest.raises(ValueError, match=r"data.test must have the classes of data.train, 0 to 8"):
        images.load_data(config, "test")
    named = {"class_names": np.array(list("abcdefghij"))}
    config = write(tmp_path, train=few, validation=few | named, test={})
    assert images.load_data(config, "test").class_names == tuple("abcdefghij")
    other = {"class_names": np.array(list("abcdefghix"))}
    config = write(tmp_path, train=other, validation=named, test={})
    with pytest.raises(ValueError, match="all splits must have the same class_names"):
        image_splits.classes(config)


def test_a_mean_per_channel(tmp_path):
    rgb = {"images": np.random.default_rng(1).integers(0, 255, (20, 8, 8, 3), np.uint8)}
    config = write(tmp_path, train=rgb, validation=rgb, test=rgb)
    with config.ignore_type():
        config.data.update({"mean": (0.5, 0.4, 0.3), "std": [0.2, 0.2, 0.1]})
    source = images.load_data(config, "test")
    batch = source.arrays().image
    found = images.ImageModel(config, source).normalize(batch)
    expected = (batch - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.2, 0.1])
    np.testing.assert_array_equal(found, expected)
    config.data.mean = (0.5, 0.4)
    with pytest.raises(ValueError, match=r"data.mean must be a number or one per channel; got \(0"):
        images.ImageModel(config, source)


def test_images_of_four_channels_are_refused_before_the_training(tmp_path):
    four = {"images": np.zeros((20, 8, 8, 4), np.uint8)}
    config = write(tmp_path / "data", train=four, validation=four, test=four)
    with pytest.raises(ValueError, match="images of 1 or 3 channels; got 4 of"):
        train.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    config.adapt.corruptions = "none"
    images.task(config)


def test_candidates_may_be_a_list():
    grid = settings.grid_of({"learning_rate": [0.1, 0.2], "copies": (1, 2), "num_steps": 1})
    assert [one["learning_rate"] for one in grid] == [0.1, 0.1, 0.2, 0.2]
    assert {type(one["learning_rate"]) for one in grid} == {float}


def test_every_checkpoint_is_looked_for_before_the_first_row(tmp_path):
    config = tiny_config.get_config()
    config.seeds = (0,)
    tiny_config.save_initial(config, tmp_path)
    config.seeds = (0, 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of seed 1 at .*seed_1; train one"):
        adapt.run(config, str(tmp_path), devices=1)
    assert not (tmp_path / "results.jsonl").exists()


def test_other_images_under_the_same_name_are_refused(tmp_path):
    config = write(tmp_path / "data", train={}, validation={}, test={})
    folder = tmp_path / "run"
    folder.mkdir()
    provenance.claim(folder, config, tasks.at_hand(config))
    (folder / "results.jsonl").write_text("")
    provenance.claim(folder, config, tasks.at_hand(config))
    held = dict(np.load(tmp_path / "data" / "test.npz"))
    np.savez(tmp_path / "data" / "test.npz", **held | {"images": 255 - held["images"]})
    with pytest.raises(launch.UserError, match=r"the images or labels of data.test was '.*', now"):
        provenance.claim(folder, config, tasks.at_hand(config))


@pytest.mark.parametrize(("module", "name"), [(series, "file"), (documents, "folder")])
def test_files_of_other_tasks_have_a_fingerprint(module, name, tmp_path):
    config = module.get_config()
    path = tmp_path / "series.npz" if name == "file" else tmp_path
    config.data[name] = str(path)

    def prints(value):
        if name == "file":
            roles = ("train", "validation", "reported")
            np.savez(path, **{role: np.full(200, value, np.float32) for role in roles})
        else:
            for number in range(60):
                (path / f"{number}.py").write_text(f"{value}")
        return tasks.at_hand(config)

    assert prints(1) == prints(1) != prints(2)


def test_the_table_has_the_defaults_and_every_key_of_the_demo():
    assert config_keys.DEFAULTS["train.optimizer"] == "sgd"
    known = {**config_keys.COMMON, **config_keys.IMAGES, **config_keys.MODEL}
    config = digits.get_config()
    assert {n for n in launch.flat(config) if not n.startswith("methods.")} - {*known} == {
        name for name in launch.flat(config) if name.startswith("model.") and name not in known
    }
    for name, key in known.items():
        if key.default not in (config_keys.NEEDED, config_keys.ABSENT):
            assert key.rule.holds(key.default), name
        assert key.meaning and key.rule.says


def test_the_page_of_the_programs_has_the_table():
    page = (config_files.DEFAULT_CONFIG.parents[2] / "docs" / "programs.md").read_text()
    page = page.partition("Keys that may be left out")[2].partition("takes only keys that are")[0]
    rows = re.findall(r"^\| `(\w+\.\w+)` \| `?([^`|]+?)`? \| .* \|$", page, re.MULTILINE)
    assert dict(rows) == {name: str(value) for name, value in config_keys.DEFAULTS.items()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no file .*config.py; --config names a config file"),
        ("x = 1", r"has no function get_config\(\); add it"),
        ("def get_config(:", "config.py fails: SyntaxError"),
        ("import nowhere_at_all", "config.py fails: ModuleNotFoundError"),
        ("def get_config():\n    return {}[1]", r"get_config\(\) of .* fails: KeyError"),
        ("def get_config():\n    pass", "must return a ConfigDict; got None"),
    ],
)
def test_a_config_file_that_gives_no_config_is_one_sentence(text, words, tmp_path, monkeypatch):
    path = tmp_path / "config.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(launch.UserError, match=words):
        config_files.config_from(path)
    for flag in ([f"--config={path}"], ["--config", str(path)]):
        monkeypatch.setattr(sys, "argv", ["train", *flag])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            config_files.define_config(None)
        assert ended.value.code == 2


def test_a_workdir_that_is_a_file_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(launch.UserError, match="file is a file and no folder; choose another"):
            launch.open_workdir(str(path))

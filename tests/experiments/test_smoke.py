"""The smoke program: it finds and shrinks every config, and says what failed."""

import re

import ml_collections
import numpy as np
import pytest

from experiments import launch, pristine, smoke, tasks
from experiments.tasks import images as image_task


def test_every_config_is_found_and_a_new_one_too(tmp_path, monkeypatch):
    found = smoke.discover()
    files = {path.name for path in smoke.FOLDER.iterdir() if path.suffix == ".py"}
    assert {f"{name}.py" for name in found} == files and "digits" in found
    for name in ("new", "_helper"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(smoke, "FOLDER", tmp_path)
    assert smoke.discover() == {"new": tmp_path / "new.py"}
    with pytest.raises(launch.UserError, match="no config 'old'; choose from new"):
        smoke.discover(["old"])


def test_every_config_becomes_tiny_and_reads_noise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no data
    parts, lines = smoke.plan(smoke.discover(), tmp_path, on_noise=True)
    assert [part.name for part in parts] == list(smoke.discover())
    for part in parts:
        config = part.config()
        assert config.methods and config.train.num_steps <= 2 and len(config.seeds) == 1
        for options in config.methods.values():
            for name, most in smoke.TINY_METHOD.items():
                assert (options.get(name) or 0) <= most
            assert all(len(v) == 1 for v in options.values() if isinstance(v, tuple))
        pristine.layout(tasks.build(config))
        if "task" in config:
            continue
        sets = {role: image_task.load_data(config, role) for role in smoke.ROLES}
        for role, most in smoke.ROLES.items():
            # A long tail takes some of the training images away.
            assert len(sets[role]) == most or (role == "train" and "imbalance" in config.data)
    # What diagnose and feature_shift take is there, and no earlier config took the method away.
    kept = {part.name: part.config().methods for part in parts}
    assert all(method in kept[name] for name, method in smoke.DIAGNOSED.items())
    assert smoke.SHIFTED in kept
    assert lines
    for line in lines:
        assert re.match(r"noise  \w+: its data are absent; they are made by: python -m exp", line)


def test_training_and_validation_rows_do_not_overlap():
    config = launch.config_from(launch.DEFAULT_CONFIG)
    small = smoke.overrides(config)
    assert small["data.train"] == "train[0:64]" and small["data.validation"] == "train[64:68]"
    assert small["data.test"] == "test[0:4]"
    assert small["methods.rotation.learning_rate"] == config.methods.rotation.learning_rate[:1]
    # Keys that a config lacks are not added.
    assert "model.heads" not in small and "model.depth" in small
    assert "--config.data.test='test[0:4]'" in smoke.as_flags(small)


def test_a_method_runs_once_per_kind_of_network():
    def config(norm, *names):
        methods = {name: {} for name in names}
        return ml_collections.ConfigDict(
            {"model": {"name": "resnet", "norm": norm}} | {"methods": methods}
        )

    seen = set()
    assert smoke.leave_out(config("group", "joint", "memo"), seen) == []
    second = config("group", "joint", "rotation")
    assert smoke.leave_out(second, seen) == ["joint"] and list(second.methods) == ["rotation"]
    assert smoke.leave_out(config("batch", "joint"), seen) == []
    # Every config runs: one whose methods all ran keeps one.
    third = config("group", "joint", "memo")
    assert smoke.leave_out(third, seen) == ["memo"] and list(third.methods) == ["joint"]
    # Another label is the same program; another option may be another, another value is not.
    fourth = config("group", "joint", "rotation", "memo")
    fourth.methods.rotation.momentum = 0.9
    assert smoke.leave_out(fourth, seen) == ["joint", "memo"]
    fifth = config("group", "rotation", "source")
    fifth.methods.rotation.momentum = 0.5
    assert smoke.leave_out(fifth, seen) == ["rotation"]


def write_npz_config(folder, name, doc):
    (folder / f"{name}.py").write_text(
        f'"""{doc}"""\n'
        "from experiments.configs import digits\n\n\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        f'    config.data.name = "npz:{folder}/{{split}}.npz"\n'
        "    return config\n"
    )


def test_absent_data_are_skipped_with_the_command_that_makes_them(tmp_path, monkeypatch):
    write_npz_config(
        tmp_path, "a", "Like b.\n\nCommand: ``python -m experiments.train --workdir=W``."
    )
    write_npz_config(tmp_path, "b", "Reads what ``python -m experiments.pack\n--to=D`` writes.")
    monkeypatch.setattr(smoke, "FOLDER", tmp_path)
    parts, lines = smoke.plan(smoke.discover(), tmp_path / "W", on_noise=False)
    assert parts == []
    for name, line in zip("ab", lines, strict=True):
        assert line.startswith(f"skip   {name}: There is no file")
        assert line.endswith("Make its data: python -m experiments.pack --to=D")
    # Their own images, if they are there: one row of every class first, every second pixel.
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5, dtype=np.int32), 40)
    for split in ("train", "test"):
        images = rng.random((200, 8, 8, 1), np.float32)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    parts, lines = smoke.plan(smoke.discover(), tmp_path / "V", on_noise=False)
    assert [part.name for part in parts] == ["a", "b"] and lines == []
    source = image_task.load_data(parts[0].config(), "test")
    assert source.labels().tolist() == [0, 1, 2, 3] and source.image_shape == (4, 4, 1)
    np.testing.assert_array_equal(source[2].image, images[80, ::2, ::2])


def test_a_failing_part_says_why_and_how_to_repeat_it(tmp_path, monkeypatch):
    def fail(config, folder):
        print("half way")
        raise ValueError("no luck")

    monkeypatch.setattr(smoke.train, "run", fail)
    (part,), _ = smoke.plan(smoke.discover(["digits"]), tmp_path, on_noise=False)
    message = smoke.run_part(part, str(tmp_path / "digits"))
    assert message.startswith("ValueError: no luck\nhalf way\n")
    assert "--config.train.num_steps='2'" in message and "configs/digits.py" in message

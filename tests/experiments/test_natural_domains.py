"""A test domain that is no corruption: PACS is packed, trials are named, rows say so."""

import collections
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import adapt, config_check, config_files, train
from experiments.configs import pacs
from experiments.prepare import pacs as prepare_pacs
from experiments.tasks import image_order, images
from tests.experiments import diagnosed, tiny_config
from ttt_jax import data

COUNTS = {"photo": 20, "art_painting": 40, "cartoon": 20, "sketch": 10}

# The programs are run from a checkout.
_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sets():
    """Two classes per domain; every image holds its place among all of them."""
    made, place = {}, 0
    for domain, count in COUNTS.items():
        images = np.zeros((count, 8, 8, 3), np.uint8)
        images[:, 0, 0, 0] = place + np.arange(count)
        labels = (np.arange(count) >= count // 2).astype(np.uint8)
        made[domain] = {"images": images, "labels": labels, "class_names": np.array(["a", "b"])}
        place += count
    return made


def test_every_image_is_in_one_split_and_validation_is_a_tenth_of_each_class(sets):
    splits = prepare_pacs.leave_one_out(sets, "cartoon", seed=0)
    ids = np.concatenate([splits[name]["ids"] for name in ("train", "validation", "test")])
    assert sorted(ids) == list(range(90))
    test, validation = splits["test"], splits["validation"]
    assert set(test["domains"]) == {"cartoon"} and sorted(test["ids"]) == list(range(60, 80))
    # A tenth of 10 and of 20 is 1 and 2, of 5 rounds to even: none.
    cells = zip(validation["domains"].tolist(), validation["labels"].tolist(), strict=True)
    assert collections.Counter(cells) == {
        ("photo", 0): 1,
        ("photo", 1): 1,
        ("art_painting", 0): 2,
        ("art_painting", 1): 2,
    }
    for split in splits.values():
        np.testing.assert_array_equal(split["images"][:, 0, 0, 0], split["ids"])
        assert (np.diff(split["ids"]) < 0).any()
        start = {"photo": 0, "art_painting": 20, "cartoon": 60, "sketch": 80}
        first = np.array([start[domain] for domain in split["domains"]])
        half = np.array([COUNTS[domain] // 2 for domain in split["domains"]])
        np.testing.assert_array_equal(split["labels"], split["ids"] - first >= half)


def test_the_program_writes_what_the_config_reads(sets, tmp_path, monkeypatch):
    for domain, arrays in sets.items():
        np.savez(tmp_path / f"{domain}_8.npz", **arrays)
    program = [sys.executable, "-m", "experiments.prepare.pacs", f"--target={tmp_path}/data/pacs"]
    source = f"--source={tmp_path}/{{domain}}_8.npz"
    subprocess.run(
        [*program, source, "--held_out=photo"], check=True, capture_output=True, cwd=_ROOT
    )
    monkeypatch.chdir(tmp_path)
    config = pacs.get_config("photo")
    test = images.load_data(config, "test")
    assert (len(test), test.title) == (20, "PACS, 8 px")
    assert len(images.load_data(config, "train")) == 70 - 6
    assert not (tmp_path / "data" / "pacs" / "sketch").exists()
    for bad, words in (
        (source.replace("_8", "_9"), "there is no file"),
        ("--source=x", "{domain}"),
    ):
        done = subprocess.run([*program, bad], capture_output=True, text=True, cwd=_ROOT)
        assert done.returncode == 2 and words in done.stderr


def natural(folder, sets):
    rng = np.random.default_rng(0)
    for name, arrays in prepare_pacs.leave_one_out(sets, "photo", seed=0).items():
        noise = rng.integers(0, 256, arrays["images"].shape, np.uint8)
        np.savez(folder / f"{name}.npz", **arrays | {"images": noise})
    config = diagnosed.get_config()
    config.data.update({"name": f"npz:{folder}/{{split}}.npz", "domain": "photo"})
    config.data.update({"train": "train", "validation": "validation", "test": "test"})
    config.train.update({"aux": "none", "num_steps": 2, "log_every": 2})
    config.adapt.corruptions = "none"
    return tiny_config.with_methods(config, source={}, augmented={"num_views": (2, 3)})


def test_rows_carry_the_domain_and_settings_are_chosen_on_the_other_domains(dense, sets, tmp_path):
    config = natural(tmp_path, sets)
    folder = tmp_path / "run"
    train.run(config, str(folder))
    assert adapt.run(config, str(folder), devices=1) == 0
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    cells = [(row["split_role"], row["domain"], row["severity"]) for row in rows]
    assert cells == [("validation", "clean", 0)] * 2 + [("reported", "photo", 0)] * 2
    assert {row["num_examples"] for row in rows if row["domain"] == "photo"} == {20}
    record = json.loads((folder / "selection.json").read_text())
    assert "validation streams (clean)" in record["note"]
    assert [one["params"]["num_views"] for one in record["tried"]] == [2, 3]
    before = (folder / "results.jsonl").read_bytes()
    assert adapt.run(config, str(folder), devices=1) == 0
    assert (folder / "results.jsonl").read_bytes() == before


def test_a_named_domain_may_be_corrupted_too():
    config = tiny_config.get_config()
    config.data.domain = "scans"
    found = image_order.streams(config, images.load_data(config, "test"), "reported", 0)
    assert list(found) == ["scans", *data.corruptions.CORRUPTIONS]
    (batch, *_) = found["scans"]
    assert set(batch.tags["domain"]) == {"scans"} and set(batch.tags["severity"]) == {0}
    checked = image_order.streams(config, images.load_data(config, "validation"), "validation", 0)
    assert list(checked) == list(data.corruptions.VALIDATION_CORRUPTIONS)


@pytest.mark.parametrize(
    ("adapt_options", "words"),
    [
        ({"corruptions": "all"}, r"adapt\.corruptions must be one of .*; got 'all'"),
        (
            {"corruptions": "none", "sequence": "mixed"},
            r"adapt\.sequence .*got 'mixed' with 'none'",
        ),
    ],
)
def test_impossible_domains_are_refused(adapt_options, words):
    config = tiny_config.get_config()
    config.adapt.update(adapt_options)
    with pytest.raises(ValueError, match=words):
        config_check.check(config)


@pytest.mark.parametrize("name", ["pacs", "pacs_source"])
def test_a_config_takes_the_domain_after_a_colon(name):
    path = config_files.DEFAULT_CONFIG.with_name(f"{name}.py")
    assert config_files.config_from(path).data.domain == "sketch"
    program = (
        "from absl import app; from experiments import config_files; "
        "config, _ = config_files.define_flags(); app.run(lambda _: print(config.value.data.name))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--workdir=x", f"--config={path}:cartoon"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "npz:data/pacs/cartoon/{split}.npz\n"

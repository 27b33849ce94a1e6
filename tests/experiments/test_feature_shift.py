"""The distances of moment matching, in units of the source's own scatter."""

import json

import numpy as np
import pytest

from experiments import feature_shift, launch, pristine
from tests.experiments import tiny_config


def test_moments_in_batches_are_those_of_all():
    z = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    batches = iter([z[:4], z[4:5], z[5:]])
    found = feature_shift.moments_of(lambda params, z: params * z, 2.0, batches)
    np.testing.assert_allclose(found.mean, 2 * z.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.centered, 4 * np.cov(z.T, bias=True), rtol=1e-5, atol=1e-6)


def test_no_batch_is_of_one_image(monkeypatch):
    monkeypatch.setattr(feature_shift, "_BATCH", 4)
    assert [len(part) for part in feature_shift._parts(9)] == [3, 3, 3]


def get_config():
    """The model with BatchNorm, and few training images."""
    config = tiny_config.get_batch_norm_config()
    config.data.train = "train[:250]"
    return config


@pytest.fixture(scope="module")
def model(dense, tmp_path_factory):
    """The path of a checkpoint of that model."""
    config, folder = get_config(), tmp_path_factory.mktemp("model")
    tiny_config.save_initial(config, folder)
    return str(pristine.path_of(folder, 0))


def test_the_program(model, tmp_path, capsys):
    config = get_config()

    def run(*domains):
        made = {"checkpoint_path": model, "domains": domains, "num_images": 25}
        return feature_shift.run(config, str(tmp_path), **made)

    first = run("contrast")
    assert [(row["domain"], row["severity"], row["num_examples"]) for row in first] == [
        ("clean", 0, 25),
        ("contrast", 5, 25),
    ]
    # Contrast moves the features of any model; digits of one split are like those of the other.
    assert first[1]["mean"] > 3 * first[0]["mean"] > 0
    record = json.loads((tmp_path / "feature_shift.json").read_text())
    assert record["rows"] == first and {"command", "device", "versions", "commit"} <= set(record)
    assert capsys.readouterr().out.count("covariance") == 2
    # What is there stays, and of other images nothing is taken over.
    assert run("contrast", "fog")[:2] == first
    three = run("fog")
    assert [row["domain"] for row in three] == ["clean", "contrast", "fog"]
    other = feature_shift.run(
        config, str(tmp_path), checkpoint_path=model, domains=("fog",), num_images=20
    )
    assert [(row["domain"], row["num_examples"]) for row in other] == [("clean", 20), ("fog", 20)]
    # Nor is it lost: the record is of the options at hand, the lines are of all.
    assert json.loads((tmp_path / "feature_shift.json").read_text())["rows"] == other
    lines = (tmp_path / "feature_shift.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == three + other
    assert run("fog") == three
    assert json.loads((tmp_path / "feature_shift.json").read_text())["rows"] == three
    assert (tmp_path / "feature_shift.jsonl").read_text().splitlines() == lines


def test_a_row_is_of_the_images_that_it_says(model, tmp_path):
    """A changed config gives the rows that a folder of its own gives."""

    def run(folder, **changes):
        changed = get_config()
        changed.update_from_flattened_dict(changes)
        made = {"checkpoint_path": model, "domains": ("shot_noise",), "num_images": 9}
        return feature_shift.run(changed, str(tmp_path / folder), **made)

    first = run("shared")
    for key, value in (
        ("adapt.corruption_seed", 7),
        ("data.train", "train[:100]"),
        ("data.test", "test[20:70]"),
        ("adapt.severity", 3),
    ):
        again = run("shared", **{key: value})
        assert again == run(key, **{key: value})
        assert again[1]["mean"] != first[1]["mean"]
    assert run("shared") == first


def test_the_record_of_an_older_program_is_not_replaced(model, tmp_path):
    config = get_config()
    (tmp_path / "feature_shift.json").write_text('{"rows": []}')
    with pytest.raises(launch.UserError, match=r"has rows that .*jsonl lacks.*move it away"):
        feature_shift.run(config, str(tmp_path), checkpoint_path=model, num_images=2)
    assert (tmp_path / "feature_shift.json").read_text() == '{"rows": []}'


def test_the_statistics_of_a_batch(model, tmp_path):
    config = get_config()
    made = {"checkpoint_path": model, "domains": ("contrast",), "num_images": 25}
    running, batch = (
        feature_shift.run(config, str(tmp_path / norm), norm=norm, **made)
        for norm in ("running", "batch")
    )
    assert batch[1]["mean"] < running[1]["mean"] and batch[1]["norm"] == "batch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "mine"}, "unknown --norm value 'mine'"),
        ({"norm": "batch"}, "this one has none; use --norm=running"),
        ({"domains": ("rain",)}, "unknown --domains value 'rain'"),
        ({"domains": ()}, "unknown --domains value ''"),
        ({"domains": ("fog", "fog")}, "--domains value 'fog' is there twice"),
        ({"num_images": 1}, "at least 2; got 1 and 30 of"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(launch.UserError, match=message):
        feature_shift.run(tiny_config.get_config(), str(tmp_path / "w"), **options)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, r"config\.seeds must list .* got \(\)"),
        ({"data.test": "test[:1]"}, r"at least 2; got 1536 and 1 of 'test\[:1\]'"),
        ({"adapt.severity": 6}, r"adapt\.severity must be at least 1 and at most 5; got 6"),
    ],
)
def test_refusals_of_a_config(tmp_path, change, message):
    config = tiny_config.get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises((launch.UserError, ValueError), match=message):
        feature_shift.run(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()

"""Errors per group of classes: the groups and the rows."""

import json

import numpy as np
import pytest

from experiments import adapt, train
from experiments.tasks import images
from experiments.tasks.image_metrics import class_groups
from tests.experiments import diagnosed, tiny_config


def test_groups_are_thirds_by_training_images():
    counts = [5, 9, 1, 7, 3, 3, 8, 2, 6, 4]
    groups = class_groups(np.repeat(np.arange(10), counts), 10)
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        "many": [1, 6, 3],
        "medium": [8, 0, 9, 4],
        "few": [5, 7, 2],
    }


@pytest.fixture(scope="module")
def run(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tail")
    config = tiny_config.with_methods(diagnosed.get_config(), source={})
    config.data.imbalance = 20
    config.adapt.corruptions = "none"
    config.train.update({"aux": "none", "num_steps": 3, "log_every": 3})
    train.run(config, str(folder))
    assert adapt.run(config, str(folder), devices=1) == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    return config, folder, [json.loads(line) for line in lines]


def test_only_the_training_split_is_long_tailed(run):
    config, _, _ = run
    sizes = np.bincount(images.load_data(config, "train").labels())
    assert (np.diff(sizes) < 0).all() and sizes[0] >= 19 * sizes[-1]
    assert len(images.load_data(config, "test")) == 30


def test_errors_of_the_groups_make_up_the_error(run):
    config, _, found = run
    assert [row["split_role"] for row in found] == ["validation", "reported"]
    for row, split in zip(found, ("validation", "test"), strict=True):
        labels = images.load_data(config, split).labels()
        groups = class_groups(images.load_data(config, "train").labels(), 10)
        shares = {name: np.isin(labels, classes).mean() for name, classes in groups.items()}
        total = sum(share * row[f"error_{name}"] for name, share in shares.items())
        assert total == pytest.approx(row["error"], abs=1e-9)

"""Errors per group of classes: the groups, the rows, the report."""

import json
import re

import numpy as np
import pytest

from experiments import adapt, problem, report, rows, train
from tests.experiments import tiny_config


def test_groups_are_thirds_by_training_images():
    counts = [5, 9, 1, 7, 3, 3, 8, 2, 6, 4]
    groups = rows.class_groups(np.repeat(np.arange(10), counts), 10)
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        "many": [1, 6, 3],
        "medium": [8, 0, 9, 4],
        "few": [5, 7, 2],
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tail")
    config = tiny_config.with_methods(tiny_config.get_config(), source={})
    config.data.imbalance = 20
    config.adapt.corruptions = "none"
    config.train.update({"aux": "none", "num_steps": 3, "log_every": 3})
    train.run(config, str(folder))
    assert adapt.run(config, str(folder)) == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    return config, folder, [json.loads(line) for line in lines]


def test_only_the_training_split_is_long_tailed(run):
    config, _, _ = run
    sizes = np.bincount(problem.load_data(config, "train").labels())
    assert (np.diff(sizes) < 0).all() and sizes[0] >= 19 * sizes[-1]
    assert len(problem.load_data(config, "test")) == 30


def test_errors_of_the_groups_make_up_the_error(run):
    config, _, found = run
    assert [row["split_role"] for row in found] == ["validation", "reported"]
    for row, split in zip(found, ("validation", "test"), strict=True):
        labels = problem.load_data(config, split).labels()
        groups = rows.class_groups(problem.load_data(config, "train").labels(), 10)
        shares = {name: np.isin(labels, classes).mean() for name, classes in groups.items()}
        total = sum(share * row[f"error_{name}"] for name, share in shares.items())
        assert total == pytest.approx(row["error"], abs=1e-9)


def test_the_report_shows_the_groups_where_there_are_some(run, tmp_path):
    _, folder, found = run
    heading = "Error per group of classes"
    report.write(folder)
    page = (folder / "report.html").read_text()
    table = page[page.index(heading) :].partition("</table>")[0]
    assert re.findall(r"clean: (\w+)", table) == ["many", "medium", "few"]
    shown = re.findall(r">(\d+\.\d)<", table)
    assert shown == [f"{100 * found[1][f'error_{name}']:.1f}" for name in ("many", "medium", "few")]
    without = [
        {key: value for key, value in row.items() if not key.startswith("error_")} for row in found
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    report.write(tmp_path)
    assert heading not in (tmp_path / "report.html").read_text()

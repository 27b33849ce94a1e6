"""The committed results as the pages read them."""

import json
import pathlib

import pytest

from experiments.report import committed

RESULTS = sorted(
    path for path in pathlib.Path("experiments/results").glob("*.json") if path.stem != "headlines"
)


def row(domain, error, seed=0, method="rotation", role="reported", **more):
    identity = {"method": method, "seed": seed, "domain": domain, "split_role": role}
    return {**identity, "error": error, **more}


def test_errors_by_method_seed_and_domain():
    record = {
        "rows": [
            row("fog", 0.5),
            row("fog", 0.25, seed=1),
            row("snow", 0.5, method="joint"),
            row("spatter", 0.1, role="validation"),
        ]
    }
    assert committed.errors(record) == {
        "rotation": {0: {"fog": 50.0}, 1: {"fog": 25.0}},
        "joint": {0: {"snow": 50.0}},
    }
    assert committed.errors(record, role="validation") == {"rotation": {0: {"spatter": 10.0}}}


def test_two_rows_of_one_place_are_told_apart():
    record = {"rows": [row("fog", 0.5, training="joint"), row("fog", 0.2, training="source")]}
    with pytest.raises(ValueError, match="two rows are rotation, seed 0, fog; keep rows of one"):
        committed.errors(record)
    found = committed.errors(record, lambda one: one["training"] == "source")
    assert found == {"rotation": {0: {"fog": 20.0}}}


def test_means_changes_and_spreads():
    before, after = (
        {"clean": 1.0, "fog": 40.0, "snow": 20.0},
        {"clean": 9.0, "fog": 30.0, "snow": 15.0},
    )
    assert committed.mean(before) == 30.0
    assert committed.change(after, before) == -25.0
    assert committed.spread([2.0]) == "2.00"
    # Standard deviation 2 of three values.
    assert committed.spread([1.0, 3.0, 5.0], 1) == "3.0 ± 1.2"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_says_where_it_comes_from(path):
    record = json.loads(path.read_text())
    assert record["command"].startswith(
        tuple(f"python -m {p}." for p in ("experiments", "benchmarks", "tests")) + ("for ",)
    )
    rows = record["rows"] or record["private"]["rows"]
    assert record["device"] and record["device_count"] >= 1 and rows
    assert {"python", "jax", "optax"} <= set(record["versions"])
    assert len(record["commit"]) == 40
    for one in record["rows"]:
        assert "npz:" not in str(one.get("dataset"))

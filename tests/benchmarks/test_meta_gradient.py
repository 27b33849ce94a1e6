"""The benchmark of the outer gradient: ways agree, memory is counted, ratios are of its rows."""

import json

import ml_collections
import pytest

from benchmarks import meta_gradient
from experiments import launch

SETTINGS = {
    **{"ways": ("plain", "mixed"), "chunks": ("2", "6"), "width": 8, "depth": 2, "heads": 1},
    **{"vocabulary": 31, "window": 8, "chunk": 4, "rows": 1, "dtype": "float32", "repeats": 1},
    **{"time": True, "smoke": False},
}


def settings(**options):
    return ml_collections.ConfigDict(SETTINGS | options)


def test_ways_give_one_gradient_and_the_summary_is_of_the_rows(tmp_path, capsys):
    record = meta_gradient.run(str(tmp_path / "m.json"), settings(chunks=("4",)))
    assert json.loads((tmp_path / "m.json").read_text())["rows"] == record["rows"]
    plain, mixed = record["rows"]
    assert (plain["way"], mixed["way"]) == ("plain", "mixed")
    assert mixed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4) and mixed["loss"] > 0
    assert 0 < mixed["temporary_bytes"] < plain["temporary_bytes"]
    assert min(mixed["seconds"], mixed["compile_seconds"]) > 0
    printed = capsys.readouterr().out
    assert "meta_gradient_memory_ratio: 1.0" in printed


def row(way, chunks, size, **more):
    return {"way": way, "chunks": chunks, "temporary_bytes": size, **more}


def test_ratios():
    rows = [
        row("remat", 16, 40, seconds=1.0),
        row("remat", 64, 80, seconds=4.0),
        row("mixed", 16, 20, seconds=1.0),
        row("mixed", 64, 28, seconds=3.0),
    ]
    made = meta_gradient.summary(rows)
    assert made["memory_ratio"] == {"remat": 2.0, "mixed": 1.4}
    assert made["time_of_remat"] == {"mixed": 0.75}
    assert made["memory_of_remat"] == {"mixed": 0.35}
    assert made["meta_gradient_memory_ratio"] == 1.4
    failed = meta_gradient.summary([*rows[:3], row("mixed", 64, 28, message="no room")])
    assert failed["time_of_remat"] == {} and failed["memory_ratio"]["mixed"] == 1.4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ways": ("slow",)}, "unknown way 'slow'"),
        ({"chunks": ("many",)}, "--chunks takes positive integers; got 'many'"),
    ],
)
def test_options_that_are_refused(tmp_path, options, words):
    with pytest.raises(launch.UserError, match=words):
        meta_gradient.run(str(tmp_path / "m.json"), settings(**options))
    assert not list(tmp_path.iterdir())

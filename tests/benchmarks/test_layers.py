"""The benchmark of layers: rows of what ran and what did not, and a wrong one is never best."""

import json

import jax
import ml_collections
import pytest

from benchmarks import layers
from experiments import launch
from experiments.report import committed
from ttt_jax.kernels.ttt_linear import limits

SETTINGS = {
    "parts": ("kernels", "cudnn", "fla_chunk", "decode"),
    "works": ("long",),
    "configurations": ("one",),
    "spacings": ("4",),
    "lengths": ("16",),
    "checked_tokens": 48,
    "repeats": 1,
    "calls": 1,
    "smoke": True,
    "widths": ("16",),
}


def settings(**options):
    return ml_collections.ConfigDict(SETTINGS | options)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few = {"checked_tokens": 48, "repeats": 1, "calls": 1}
    monkeypatch.setattr(layers, "_SMOKE_SETTINGS", few)


def test_what_runs_is_timed_and_what_does_not_says_why(tmp_path, capsys):
    record = layers.run(str(tmp_path / "l.json"), settings())
    assert json.loads((tmp_path / "l.json").read_text())["rows"] == record["rows"]
    rows = {row["part"]: row for row in record["rows"]}
    kernels = rows["kernels"]
    assert set(kernels["errors"]) == {"forward", "out", *layers.layer.Operands._fields}
    assert 1e-4 < kernels["errors"]["out"] and kernels["right"]
    assert min(kernels[name] for name in ("forward_ms", "both_ms", "compile_seconds")) > 0
    assert rows["decode"]["step_ms"] > 0 and rows["decode"]["of_copy"] > 0
    # W, b and the sums of their gradients, and a position, of two heads.
    assert rows["decode"]["state_bytes"] == 2 * 4 * (2 * (16 * 16 + 16) + 1)
    if jax.default_backend() == "cpu":
        assert "cuDNN" in rows["cudnn"]["message"] and "Error" in rows["fla_chunk"]["message"]
    assert capsys.readouterr().out.count("\n") == len(record["rows"])


def test_a_wrong_configuration_is_never_best(tmp_path, monkeypatch):
    def timeless(function, operands, dout, settings):
        return {"forward_ms": times.pop(), "both_ms": 1.0, "compile_seconds": 0.0}

    def errors(function, *shape):
        return {"out": 0.5 if function.keywords["configuration"] == "parts" else 1e-3}

    times = [3.0, 1.0, 2.0]
    monkeypatch.setattr(layers, "both_times", timeless)
    monkeypatch.setattr(layers, "errors_of", errors)
    names = ("one", "parts", "shared")
    record = layers.run(
        str(tmp_path / "l.json"), settings(parts=("kernels",), configurations=names)
    )
    assert [row.get("right") for row in record["rows"][:3]] == [True, False, True]
    best = {name: row for row in record["rows"][3:] for name in row if name.endswith("_ms")}
    assert best["forward_ms"]["way"] == "one, spacing 4" and best["forward_ms"]["forward_ms"] == 2.0
    assert "parts" not in best["both_ms"]["way"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": ("torch",)}, "unknown part 'torch'"),
        ({"configurations": ("fast",)}, "unknown configuration 'fast'"),
        ({"widths": ("48",)}, "unknown width '48'; choose from 16, 32, 64, 128"),
        ({"lengths": ("1k",)}, "--lengths takes positive integers; got '1k'"),
        ({"spacings": ("0",)}, "--spacings takes positive integers; got '0'"),
    ],
)
def test_options_that_are_refused(tmp_path, options, words):
    with pytest.raises(launch.UserError, match=words):
        layers.run(str(tmp_path / "l.json"), settings(**options))
    assert not list(tmp_path.iterdir())


def test_auto_takes_the_sizes_that_the_record_has_as_right():
    rows = committed.read("bench_ttt_linear_shapes")["rows"]
    right = [row["way"].split() for row in rows if row.get("right")]
    assert {(int(width), int(chunk), dtype) for width, chunk, dtype in right} == limits.COMPARED
    assert all(
        max(errors.values()) <= layers.LIMIT
        for row in rows
        if row.get("right")
        for errors in row["errors"].values()
    )

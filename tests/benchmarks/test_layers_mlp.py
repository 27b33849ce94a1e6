"""The benchmark of TTT-MLP: what is right, what is timed, and a wrong kernel is marked."""

import json

import ml_collections
import pytest

from benchmarks import layers_mlp
from experiments import launch
from experiments.report import committed
from ttt_jax.kernels.ttt_mlp import limits

SETTINGS = {
    "parts": ("kernels", "xla", "shapes"),
    "works": ("long",),
    "warps": ("8",),
    "spacing": 2,
    "checked_tokens": 48,
    "repeats": 1,
    "calls": 1,
    "smoke": True,
}


def settings(**options):
    return ml_collections.ConfigDict(SETTINGS | options)


def test_rows_have_errors_and_times(tmp_path, capsys):
    path = tmp_path / "l.json"
    record = layers_mlp.run(str(path), settings())
    assert json.loads(path.read_text())["rows"] == record["rows"]
    kernels, xla, shape = record["rows"]
    names = ("forward", "out", "q", "k", "v", "gate", "scale", "gamma", "beta")
    names += ("first", "first_bias", "second", "second_bias")
    assert tuple(kernels["errors"]) == tuple(shape["errors"]) == names
    # The work is in bfloat16, the only shape of a smoke run in float32.
    assert 1e-4 < kernels["errors"]["out"] < layers_mlp.LIMIT
    assert shape["worst"] < 1e-5 and shape["right"] and kernels["right"]
    for row in (kernels, xla):
        assert min(row[name] for name in ("forward_ms", "both_ms", "compile_seconds")) > 0
    assert capsys.readouterr().out.count("\n") == 3


def test_a_wrong_kernel_is_marked(tmp_path, monkeypatch):
    right = layers_mlp.kernels
    monkeypatch.setattr(layers_mlp, "kernels", lambda *a, **k: 1.05 * right(*a, **k))
    record = layers_mlp.run(str(tmp_path / "l.json"), settings(parts=("shapes",)))
    (row,) = record["rows"]
    assert not row["right"] and row["errors"]["gamma"] == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("options", [{"warps": ("3",)}, {"parts": ("all",)}])
def test_options_that_are_refused(tmp_path, options):
    with pytest.raises(launch.UserError, match=r"3|all"):
        layers_mlp.run(str(tmp_path / "l.json"), settings(**options))


def test_auto_takes_the_sizes_that_the_record_has_as_right():
    rows = committed.read("bench_ttt_mlp_shapes")["rows"]
    right = {row["way"]: row for row in rows if row.get("right")}
    taken = {f"{width} {hidden} {dtype}" for width, hidden, _, dtype in limits.COMPARED}
    assert set(right) == taken and {chunk for _, _, chunk, _ in limits.COMPARED} == {16}
    assert all(max(row["errors"].values()) <= layers_mlp.LIMIT for row in right.values())


def test_the_configuration_that_calls_take_was_right_when_it_was_timed():
    rows = committed.read("bench_ttt_mlp")["rows"]
    warps = {tiles.warps for tiles in limits.CONFIGURATION[:2]}
    assert warps == {8}
    timed = [row for row in rows if row["way"] == "8 warps"]
    assert {row["work"] for row in timed} == {"long", "many"} and all(row["right"] for row in timed)

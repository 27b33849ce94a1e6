"""The benchmark of TTT-MLP: what is right, what is timed, and a wrong kernel is marked."""

import json

import ml_collections
import pytest

from benchmarks import layers_mlp
from experiments import launch

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

"""The benchmark of kernels: every kernel of every layer, other tiles beside, refusals."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from benchmarks import kernels
from experiments import launch
from ttt_jax.kernels.conv import patches, taps, tiles


def settings(**options):
    return ml_collections.ConfigDict({"dtypes": ("float32",), "tiles": (), "smoke": True} | options)


def test_all_kernels_and_other_tiles(tmp_path, capsys, monkeypatch):
    # One layer of either stride; `make smoke` times them all.
    monkeypatch.setattr(kernels, "LAYERS", kernels.LAYERS[:2])
    built = []
    for module in (taps, patches):
        for name in ("_forward_kernel", "_weight_gradient_kernel"):
            kernel = getattr(module, name)

            def spied(*refs, kernel=kernel, **sizes):
                built.append((kernel.__module__, sizes["chunk"], sizes.get("taps")))
                return kernel(*refs, **sizes)

            monkeypatch.setattr(module, name, spied)
    given = ("forward:16:16:1:patches:2:4:1:0", "weights:16:16:1:taps:2:8:3:1:2")
    record = kernels.run(str(tmp_path / "k.json"), settings(tiles=given))
    assert json.loads((tmp_path / "k.json").read_text())["rows"] == record["rows"]
    own = [row for row in record["rows"] if row["chosen"]]
    assert len(own) == 3 * len(kernels.LAYERS)
    assert all(row["ms"] > 0 and row["distance"] == 0 for row in own)
    others = [row for row in record["rows"] if not row["chosen"]]
    assert [(row["layer"], row["kernel"], row["tile"]) for row in others] == [
        ("16 to 16 at 32", "forward", "ForwardPatches(2, 4, 1, 0)"),
        ("16 to 16 at 32", "weights", "WeightTaps(2, 8, 3, 1, 2)"),
    ]
    assert all(row["distance"] < 1e-5 for row in others)
    assert {(patches.__name__, 4, None), (taps.__name__, 8, 3)} <= set(built)
    assert capsys.readouterr().out.count(" ms") == len(record["rows"])


def test_what_is_timed_is_written_and_a_tile_that_fails_is_named(tmp_path, capsys, monkeypatch):
    path, real, calls = tmp_path / "k.json", kernels.measure, []
    monkeypatch.setattr(kernels, "call", lambda *_: lambda operands: operands.x)

    def breaking(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of resource: shared memory")
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(kernels, "measure", breaking)
    with pytest.raises(KeyboardInterrupt):
        kernels.run(str(path), settings(tiles=("forward:16:16:1:patches:2:4:1:0",)))
    record = json.loads(path.read_text())
    assert [(row["kernel"], row["chosen"]) for row in record["rows"]] == [
        ("forward", True),
        ("input", True),
    ]
    [failed] = record["failed"]
    assert (failed["kernel"], failed["tile"]) == ("forward", "ForwardPatches(2, 4, 1, 0)")
    assert "shared memory" in failed["message"]
    assert "failed: out of resource: shared memory" in capsys.readouterr().out


def test_the_modules_own_tile():
    layer = kernels.Layer(32, 16, 16, 1)
    for kernel, field in (("forward", "forward"), ("weights", "weight_gradient")):
        due = getattr(tiles.TIMED[16, 16, 1, 2], field)
        assert kernels.own(kernel, layer, jnp.bfloat16) == due


def test_operands_are_normalized():
    layer = kernels.Layer(4, 16, 16, 1)
    o = kernels.operands(jax.random.key(0), layer, 2, 3, jnp.float32)
    a, b = o.affine[:2]
    normal = (a[:, :, None] * o.x + b[:, :, None]) / o.gamma[:, None, None]
    grouped = normal.reshape(2, 3, 16, kernels.GROUPS, 2)
    np.testing.assert_allclose(grouped.mean((2, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(grouped.var((2, 4)), 1, rtol=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "backward:16:16:1:taps:8:1:0",
        "forward:16:24:1:taps:8:1:0",
        "forward:16:16:2:taps:8:1:0",
        "forward:16:16:1:rows:8:1:0",
        "forward:16:16:1:taps:8:1",
        "forward:16:16:1:taps:100:2:0",
        "forward:16:16:1:taps:0:1:0",
        "forward:16:16:1:patches:4:64:4:1",
        "forward:16:16:1:patches:2:64:4:-1",
        "weights:x",
        "weights:16:16:1:taps:2:8:4:1:3",
        "weights:16:32:2:patches:2:8:12:4:3",
    ],
)
def test_tiles_that_there_are_not(tmp_path, text):
    with pytest.raises(launch.UserError, match=f"a tile is KERNEL:CHANNELS.*got '{text}'"):
        kernels.run(str(tmp_path / "k.json"), settings(tiles=(text,)))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="here is a GPU")
def test_without_a_gpu(tmp_path):
    with pytest.raises(launch.UserError, match="for a GPU, and this is cpu; --smoke interprets"):
        kernels.run(str(tmp_path / "k.json"), settings(smoke=False))
    with pytest.raises(launch.UserError, match="unknown dtype 'float16'"):
        kernels.run(str(tmp_path / "k.json"), settings(dtypes=("float16",)))


def test_a_file_that_is_there_is_kept(tmp_path):
    (tmp_path / "k.json").write_text("measured")
    with pytest.raises(launch.UserError, match=r"k\.json exists and is not replaced; remove it or"):
        kernels.run(str(tmp_path / "k.json"), settings())
    assert (tmp_path / "k.json").read_text() == "measured"

"""The benchmark: its rows, its count of FLOP, and what it refuses."""

import json
import types

import ml_collections
import pytest

from experiments import bench, launch

FIELDS = (
    "work way compute_dtype param_dtype precision num_steps copies samples "
    "sample_steps_per_second tflops peak_gib compile_seconds"
).split()


def settings(**changed):
    values = {
        "works": ("rotation_norm_only",),
        "ways": ("ttt_jax",),
        "samples": 2,
        "max_samples": 2,
        "torch_num_steps": (1,),
        "repeats": 3,
        "smoke": True,
    }
    return ml_collections.ConfigDict(values | changed)


def test_a_smoke_run_writes_its_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "util", types.SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # put back afterwards
    path = tmp_path / "out" / "bench.json"
    record = bench.run(path, settings(ways=bench.WAYS))
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    assert {"command", "device", "device_count", "versions", "commit", "started"} <= set(record)
    (row,) = record["rows"]
    assert list(row) == FIELDS
    assert (row["work"], row["way"]) == ("rotation_norm_only", "ttt_jax")
    assert (row["compute_dtype"], row["param_dtype"]) == ("bfloat16", "float32")
    assert row["precision"] == "bf16"
    assert (row["num_steps"], row["copies"], row["samples"]) == (1, 2, 2)
    seconds = row["samples"] / row["sample_steps_per_second"]
    # 2 copies x 2 passes and 1 prediction, of 2 samples.
    flop = 2 * 5 * bench.forward_flop(bench.SMOKE)
    assert row["tflops"] == pytest.approx(flop / seconds / 1e12)
    assert row["peak_gib"] > 0 and row["compile_seconds"] > 0
    printed = capsys.readouterr().out
    assert "PyTorch is not installed, so its rows are skipped." in printed
    assert printed.count("rotation_norm_only") == 2


def test_flop_by_hand():
    sizes = bench.Sizes(depth=8, width=2, groups=2, image_size=8, copies=3)
    # Multiply-adds: stem 3 -> 2 and two convolutions 2 -> 2 on 8 x 8; 2 -> 4 and 4 -> 4 on 4 x 4;
    # 4 -> 8 and 8 -> 8 on 2 x 2; 8 -> 10.
    stem, first = 9 * 6 * 64, 2 * 9 * 4 * 64
    second, third = 9 * (8 + 16) * 16, 9 * (32 + 64) * 4
    assert bench.forward_flop(sizes) == 2 * (stem + first + second + third + 80) == 30_112
    assert bench.useful_flop(sizes, "rotation", 10) == 30_112 * (3 * 3 * 10 + 1)
    assert bench.forward_flop(bench.Sizes()) == 109_413_632


def test_pytorch_comes_first_and_with_fewer_samples():
    sizes = {"samples": 512, "max_samples": 128, "smoke": False}
    made = bench.cases(settings(ways=bench.WAYS, works=("rotation",), **sizes))
    assert [(case.way, case.num_steps, case.samples) for case in made] == [
        *[("torch_loop", 1, 32)] * 2,
        *[("torch_func_vmap", 1, 128)] * 2,
        *[("ttt_jax", 1, 512), ("ttt_jax", 10, 512)] * 2,
    ]


def test_the_table_compares_equal_work():
    def row(way, steps, speed):
        same = {"work": "rotation", "compute_dtype": "float32", "tflops": 1.0}
        return same | {"way": way, "num_steps": steps, "sample_steps_per_second": speed}

    rows = [row("torch_loop", 1, 2.0), row("ttt_jax", 1, 9.0), row("ttt_jax", 10, 8.0)]
    lines = bench.table(rows).splitlines()
    assert lines[2].split()[-2:] == ["-", "4.50"]
    assert lines[3].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"works": ("rotaton",)},
            "unknown work 'rotaton'; choose from rotation, rotation_norm_only.",
        ),
        (
            {"ways": ("torch",)},
            "unknown way 'torch'; choose from ttt_jax, torch_loop, torch_func_vmap.",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices(tmp_path, changed, message):
    with pytest.raises(launch.UserError) as refused:
        bench.run(tmp_path / "bench.json", settings(**changed))
    assert str(refused.value) == message
    assert not list(tmp_path.iterdir())

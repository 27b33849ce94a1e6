"""The benchmark: its rows, its count of FLOP, and what it refuses."""

import contextlib
import io
import json
import math
import pathlib
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
import pytest

import ttt_jax as ttt
from benchmarks import vision, works
from experiments import launch

FIELDS = (
    "work way compute_dtype attention num_steps copies batch samples devices param_dtype precision "
    "compiler_options sample_steps_per_second tflops matmul_share peak_gib compile_seconds"
).split()


def settings(**changed):
    values = {
        "works": ("ttt_mae",),
        "ways": ("ttt_jax",),
        "dtypes": (),
        "num_steps": (),
        "samples": (),
        "devices": (1,),
        "attention": ("fused",),
        "compiler_options": (),
        "repeats": 3,
        "trace": "",
        "smoke": True,
    }
    return ml_collections.ConfigDict(values | changed)


def restore_environment(monkeypatch):
    """Puts back afterwards what a run sets."""
    for name, value in (("PREALLOCATE", "false"), ("MEM_FRACTION", "0.95")):
        monkeypatch.setenv(f"XLA_PYTHON_CLIENT_{name}", value)


class SmokeRun(NamedTuple):
    """A run on a CPU: the work, its file, the record, what was printed, the meshes."""

    work: works.Work
    path: pathlib.Path
    record: dict[str, Any]
    lines: list[str]
    meshes: list[Any]


def run_smoke(path, work, **changed):
    """One work of one step, which has no loop to compile, without PyTorch."""
    over, meshes, printed = works.Program.over, [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        restore_environment(patch)
        patch.setattr(vision, "util", types.SimpleNamespace(find_spec=lambda name: None))
        patch.setitem(vision.WORKS, "ttt_mae", work._replace(num_steps=(1,)))
        patch.setattr(
            works.Program, "over", lambda self, mesh: meshes.append(mesh) or over(self, mesh)
        )
        record = vision.run(path, settings(ways=vision.WAYS, **changed))
    return SmokeRun(work, path, record, printed.getvalue().splitlines(), meshes)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("smoke") / "out" / "bench.json"
    return run_smoke(path, vision.WORKS["ttt_mae"])


def test_a_smoke_run_writes_its_rows(smoke_run):
    record = smoke_run.record
    assert json.loads(smoke_run.path.read_text()) == json.loads(json.dumps(record))
    assert {"command", "device", "device_count", "versions", "commit", "started"} <= set(record)
    row = record["rows"][0]
    assert list(row) == FIELDS
    assert (row["work"], row["way"]) == ("ttt_mae", "ttt_jax")
    assert (row["compute_dtype"], row["param_dtype"]) == ("bfloat16", "float32")
    # There are no fused kernels on a CPU, and the row says so.
    assert (row["precision"], row["attention"]) == ("bf16", "xla")
    assert row["compiler_options"] == {}
    assert (row["num_steps"], row["copies"], row["batch"], row["samples"]) == (1, 2, 1, 2)
    seconds = row["samples"] / row["sample_steps_per_second"]
    flop = 2 * works.mae_flop(smoke_run.work.smoke, 1)
    assert row["tflops"] == pytest.approx(flop / seconds / 1e12)
    rate = record["matmul"]["tflops"]["bfloat16"]
    assert row["matmul_share"] == pytest.approx(row["tflops"] / rate)
    assert row["peak_gib"] > 0 and row["compile_seconds"] > 0
    assert "torch_loop is skipped: torch not installed." in smoke_run.lines
    assert (
        "torch_ttt is skipped: torch, torch_ttt, torchvision, einops not installed."
        in smoke_run.lines
    )
    # Each row has a line when it is measured, and one in the table.
    printed = [line for line in smoke_run.lines if line.startswith("ttt_mae")]
    assert len(printed) == 2 * len(record["rows"])


def linear(sizes, dtype, num_steps):
    """A program of a work that compiles at once: entropy of a linear model."""

    def apply(params, images):
        return images.reshape(len(images), -1).astype(dtype) @ params.astype(dtype)

    shape = (sizes.image_size, sizes.image_size, 3)
    adapter = ttt.gradient_adapter(
        ttt.losses.entropy(apply), optax.sgd(0.1), select=ttt.select.everything()
    )
    predict = ttt.episodic(adapter, ttt.unbatched(apply), num_steps=num_steps)
    return works.Program(predict, lambda key: jnp.ones((math.prod(shape), 4)), shape)


@pytest.mark.cpu
def test_several_devices_have_as_many_images_each(tmp_path):
    work = vision.WORKS["ttt_mae"]._replace(program=linear)
    smoke_run = run_smoke(tmp_path / "bench.json", work, devices=(1, 2))
    one, two = smoke_run.record["rows"]
    assert [(row["devices"], row["samples"]) for row in (one, two)] == [(1, 2), (2, 4)]
    assert [mesh and mesh.size for mesh in smoke_run.meshes] == [None, 2]
    assert two["matmul_share"] / two["tflops"] == pytest.approx(
        one["matmul_share"] / one["tflops"] / 2
    )
    gain = two["sample_steps_per_second"] / one["sample_steps_per_second"]
    printed = [line for line in smoke_run.lines if line.startswith("ttt_mae")]
    assert [line.split()[8] for line in printed[-2:]] == ["-", f"{gain:.2f}"]
    assert "devices=2" in printed[1] and "devices" not in printed[0]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ((0,), r"--devices takes numbers of at least 1; got \[0\]"),
        ((), r"--devices takes numbers of at least 1; got \[\]"),
        ((1, 99), r"--devices must lie between 0 \(all\) and \d+, .*; got 99"),
    ],
)
def test_impossible_devices(tmp_path, monkeypatch, devices, message):
    restore_environment(monkeypatch)
    with pytest.raises(launch.UserError, match=message):
        vision.run(tmp_path / "bench.json", settings(devices=devices))
    assert not list(tmp_path.iterdir())


def test_options_of_the_compiler():
    pairs = ("xla_llvm_disable_expensive_passes=true", "xla_dump_to=/tmp", "a=b=c", "n=3")
    assert vision.compiler_options(pairs) == {
        "xla_llvm_disable_expensive_passes": True,
        "xla_dump_to": "/tmp",
        "a": "b=c",
        "n": "3",
    }
    for wrong in ("name", "=value", "name="):
        with pytest.raises(launch.UserError, match=f"takes name=value; got '{wrong}'"):
            vision.compiler_options([wrong])


def test_flop_of_the_resnet_by_hand():
    sizes = works.ResNetSizes(depth=8, width=2, groups=2, image_size=8, copies=3)
    # Multiply-adds: stem 3 -> 2 and two convolutions 2 -> 2 on 8 x 8; 2 -> 4 and 4 -> 4 on 4 x 4;
    # 4 -> 8 and 8 -> 8 on 2 x 2; 8 -> 10.
    stem, first = 9 * 6 * 64, 2 * 9 * 4 * 64
    second, third = 9 * (8 + 16) * 16, 9 * (32 + 64) * 4
    forward = works.resnet_forward_flop(sizes)
    assert forward == 2 * (stem + first + second + third + 80) == 30_112
    assert vision.WORKS["rotation"].flop(sizes, 10) == 30_112 * (3 * 3 * 10 + 1)
    assert vision.WORKS["rotation_norm_only"].flop(sizes, 1) == 30_112 * (3 * 2 + 1)
    assert works.resnet_forward_flop(works.ResNetSizes()) == 109_413_632
    # Of a batch every image is one copy: two passes and a prediction.
    assert vision.WORKS["tent_batch"].flop(sizes._replace(copies=1, batch=8), 1) == 30_112 * 3


SMALL = works.ViTSizes(8, 4, 4, 1, 1, 8, 1, 1, classes=3, copies=5)


def test_flop_of_masked_autoencoding_by_hand():
    # Multiply-adds of one mask: 1 of 4 tokens is visible, a patch has 48 values.
    embedding, encoder = 48 * 4, 12 * 16 + 2 * 4
    decoder = 4 * 8 + 12 * 64 * 4 + 8 * 48 * 3
    mixing = 2 * 8 * 4 * 4
    step = 5 * (2 * embedding + 3 * encoder + 2 * decoder + 3 * mixing)
    prediction = 48 * 4 * 4 + 12 * 16 * 4 + 2 * 4 * 4 * 4 + 4 * 3
    assert works.mae_flop(SMALL, 2) == 2 * (2 * step + prediction) == 208_632
    # 128 masks of ViT-B/16: six TFLOP a step.
    sizes = works.ViTSizes()
    assert (sizes.tokens, sizes.visible) == (196, 49)
    step = works.mae_flop(sizes, 1) - works.mae_flop(sizes, 0)
    assert step == pytest.approx(6.05e12, rel=1e-2)


def product_flop(jaxpr):
    """FLOP of all matrix products of a traced function."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            terms = math.prod(left[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * terms
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += repeats * sum(product_flop(j) for j in inner if hasattr(j, "eqns"))
    return total


def test_flop_of_masked_autoencoding_are_those_of_the_traced_program():
    sizes = SMALL._replace(depth=2, decoder_depth=2, width=8, heads=2, decoder_heads=2)
    program = works.mae(sizes, "bfloat16", 3)
    params = jax.eval_shape(program.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *program.shape), jnp.float32)
    traced = jax.make_jaxpr(program.predict)(params, images, jax.random.split(jax.random.key(0), 1))
    # The model also predicts the visible patches, forward and backward; no one needs them.
    wasted = 3 * sizes.copies * 2 * 2 * 8 * 48 * sizes.visible
    assert product_flop(traced.jaxpr) == works.mae_flop(sizes, 3) + wasted


def test_pytorch_comes_first_and_with_fewer_samples():
    made = vision.cases(settings(ways=vision.WAYS, works=("rotation",), smoke=False))
    assert [(case.way, case.num_steps, case.samples) for case in made] == [
        *[("torch_loop", 1, 32), ("torch_loop", 10, 32)] * 2,
        *[("torch_func_vmap", 1, 128), ("torch_func_vmap", 10, 128)] * 2,
        *[("ttt_jax", 1, 512), ("ttt_jax", 10, 512)] * 2,
    ]


def test_dtypes_and_steps_can_be_left_out(tmp_path):
    made = vision.cases(
        settings(works=("rotation",), dtypes=("bfloat16",), num_steps=(10,), smoke=False)
    )
    assert [(case.dtype, case.num_steps) for case in made] == [("bfloat16", 10)]
    with pytest.raises(launch.UserError, match=r"no work has dtypes \['float8'\] and num_steps"):
        vision.run(tmp_path / "bench.json", settings(dtypes=("float8",)))


def test_samples_and_forms_of_attention_are_tried_in_turn():
    tried = {"samples": (1, 4), "attention": ("fused", "xla"), "smoke": False}
    made = vision.cases(settings(ways=("ttt_jax", "torch_loop"), works=("ttt_mae",), **tried))
    assert [(case.way, case.samples, case.sizes.attention) for case in made] == [
        ("torch_loop", 1, "fused"),
        *[("ttt_jax", count, form) for count in (1, 4) for form in ("fused", "xla")],
    ]


def test_the_package_is_timed_on_whole_batches_only():
    made = vision.cases(settings(ways=vision.WAYS, works=tuple(vision.WORKS), smoke=False))
    theirs = [case for case in made if case.way == "torch_ttt"]
    assert [(case.work, case.samples, case.sizes.batch) for case in theirs] == [
        ("tent_batch", 1024, 128)
    ]


def test_the_table_compares_equal_work():
    def row(way, steps, speed):
        same = {"work": "rotation", "compute_dtype": "float32", "samples": 2, "attention": None}
        same |= {"devices": 1}
        same |= {"tflops": 1.0, "matmul_share": 0.4}
        return same | {"way": way, "num_steps": steps, "sample_steps_per_second": speed}

    rows = [row("torch_loop", 1, 2.0), row("ttt_jax", 1, 9.0), row("ttt_jax", 10, 8.0)]
    lines = vision.table(rows).splitlines()
    assert lines[2].split()[-5:] == ["40.0", "%", "-", "4.50", "-"]
    assert lines[3].split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"works": ("rotaton",)},
            "unknown work 'rotaton'; choose from ttt_mae, rotation, "
            "rotation_norm_only, tent_batch.",
        ),
        (
            {"ways": ("torch",)},
            "unknown way 'torch'; choose from ttt_jax, torch_loop, torch_func_vmap, torch_ttt.",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices(tmp_path, changed, message):
    with pytest.raises(launch.UserError) as refused:
        vision.run(tmp_path / "bench.json", settings(**changed))
    assert str(refused.value) == message
    assert not list(tmp_path.iterdir())

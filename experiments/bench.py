"""How fast is Vision test-time training, beside PyTorch, in one run on one device?

``python -m experiments.bench --out=bench.json`` times per-sample copies of a ResNet-26 that take
rotation steps on 32 augmented copies of their image and then classify it. Compilation is apart,
one call warms up, and a row holds the median of the timed calls.
"""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags

import ttt_jax as ttt
from experiments import augment, launch
from ttt_jax import losses, models

WAYS = ("ttt_jax", "torch_loop", "torch_func_vmap")
LEARNING_RATE = 1e-3
PADDING = 4
CLASSES = 10
TORCH_LOOP_SAMPLES = 32


class Work(NamedTuple):
    """What is computed per sample, and the passes through the model that one step needs."""

    norm_only: bool
    dtypes: tuple[str, ...]
    num_steps: tuple[int, ...]
    passes: int


# A step is a forward pass, the gradient of the activations and that of the kernels; the last is
# not needed where kernels stay.
WORKS = {
    "rotation": Work(False, ("bfloat16", "float32"), (1, 10), 3),
    "rotation_norm_only": Work(True, ("bfloat16",), (1,), 2),
}


class Sizes(NamedTuple):
    """The network, its square RGB images and the augmented copies per step."""

    depth: int = 26
    width: int = 16
    groups: int = 8
    image_size: int = 32
    copies: int = 32


SMOKE = Sizes(depth=8, image_size=16, copies=2)


class Case(NamedTuple):
    """One row to be."""

    work: str
    way: str
    dtype: str
    num_steps: int
    samples: int


class Timing(NamedTuple):
    """Median seconds of a call, seconds of compilation, peak memory; None where unknown."""

    seconds: float
    compile_seconds: float | None
    peak_bytes: int | None
    precision: str


def forward_flop(sizes: Sizes) -> int:
    """FLOP of one image's forward pass: 2 per multiply-add of convolutions and dense layer.

    Padded pixels count, as is usual; normalization, activations and shortcuts do not.
    """
    side, channels = sizes.image_size, sizes.width
    total = 9 * 3 * channels * side**2
    for stride, features in ((1, sizes.width), (2, 2 * sizes.width), (2, 4 * sizes.width)):
        side //= stride
        convolutions = 2 * (sizes.depth - 2) // 6
        total += 9 * (channels + (convolutions - 1) * features) * features * side**2
        channels = features
    return 2 * (total + channels * CLASSES)


def useful_flop(sizes: Sizes, work: str, num_steps: int) -> int:
    """FLOP per sample that no implementation can leave out: the steps and one prediction."""
    return forward_flop(sizes) * (sizes.copies * WORKS[work].passes * num_steps + 1)


def chosen(kind: str, names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The names, or a :class:`launch.UserError` that lists the choices."""
    names, known = tuple(names), tuple(known)
    for name in names or ("",):
        if name not in known:
            raise launch.UserError(f"unknown {kind} {name!r}; choose from {', '.join(known)}.")
    return names


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call that returns when the device is done, after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def predictor(sizes: Sizes, case: Case) -> tuple[Callable[..., Any], models.ResNet]:
    """The batched predictor of a case and its module."""
    module = models.ResNet(
        depth=sizes.depth, width=sizes.width, groups=sizes.groups, dtype=jnp.dtype(case.dtype)
    )
    aux = losses.rotation(
        models.from_linen(module, "rotation"), copies=sizes.copies, augment=augment.shift(PADDING)
    )
    norm_only = WORKS[case.work].norm_only
    select = ttt.select.norm_affine() if norm_only else ttt.select.everything()
    adapter = ttt.gradient_adapter(aux, optax.sgd(LEARNING_RATE), select=select)
    classify = ttt.unbatched(models.from_linen(module))
    episodic = ttt.episodic(adapter, classify, num_steps=case.num_steps)
    return ttt.batched(episodic, chunk_size=None), module


def jax_precision(dtype: str) -> str:
    """What multiplies: ``bf16``; for float32 ``tf32`` on a GPU unless jax is told otherwise."""
    if dtype == "bfloat16":
        return "bf16"
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return "ieee" if exact or jax.default_backend() != "gpu" else "tf32"


def time_jax(sizes: Sizes, case: Case, repeats: int) -> Timing:
    """Times the library."""
    predict, module = predictor(sizes, case)
    shape = (sizes.image_size, sizes.image_size, 3)
    params = jax.jit(lambda key: models.init(module, key, shape))(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (case.samples, *shape))
    keys = ttt.sample_keys(jax.random.key(2), jnp.arange(case.samples))
    start = time.perf_counter()
    compiled = jax.jit(predict).lower(params, images, keys).compile()
    compile_seconds = time.perf_counter() - start
    _, info = compiled(params, images, keys)
    if not bool(info.ok.all()):
        raise RuntimeError("an inner step was not finite.")
    seconds = median_seconds(lambda: jax.block_until_ready(compiled(params, images, keys)), repeats)
    memory = compiled.memory_analysis()
    peak = memory and (
        memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    )
    return Timing(seconds, compile_seconds, peak, jax_precision(case.dtype))


def measure(sizes: Sizes, case: Case, repeats: int) -> dict[str, Any]:
    """The row of a case."""
    if case.way == "ttt_jax":
        timing = time_jax(sizes, case, repeats)
    else:
        from experiments import bench_torch

        timing = Timing(
            *bench_torch.measure(
                case.way,
                sizes,
                dtype=case.dtype,
                num_steps=case.num_steps,
                samples=case.samples,
                norm_only=WORKS[case.work].norm_only,
                clock=lambda call: median_seconds(call, repeats),
            )
        )
    flop = useful_flop(sizes, case.work, case.num_steps) * case.samples
    return {
        "work": case.work,
        "way": case.way,
        "compute_dtype": case.dtype,
        "param_dtype": "float32",
        "precision": timing.precision,
        "num_steps": case.num_steps,
        "copies": sizes.copies,
        "samples": case.samples,
        "sample_steps_per_second": case.samples * case.num_steps / timing.seconds,
        "tflops": flop / timing.seconds / 1e12,
        "peak_gib": None if timing.peak_bytes is None else timing.peak_bytes / 2**30,
        "compile_seconds": timing.compile_seconds,
    }


def cases(settings: ml_collections.ConfigDict) -> list[Case]:
    """The rows to measure; PyTorch first, since jax keeps the device memory it once took."""
    of_way = {
        "ttt_jax": settings.samples,
        "torch_loop": min(settings.samples, TORCH_LOOP_SAMPLES),
        "torch_func_vmap": min(settings.samples, settings.max_samples),
    }
    return [
        Case(work, way, dtype, num_steps, of_way[way])
        for way in sorted(settings.ways, key=lambda way: way == "ttt_jax")
        for work in settings.works
        for dtype in WORKS[work].dtypes
        for num_steps in WORKS[work].num_steps[: 1 if settings.smoke else None]
        if way == "ttt_jax" or num_steps in settings.torch_num_steps
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row, with its speed over that of each PyTorch way on the same work."""
    same = ("work", "compute_dtype", "num_steps")
    speed = {(row["way"], *(row[k] for k in same)): row["sample_steps_per_second"] for row in rows}
    layout = "{:19} {:16} {:9} {:>5} {:>12} {:>7} {:>6} {:>6}"
    head = ("work", "way", "dtype", "steps", "steps/s", "TFLOP/s", "/vmap", "/loop")
    lines = [layout.format(*head)]
    for row in rows:
        here, ratios = row["sample_steps_per_second"], []
        for way in ("torch_func_vmap", "torch_loop"):
            there = speed.get((way, *(row[k] for k in same)))
            ratios.append(f"{here / there:.2f}" if there else "-")
        names = (row["work"], row["way"], row["compute_dtype"], row["num_steps"])
        lines.append(layout.format(*names, f"{here:.1f}", f"{row['tflops']:.2f}", *ratios))
    return "\n".join(lines)


def run(out: str | os.PathLike[str], settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Measures every case and rewrites ``out`` after each.

    Args:
      out: the JSON file.
      settings: ``works``, ``ways``, ``samples``, ``max_samples``, ``torch_num_steps``,
        ``repeats`` and ``smoke``, as the flags of the same names.

    Raises:
      launch.UserError: an unknown work or way, or a file that cannot be written.
    """
    chosen("work", settings.works, WORKS)
    chosen("way", settings.ways, WAYS)
    path, sizes = pathlib.Path(out), SMOKE if settings.smoke else Sizes()
    launch.open_workdir(str(path.parent))
    with settings.unlocked():
        if settings.smoke:
            settings.samples = min(settings.samples, 2)
        if any(way != "ttt_jax" for way in settings.ways) and util.find_spec("torch") is None:
            print("PyTorch is not installed, so its rows are skipped.")
            settings.ways = tuple(way for way in settings.ways if way == "ttt_jax")
    # Both libraries share the device: jax must not reserve most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    record = {**launch.provenance(settings), "rows": [], "failed": []}
    if util.find_spec("torch") is not None:
        record["versions"]["torch"] = launch.metadata.version("torch")
    for case in cases(settings):
        name = " ".join(map(str, case[:3])) + f" steps={case.num_steps} samples={case.samples}"
        try:
            row = measure(sizes, case, settings.repeats)
        except RuntimeError as error:  # out of memory, in both libraries
            record["failed"].append({**case._asdict(), "message": str(error)[:500]})
            print(f"{name}: failed: {str(error).splitlines()[0][:200]}", flush=True)
        else:
            record["rows"].append(row)
            speed = f"{row['sample_steps_per_second']:.1f} sample-steps/s"
            print(f"{name}: {speed}, {row['tflops']:.2f} TFLOP/s", flush=True)
        launch.write_atomically(path, json.dumps(record, indent=2) + "\n")
    print(table(record["rows"]))
    return record


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    values = {name: holder.value for name, holder in _FLAGS.items()}
    out = values.pop("out")
    try:
        values["torch_num_steps"] = tuple(map(int, values["torch_num_steps"]))
    except ValueError as error:
        raise launch.UserError(f"--torch_num_steps takes integers: {error}.") from error
    for name in ("works", "ways"):
        values[name] = tuple(values[name])
    return 1 if run(out, ml_collections.ConfigDict(values))["failed"] else 0


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "works": flags.DEFINE_list("works", list(WORKS), "Which works."),
        "ways": flags.DEFINE_list("ways", list(WAYS), "Which ways."),
        "samples": flags.DEFINE_integer("samples", 512, "Samples of ttt_jax.", 1),
        "max_samples": flags.DEFINE_integer("max_samples", 128, "Most for torch_func_vmap.", 1),
        "torch_num_steps": flags.DEFINE_list(
            "torch_num_steps", ["1"], "Steps PyTorch is timed at."
        ),
        "repeats": flags.DEFINE_integer("repeats", 3, "Timed calls per row.", 3),
        "smoke": flags.DEFINE_bool("smoke", False, "A tiny network, for a CPU in a minute."),
    }
    flags.mark_flag_as_required("out")
    launch.run(main)

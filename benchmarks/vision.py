"""How fast is Vision test-time training, beside PyTorch, in one run on one device or on several?

``python -m benchmarks.vision --out=runs/bench.json`` times the works of
:mod:`benchmarks.works`: copies of a network that adapt to their image, or to a batch, and
then classify it. Compilation is apart, one call warms up, and a row holds the median of the timed
calls. The device's rate on large square matrix products, measured once per file, stands beside.
``--devices=1,2`` times ``ttt_jax`` on so many devices of this machine, with as many images on each.

Each row is written as soon as it is measured. The same command again, or one that asks for other
rows, goes on: rows of the file are kept and skipped, failed ones run again. Another commit, device,
version or way of measuring is refused.
"""

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
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

import ttt_jax as ttt
from benchmarks import options, record as record_lib, trace as trace_lib
from benchmarks.works import WORKS, ViTSizes
from experiments import adapt, launch, provenance
from ttt_jax.kernels import attention as attention_lib

WAYS = ("ttt_jax", "torch_loop", "torch_func_vmap", "torch_ttt")
# What a way imports, and the package whose version the record holds.
NEEDS = {
    "torch_loop": ("torch",),
    "torch_func_vmap": ("torch",),
    "torch_ttt": ("torch", "torch_ttt", "torchvision", "einops"),
}
PACKAGES = {"torch": "torch", "torch_ttt": "torch-ttt"}
MATMUL_SIZE, MATMUL_REPEATS = 8192, 10


class Case(NamedTuple):
    """One row to be."""

    work: str
    way: str
    dtype: str
    num_steps: int
    samples: int
    sizes: Any
    devices: int = 1


class Timing(NamedTuple):
    """Median seconds of a call, seconds of compilation, peak memory; None where unknown."""

    seconds: float
    compile_seconds: float | None
    peak_bytes: int | None
    precision: str


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call that returns when the device is done, after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def jax_precision(dtype: str) -> str:
    """What multiplies: ``bf16``; for float32 ``tf32`` on a GPU unless jax is told otherwise."""
    if dtype == "bfloat16":
        return "bf16"
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return "ieee" if exact or jax.default_backend() != "gpu" else "tf32"


def matmul_rate(size: int, dtype: str, repeats: int) -> float:
    """TFLOP/s of square matrix products of random numbers, each of the result of the last."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)

    @jax.jit
    def chain(left: jax.Array, right: jax.Array) -> jax.Array:
        left = left / jnp.sqrt(size).astype(dtype)  # keeps the results' size
        return jax.lax.fori_loop(0, MATMUL_REPEATS, lambda _, x: left @ x, right)

    seconds = median_seconds(lambda: jax.block_until_ready(chain(left, right)), repeats)
    return 2 * size**3 * MATMUL_REPEATS / seconds / 1e12


def compiler_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``name=value`` pairs as XLA takes them.

    Raises:
      launch.UserError: a pair without a name or a value.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise launch.UserError(f"--compiler_options takes name=value; got {pair!r}.")
        options[name] = {"true": True, "false": False}.get(value, value)
    return options


def time_jax(case: Case, repeats: int, options: dict[str, Any], trace: str) -> Timing:
    """Times the library, compiled with options of XLA; then one more call may be traced."""
    program = WORKS[case.work].program(case.sizes, case.dtype, case.num_steps)
    mesh = adapt.mesh_of(case.devices)
    copied = split = None
    if mesh is not None:
        copied, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    params = jax.device_put(jax.jit(program.init)(jax.random.key(0)), copied)
    count = case.samples // case.sizes.batch
    images = jax.random.uniform(jax.random.key(1), (count, *program.shape))
    keys = ttt.sample_keys(jax.random.key(2), jnp.arange(count))
    images, keys = jax.device_put((images, keys), split)
    start = time.perf_counter()
    predict = program.over(mesh)
    compiled = jax.jit(predict).lower(params, images, keys).compile(options)
    compile_seconds = time.perf_counter() - start
    _, info = compiled(params, images, keys)
    if not bool(info.ok.all()):
        raise RuntimeError("an inner step was not finite.")
    seconds = median_seconds(lambda: jax.block_until_ready(compiled(params, images, keys)), repeats)
    if trace:
        print(trace_lib.table(trace_lib.trace(lambda: compiled(params, images, keys), trace)))
    memory = compiled.memory_analysis()
    peak = memory and (
        memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    )
    return Timing(seconds, compile_seconds, peak, jax_precision(case.dtype))


def identity(case: Case) -> dict[str, Any]:
    """The fields that tell the row of a case from the others of a file."""
    attention = getattr(case.sizes, "attention", None)
    if attention and case.way == "ttt_jax":
        attention = attention_lib.form_of(attention, case.dtype)
    elif attention:
        from benchmarks import torch_peers

        attention = torch_peers.ATTENTION[case.way]
    same = (case.num_steps, case.sizes.copies, case.sizes.batch, case.samples, case.devices)
    values = (case.work, case.way, case.dtype, attention, *same)
    return dict(zip(record_lib.KEY, values, strict=True))


def measure(
    case: Case, settings: ml_collections.ConfigDict, rates: dict[str, float]
) -> dict[str, Any]:
    """The row of a case; ``rates`` holds the matmul rate of each dtype in TFLOP/s."""
    options: dict[str, Any] = {}
    if case.way == "ttt_jax":
        if jax.default_backend() == "gpu":
            options |= dict(WORKS[case.work].options)
        options |= compiler_options(settings.compiler_options)
        timing = time_jax(case, settings.repeats, options, settings.trace)
    else:
        from benchmarks import torch_peers

        timing = Timing(
            *torch_peers.measure(case, lambda call: median_seconds(call, settings.repeats))
        )
    flop = WORKS[case.work].flop(case.sizes, case.num_steps) * case.samples
    tflops = flop / timing.seconds / 1e12
    return {
        **identity(case),
        "param_dtype": "float32",
        "precision": timing.precision,
        "compiler_options": options,
        "sample_steps_per_second": case.samples * case.num_steps / timing.seconds,
        "tflops": tflops,
        "matmul_share": tflops / (rates[case.dtype] * case.devices),
        "peak_gib": None if timing.peak_bytes is None else timing.peak_bytes / 2**30,
        "compile_seconds": timing.compile_seconds,
    }


def cases(settings: ml_collections.ConfigDict) -> list[Case]:
    """The rows to measure; PyTorch first, since jax keeps the device memory it once took."""
    made = []
    for way in sorted(settings.ways, key=lambda way: way == "ttt_jax"):
        for name in settings.works:
            work = WORKS[name]
            if way not in work.samples:
                continue
            ours, sizes = way == "ttt_jax", work.smoke if settings.smoke else work.sizes
            counts = (ours and settings.samples) or (work.samples[way],)
            if settings.smoke:
                counts = (2,)
            devices = settings.devices if ours else (1,)
            forms = settings.attention if ours and isinstance(sizes, ViTSizes) else (None,)
            made += [
                Case(
                    name,
                    way,
                    dtype,
                    steps,
                    many * max(count, sizes.batch),
                    form_of(sizes, form),
                    many,
                )
                for dtype in work.dtypes
                if not settings.dtypes or dtype in settings.dtypes
                for steps in work.num_steps[: 1 if settings.smoke else None]
                if not settings.num_steps or steps in settings.num_steps
                for count in counts
                for form in forms
                for many in devices
            ]
    return made


def form_of(sizes: Any, attention: str | None) -> Any:
    """The sizes with that form of attention."""
    return sizes if attention is None else sizes._replace(attention=attention)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row: speed, share of the matmul rate, speed over each PyTorch way's.

    ``/fewest`` is the speed over that on the fewest devices with as many images on each.
    """
    same = ("work", "compute_dtype", "num_steps")
    peers = ("torch_func_vmap", "torch_loop", "torch_ttt")
    speed = {(row["way"], *(row[k] for k in same)): row["sample_steps_per_second"] for row in rows}
    layout = "{:19} {:16} {:9} {:>5} {:>7} {:>7} {:>9} {:>12} {:>7} {:>7} {:>7} {:>6} {:>6} {:>6}"
    head = ("work", "way", "dtype", "steps", "samples", "devices", "attention")
    head += ("steps/s", "/fewest", "TFLOP/s", "/matmul", "/vmap", "/loop", "/ttt")
    lines = [layout.format(*head)]
    for row in rows:
        here, ratios = row["sample_steps_per_second"], []
        for way in peers:
            there = speed.get((way, *(row[k] for k in same)))
            ratios.append(f"{here / there:.2f}" if there and row["devices"] == 1 else "-")
        names = [
            row[k] for k in ("work", "way", "compute_dtype", "num_steps", "samples", "devices")
        ]
        names.append(row["attention"] or "-")
        fewest = min((r for r in rows if _alike(r, row)), key=lambda r: r["devices"])
        gain = "-"
        if fewest["devices"] < row["devices"]:
            gain = f"{here / fewest['sample_steps_per_second']:.2f}"
        share = f"{100 * row['matmul_share']:.1f} %"
        rates = (f"{here:.1f}", gain, f"{row['tflops']:.2f}", share)
        lines.append(layout.format(*names, *rates, *ratios))
    return "\n".join(lines)


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two rows differ in the number of devices alone."""
    same = ("work", "way", "compute_dtype", "num_steps", "attention")
    each = {row["samples"] // row["devices"] for row in (a, b)}
    return all(a[k] == b[k] for k in same) and len(each) == 1


def runnable(ways: Iterable[str]) -> tuple[str, ...]:
    """The ways whose packages are here; says which are left out, and why."""
    kept = []
    for way in ways:
        missing = [name for name in NEEDS.get(way, ()) if util.find_spec(name) is None]
        if missing:
            print(f"{way} is skipped: {', '.join(missing)} not installed.")
        else:
            kept.append(way)
    return tuple(kept)


def run(out: str | os.PathLike[str], settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Measures every case that has no row yet and rewrites ``out`` after each.

    Args:
      out: the JSON file, new or of an earlier call.
      settings: ``works``, ``ways``, ``dtypes``, ``num_steps``, ``samples``, ``attention``,
        ``compiler_options``, ``repeats``, ``devices``, ``trace`` and ``smoke``, as the flags of the
        same names.

    Raises:
      launch.UserError: an unknown work, way or form of attention, more devices than there are, or a
        file that cannot be written or holds something else.
    """
    launch.chosen("work", settings.works, WORKS)
    launch.chosen("way", settings.ways, WAYS)
    compiler_options(settings.compiler_options)
    launch.chosen("attention", settings.attention, attention_lib.FORMS)
    path = pathlib.Path(out)
    launch.open_workdir(str(path.parent))
    with settings.unlocked():
        settings.ways = runnable(settings.ways)
    # Both libraries share the device: jax must not reserve most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # By default jax may take three quarters of the card; ttt_mae needs half of it in one piece.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if min(settings.devices, default=0) < 1:
        raise launch.UserError(
            f"--devices takes numbers of at least 1; got {list(settings.devices)}."
        )
    adapt.mesh_of(max(settings.devices))
    made = cases(settings)
    if not made:
        raise launch.UserError(
            f"nothing to measure: no work has dtypes {list(settings.dtypes)} and num_steps "
            f"{list(settings.num_steps)}."
        )
    size = 64 if settings.smoke else MATMUL_SIZE
    matmul = {"size": size, "precision": jax_precision("float32"), "tflops": {}}
    new = {**provenance.of(settings), "runs": [], "matmul": matmul, "rows": [], "failed": []}
    for name, package in PACKAGES.items():
        if any(name in NEEDS.get(way, ()) for way in settings.ways):
            new["versions"][package] = provenance.version(package)
    with record_lib.opened(path, new) as record:
        # Two forms of attention may be one here.
        wanted = {tuple(identity(case).values()): case for case in made}
        done = {record_lib.key_of(row) for row in record["rows"]}
        todo = {key: case for key, case in wanted.items() if key not in done}
        if len(todo) < len(wanted):
            print(f"{len(wanted) - len(todo)} of {len(wanted)} rows are in {path} already.")
        if todo:
            record["runs"].append(provenance.origin(new))
        rates = record["matmul"]["tflops"]
        for dtype in sorted({case.dtype for case in todo.values()} - rates.keys()):
            rates[dtype] = matmul_rate(size, dtype, settings.repeats)
        for key, case in todo.items():
            name = " ".join(map(str, case[:3])) + f" steps={case.num_steps} samples={case.samples}"
            name += f" devices={case.devices}" if case.devices > 1 else ""
            record["failed"] = [r for r in record["failed"] if record_lib.key_of(r) != key]
            try:
                row = measure(case, settings, rates)
            except RuntimeError as error:  # out of memory, in both libraries
                record["failed"].append({**identity(case), "message": str(error)[:500]})
                print(f"{name}: failed: {str(error).splitlines()[0][:200]}", flush=True)
            else:
                record["rows"].append(row)
                speed = f"{row['sample_steps_per_second']:.1f} sample-steps/s"
                print(f"{name}: {speed}, {row['tflops']:.2f} TFLOP/s", flush=True)
            launch.write_json(path, record)
    print(table(record["rows"]))
    return record


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    out, settings = options.chosen(_FLAGS)
    for name in ("num_steps", "samples", "devices"):
        try:
            settings[name] = tuple(map(int, settings[name]))
        except ValueError as error:
            raise launch.UserError(f"--{name} takes integers: {error}.") from error
    return 1 if run(out, settings)["failed"] else 0


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write, or to go on with."),
        "works": flags.DEFINE_list("works", list(WORKS), "Which works."),
        "ways": flags.DEFINE_list("ways", list(WAYS), "Which ways."),
        "dtypes": flags.DEFINE_list("dtypes", [], "Only these compute dtypes; empty: all."),
        "num_steps": flags.DEFINE_list("num_steps", [], "Only these numbers of steps; empty: all."),
        "samples": flags.DEFINE_list(
            "samples",
            [],
            "Images per call and device of ttt_jax, each tried; empty: those of the work.",
        ),
        "devices": flags.DEFINE_list(
            "devices", ["1"], "On how many devices ttt_jax is timed, each tried."
        ),
        "attention": flags.DEFINE_list(
            "attention", ["fused"], "Forms of attention of ttt_jax, each tried: fused, xla."
        ),
        "compiler_options": flags.DEFINE_list(
            "compiler_options", [], "Options of XLA for ttt_jax, as name=value."
        ),
        "repeats": flags.DEFINE_integer("repeats", 3, "Timed calls per row.", 3),
        "trace": flags.DEFINE_string(
            "trace", "", "Folder for a trace of one call per row of ttt_jax; prints its kernels."
        ),
        "smoke": flags.DEFINE_bool("smoke", False, "Tiny networks, for a CPU in a minute."),
    }
    flags.mark_flag_as_required("out")
    launch.run(main)

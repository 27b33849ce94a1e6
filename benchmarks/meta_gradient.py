"""What does a gradient through inner steps cost in memory and time?

``python -m benchmarks.meta_gradient --out=FILE`` compiles the gradient of the loss of documents
read by :func:`ttt_jax.methods.end_to_end`, whose last quarter of MLPs learns from every chunk, in
all parameters of a decoder, through 16 and 64 chunks, in several ways:

* ``plain``: what all steps leave for their derivative is kept, reverse over reverse;
* ``remat``: a state is kept every few chunks, and the chunks between are computed again;
* ``mixed``: the same, and an inner gradient is differentiated forward over reverse;
* ``remat_layers``, ``mixed_layers``: within a step the decoder's layers are computed again, too.

Memory is what the compiled program needs beside arguments and results, and the peak of the device
where it keeps count: programs run from the smallest to the largest. The ratio of 64 chunks to 16 is
to be at most 1.5 of ``mixed``, and its time at most 1.4 times that of ``remat``.
"""

import functools
import itertools
import os
import time
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from benchmarks import options, outer_training
from benchmarks.vision import median_seconds
from experiments import launch, provenance

# Arguments of the outer gradient; whether layers are computed again.
WAYS = {
    "plain": ({"remat": 0, "mixed": False}, False),
    "remat": ({"remat": None, "mixed": False}, False),
    "mixed": ({"remat": None, "mixed": True}, False),
    "remat_layers": ({"remat": None, "mixed": False}, True),
    "mixed_layers": ({"remat": None, "mixed": True}, True),
}
_SMOKE = {
    **{"width": 16, "depth": 2, "heads": 2, "vocabulary": 31, "window": 8, "chunk": 4, "rows": 1},
    **{"chunks": ("2", "6"), "repeats": 1, "dtype": "float32"},
}


def program(way: str, settings: Any) -> Any:
    """``(params, documents [N, T, L]) -> (loss, gradient)``, and the decoder."""
    gradient, layers = WAYS[way]
    module = outer_training.decoder(settings, settings.vocabulary).clone(remat=layers)
    loss = outer_training.mean_nats("end_to_end", module, **gradient)
    return jax.value_and_grad(loss), module


def lowered(way: str, chunks: int, settings: Any) -> tuple[Any, Any]:
    """A program that is to be compiled, and its arguments."""
    run, module = program(way, settings)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(0)
    shape = settings.rows, chunks, settings.chunk
    tokens = jnp.asarray(rng.integers(settings.vocabulary, size=shape), jnp.int32)
    given = params, tokens, jnp.float32(1.0)
    return jax.jit(run).lower(*given), given


def compiled_rows(places: Sequence[tuple[str, int]], settings: Any) -> list[tuple[Any, Any]]:
    """Rows with the memory of every program, and the calls that run them."""

    def compiled(program: Any) -> tuple[Any, float]:
        begin = time.perf_counter()
        return program.compile(), time.perf_counter() - begin

    # Each takes one core for the most part.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = [lowered(*place, settings) for place in places]
        made = list(pool.map(compiled, [program for program, _ in pairs]))
    rows = []
    for place, (call, seconds), (_, given) in zip(places, made, pairs, strict=True):
        row: dict[str, Any] = dict(zip(("way", "chunks"), place, strict=True))
        row["compile_seconds"] = seconds
        row["temporary_bytes"] = call.memory_analysis().temp_size_in_bytes
        rows.append((row, functools.partial(_finished, call, given)))
    return rows


def _finished(call: Any, given: Any) -> Any:
    return jax.block_until_ready(call(*given))


def measured(row: dict[str, Any], call: Any, settings: Any) -> dict[str, Any]:
    """The row with the time, the peak of the device so far, loss and norm of the gradient."""
    try:
        value, grads = call()
        norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
        row |= {"loss": float(value), "grad_norm": float(norm)}
        del value, grads
        row["seconds"] = median_seconds(call, settings.repeats)
    except jax.errors.JaxRuntimeError as error:  # too large for the device
        row["message"] = f"{error}"[:300]
    stats = jax.local_devices()[0].memory_stats() or {}
    return row | {"peak_bytes": stats.get("peak_bytes_in_use")}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Memory of most chunks to that of fewest; memory and time of a way to those of ``remat``."""
    by_place = {(row["way"], row["chunks"]): row for row in rows}
    few, most = (pick(row["chunks"] for row in rows) for pick in (min, max))
    made: dict[str, Any] = {"memory_ratio": {}, "time_of_remat": {}, "memory_of_remat": {}}
    for way in dict.fromkeys(row["way"] for row in rows):
        ends = [by_place.get((way, count), {}) for count in (few, most)]
        if all(ends):
            made["memory_ratio"][way] = ends[1]["temporary_bytes"] / ends[0]["temporary_bytes"]
        other = by_place.get((f"remat{way.removeprefix('mixed')}", most))
        if way.startswith("mixed") and other and ends[1]:
            made["memory_of_remat"][way] = ends[1]["temporary_bytes"] / other["temporary_bytes"]
            if "seconds" in ends[1] and "seconds" in other:
                made["time_of_remat"][way] = ends[1]["seconds"] / other["seconds"]
    if "mixed" in made["memory_ratio"]:
        made["meta_gradient_memory_ratio"] = made["memory_ratio"]["mixed"]
    return made


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Compiles all programs, then times them, and writes the record after each."""
    launch.chosen("way", settings.ways, WAYS)
    settings = ml_collections.ConfigDict(settings)
    settings.update(_SMOKE if settings.smoke else {})
    for value in settings.chunks:
        if not value.isdecimal() or not int(value):
            raise launch.UserError(f"--chunks takes positive integers; got {value!r}.")
    path = launch.new_file(out)
    record = provenance.of(settings) | {"rows": []}
    places = list(itertools.product(settings.ways, map(int, settings.chunks)))
    calls = compiled_rows(places, settings)
    record["rows"] = [row for row, _ in calls]
    record["summary"] = summary(record["rows"])
    launch.write_json(path, record)
    for row, call in sorted(calls, key=lambda pair: pair[0]["temporary_bytes"]):
        if settings.time:
            row.update(measured(row, call, settings))
            record["summary"] = summary(record["rows"])
            launch.write_json(path, record)
    print(table(record))
    return record


def table(record: dict[str, Any]) -> str:
    """Memory and time of all programs, and the ratios."""
    lines = [f"{'way':16}{'chunks':>7}{'MiB':>10}{'peak MiB':>10}{'ms':>10}{'gradient norm':>15}"]
    for row in record["rows"]:
        peak = f"{row['peak_bytes'] / 2**20:,.0f}" if row.get("peak_bytes") else ""
        ms = f"{1e3 * row['seconds']:,.1f}" if "seconds" in row else row.get("message", "")[:40]
        norm = f"{row['grad_norm']:.6f}" if "grad_norm" in row else ""
        mib = f"{row['temporary_bytes'] / 2**20:,.0f}"
        lines.append(f"{row['way']:16}{row['chunks']:7}{mib:>10}{peak:>10}{ms:>10}{norm:>15}")
    for name, value in record["summary"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{way}: {ratio:.3f}" for way, ratio in value.items())
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "ways": flags.DEFINE_list("ways", list(WAYS)[:3], f"Which ways, of {', '.join(WAYS)}."),
        "chunks": flags.DEFINE_list("chunks", ["16", "64"], "Inner steps."),
        "width": flags.DEFINE_integer("width", 256, "Of the decoder.", 2),
        "depth": flags.DEFINE_integer("depth", 8, "Layers; the MLPs of the last quarter learn.", 2),
        "heads": flags.DEFINE_integer("heads", 4, "Of attention.", 1),
        "vocabulary": flags.DEFINE_integer("vocabulary", 4096, "Tokens.", 2),
        "window": flags.DEFINE_integer("window", 256, "Tokens that a token sees.", 1),
        "chunk": flags.DEFINE_integer("chunk", 128, "Tokens of an inner step.", 1),
        "rows": flags.DEFINE_integer("rows", 4, "Documents side by side.", 1),
        "dtype": flags.DEFINE_string("dtype", "bfloat16", "Of the computation."),
        "repeats": flags.DEFINE_integer("repeats", 5, "Timed calls of a program.", 1),
        "time": flags.DEFINE_bool("time", True, "Whether programs are run, or compiled alone."),
        "smoke": flags.DEFINE_bool("smoke", False, "A tiny decoder, for a CPU in a minute."),
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)

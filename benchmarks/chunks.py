"""How close does ``tuning.fastest_chunk`` come to the best choice by hand, and to PyTorch?

``python -m benchmarks.chunks --out=FILE`` times one step of MEMO on ResNet-50 and ViT-B/16 at 224
pixels (32 views) and of rotation on ResNet-26 at 32 pixels, bfloat16 compute, on one device. For
each, :func:`ttt_jax.tuning.chunk_seconds` says which ``chunk_size`` is fastest; then calls over all
images are timed with that size, with the largest that fits, and with every other one that it found
less than 1.3 times as slow: the choices by hand. Of ResNet-50, every form in PyTorch that
:mod:`benchmarks.torch_memo` has is timed beside. Medians; compilation and the first call apart.
"""

import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

import ttt_jax as ttt
from benchmarks import imagenet, options, works
from benchmarks.vision import median_seconds
from experiments import launch, provenance
from ttt_jax import tuning

_NEAR = 1.3


class Case(NamedTuple):
    """A work: what makes its program, images per call, and the least of a smoke run."""

    program: Any
    samples: int
    smoke: Any


CASES = {
    "memo_resnet50": Case(
        lambda: imagenet.memo_resnet50("bfloat16"),
        32,
        lambda: imagenet.memo_resnet50("float32", smoke=True),
    ),
    "memo_vit_b16": Case(
        lambda: imagenet.memo_vit("bfloat16"),
        64,
        lambda: imagenet.memo_vit("float32", smoke=True),
    ),
    "rotation_resnet26": Case(
        lambda: works.rotation(works.ResNetSizes(), "bfloat16", 1, norm_only=False),
        512,
        lambda: works.rotation(
            works.ResNetSizes(depth=8, image_size=16, copies=2), "float32", 1, norm_only=False
        ),
    ),
}


def time_jax(work: str, program: works.Program, samples: int, settings: Any) -> dict[str, Any]:
    """What is chosen for a work, what that took, and the rates of the choices by hand."""
    params = jax.jit(program.init)(jax.random.key(0))
    xs = jax.random.uniform(jax.random.key(1), (samples, *program.shape))
    keys = ttt.sample_keys(jax.random.key(2), jnp.arange(samples))
    start = time.perf_counter()
    tried = tuning.chunk_seconds(
        program.predictor, params, xs, keys, max_seconds=settings.max_seconds
    )
    took = time.perf_counter() - start
    chosen, most = next(iter(tried)), max(tried)
    near = {size for size, each in tried.items() if each < _NEAR * tried[chosen]}
    rates = {}
    for size in sorted(near | {most}):
        run = ttt.batched(program.predictor, chunk_size=size)
        compiled = jax.jit(run).lower(params, xs, keys).compile()
        if not bool(compiled(params, xs, keys)[1].ok.all()):
            raise RuntimeError(f"{work}: an inner step was not finite.")
        seconds = median_seconds(
            lambda f=compiled: jax.block_until_ready(f(params, xs, keys)), settings.repeats
        )
        rates[size] = samples / seconds
        print(f"{work}: {size} at once: {rates[size]:.1f} sample-steps/s", flush=True)
    return {
        "work": work,
        "samples": samples,
        "chosen": chosen,
        "choosing_seconds": took,
        "largest_that_fits": most,
        "tried_rates": {size: 1 / each for size, each in tried.items()},
        "rates": rates,
    }


def time_torch(samples: int, settings: Any) -> list[dict[str, Any]]:
    """The rates of MEMO on ResNet-50 in PyTorch, by form; a form that fails says why."""
    from benchmarks import torch_memo

    rows = []
    for form in torch_memo.forms():
        row: dict[str, Any] = {"form": form.name, **form._asdict()}
        try:
            if settings.smoke:
                net = torch_memo.ResNet50(((1, 4), (1, 8)), 10)
                call = torch_memo.call_of(form, 2, 2, 32, net)
            else:
                net = torch_memo.ResNet50()
                sizes = (samples, imagenet.VIEWS, imagenet.SIZE)
                call = torch_memo.call_of(form, *sizes, net)
            start = time.perf_counter()
            call()
            row["compile_seconds"] = time.perf_counter() - start
            row["rate"] = (2 if settings.smoke else samples) / median_seconds(
                call, settings.repeats
            )
        except Exception as error:  # whatever a compiler of theirs raises
            row["message"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        print(f"{row['form']}: {row.get('rate', row.get('message'))}", flush=True)
    return rows


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Measures what is asked for, and writes the record after every work.

    Raises:
      UserError: an unknown work, or an ``out`` that is there.
    """
    launch.chosen("work", settings.works, CASES)
    path = launch.new_file(out)
    # Both libraries share the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    record = provenance.of(settings) | {"rows": [], "torch": []}
    record["versions"]["torch"] = provenance.version("torch")
    if settings.torch:
        record["torch"] = time_torch(CASES["memo_resnet50"].samples, settings)
        launch.write_json(path, record)
    for name in settings.works:
        case = CASES[name]
        program = case.smoke() if settings.smoke else case.program()
        samples = 5 if settings.smoke else case.samples
        record["rows"].append(time_jax(name, program, samples, settings))
        launch.write_json(path, record)
    for row in record["rows"]:
        best = max(row["rates"].values())
        chosen = row["rates"][row["chosen"]]
        print(
            f"{row['work']}: chosen {row['chosen']} in {row['choosing_seconds']:.0f} s, "
            f"{chosen:.1f} sample-steps/s, {100 * (1 - chosen / best):.1f} % below the best by "
            f"hand; the largest that fits, {row['largest_that_fits']}: "
            f"{row['rates'][row['largest_that_fits']]:.1f}"
        )
    return record


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "works": flags.DEFINE_list("works", list(CASES), "Which works."),
        "torch": flags.DEFINE_bool("torch", True, "Whether PyTorch is timed too."),
        "repeats": flags.DEFINE_integer("repeats", 3, "Timed calls per row.", 1),
        "max_seconds": flags.DEFINE_float("max_seconds", 120.0, "Of chunk_seconds.", 0.0),
        "smoke": flags.DEFINE_bool("smoke", False, "Tiny networks, for a CPU in a minute."),
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)

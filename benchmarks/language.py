"""How fast do the low-rank adapters of many tasks learn at once, beside PyTorch and the bound?

``python -m benchmarks.language --out=FILE`` times two works on one device, bfloat16 compute and
base, float32 factors, random weights and tokens:

* ``documents``: SmolLM2's sizes, rank 8 on queries and values, chunks of 256 tokens under a window
  of 1,024 with a cache: every chunk is scored, then learned from. Tokens per second.
* ``tasks``: a decoder of 85 million parameters, rank 16 on queries, values, up and down, two
  sequences of 512 tokens per task and step. Task-steps per second.

For each N of ``--tasks_at_once``: ours; the bound, which is the forward and backward pass without
factors (the gradient goes to the norms alone) and without an optimizer that has a state; stacked
factors in PyTorch, eager and as a CUDA graph of compiled layers; and PEFT, one task after another.
Medians; compilation apart. PyTorch's logits are bfloat16; ours are of each dtype of ``--logits``,
all sums over them in float32. Ours begins its documents with an empty cache, so that the first four
chunks see less than the window; PyTorch's cache is full from the first step.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags

import ttt_jax as ttt
from benchmarks import options
from benchmarks.vision import median_seconds
from experiments import launch, provenance
from ttt_jax import losses, methods, models

DTYPE = jnp.bfloat16
# More would not fit beside the logits of a chunk.
_AT_ONCE = 128
NORMS = ttt.select.paths(r".*norm/scale")


class Sizes(NamedTuple):
    """A decoder of Llama's form with tied embeddings, and its adapters."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    rank: int
    targets: tuple[str, ...]

    @property
    def head_size(self) -> int:
        """D."""
        return self.width // self.heads


class Work(NamedTuple):
    """What a step is: sequences and tokens of a task, and what its cache holds before."""

    sizes: Sizes
    sequences: int
    length: int
    window: int | None
    unit: str

    @property
    def per_step(self) -> int:
        """Units of a task's step: tokens, or the step itself."""
        return self.length if self.window else 1


WORKS = {
    "documents": Work(
        Sizes(49152, 576, 30, 9, 3, 1536, 8, ("query", "value")), 1, 256, 1024, "tokens/s"
    ),
    "tasks": Work(
        Sizes(4096, 768, 12, 12, 12, 2048, 16, ("query", "value", "up", "down")),
        2,
        512,
        None,
        "task-steps/s",
    ),
}
SMOKE = {
    "documents": Work(Sizes(64, 32, 2, 2, 1, 48, 2, ("query", "value")), 1, 16, 32, "tokens/s"),
    "tasks": Work(
        Sizes(64, 32, 2, 2, 2, 48, 2, ("query", "value", "up", "down")),
        2,
        8,
        None,
        "task-steps/s",
    ),
}


def _module(work: Work, unroll: bool, logits: str = "float32") -> models.Decoder:
    sizes = work.sizes
    return models.Decoder(
        **{name: getattr(sizes, name) for name in Sizes._fields[:6]},
        window=work.window,
        sinks=4 if work.window else 0,
        unroll=sizes.depth if unroll else 1,
        dtype=DTYPE,
        logits_dtype=jnp.dtype(logits),
    )


def _params(module: models.Decoder, work: Work, factors: bool) -> tuple[models.Decoder, Any]:
    """Random weights, the base in the compute dtype."""
    example = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(module.clone(unroll=1).init)(jax.random.key(0), example)
    params = jax.tree.map(lambda leaf: leaf.astype(DTYPE), params)
    if not factors:
        return module, params
    paths = [f".*/{target}" for target in work.sizes.targets]
    rank = work.sizes.rank
    return models.low_rank(
        module, params, jax.random.key(1), example, rank=rank, alpha=float(rank), paths=paths
    )


def jax_call(
    work: Work,
    tasks: int,
    *,
    steps: int,
    bound: bool,
    unroll: bool,
    logits: str = "float32",
    at_once: int = _AT_ONCE,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of ``steps`` steps of every task, and its arguments."""
    module, params = _params(_module(work, unroll, logits), work, not bound)
    select = NORMS if bound else ttt.select.lora()
    optimizer = optax.sgd(0.0) if bound else optax.adam(3e-3, b1=0.9, b2=0.95, eps=1e-10)
    if bound:
        # The norms are what adapts there; narrower than float32 warns.
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(jnp.float32) if "scale" in str(path) else leaf, params
        )
    keys = ttt.sample_keys(jax.random.key(2), jnp.arange(tasks))
    shape = (tasks, steps, work.sequences, work.length)
    tokens = jax.random.randint(jax.random.key(3), shape, 0, work.sizes.vocabulary)
    if work.window:
        tokens = tokens[:, :, 0]
        predict = methods.document_ttt(models.reader(module), optimizer=optimizer, select=select)
        xs: Any = {"tokens": tokens, "mask": jnp.ones(tokens.shape, bool)}
        return ttt.batched(predict, chunk_size=min(tasks, at_once)), (params, xs, keys)
    loss = losses.next_token(models.decoder_function(module), batch=True)
    adapter = ttt.gradient_adapter(loss, optimizer, select=select)

    def many(params: Any, tokens: Any, keys: Any) -> Any:
        def task(tokens: Any, key: Any) -> Any:
            def step(state: Any, batch: Any) -> Any:
                return adapter.step(params, state, batch, key)

            return jax.lax.scan(step, adapter.init(params), tokens)

        if tasks <= at_once:
            return jax.vmap(task)(tokens, keys)
        return jax.lax.map(lambda each: task(*each), (tokens, keys), batch_size=at_once)

    return many, (params, tokens, keys)


def steps_of(settings: Any, tasks: int) -> int:
    """Steps of a timed call: half as many where a step takes long."""
    return settings.steps if tasks < _AT_ONCE else -(-settings.steps // 2)


def time_jax(work: Work, tasks: int, settings: Any, bound: bool, logits: str) -> dict[str, Any]:
    """A row: the rate after the first steps, seconds of compilation, bytes of the program."""
    steps = steps_of(settings, tasks)
    run, arguments = jax_call(
        work, tasks, steps=steps, bound=bound, unroll=settings.unroll, logits=logits
    )
    start = time.perf_counter()
    compiled = jax.jit(run).lower(*arguments).compile()
    compilation = time.perf_counter() - start
    seconds = median_seconds(lambda: jax.block_until_ready(compiled(*arguments)), settings.repeats)
    memory = compiled.memory_analysis()
    return {
        "way": "bound" if bound else "ttt_jax",
        "logits": logits,
        "rate": tasks * steps * work.per_step / seconds,
        "compile_seconds": compilation,
        "steps": steps,
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        "output_bytes": getattr(memory, "output_size_in_bytes", None),
    }


def time_torch(work: Work, tasks: int, settings: Any, way: str) -> dict[str, Any]:
    """A row of a form in PyTorch; one that fails says why."""
    context = work.window - 1 if work.window else 0
    # An even number of keys suits the kernels.
    context += context % 2
    steps = steps_of(settings, tasks)
    row: dict[str, Any] = {"way": way, "steps": steps}
    count = steps * tasks if way.startswith("peft") else steps
    try:
        from benchmarks import torch_language as peers

        row["logits"] = peers.LOGITS
        start = time.perf_counter()
        if way.startswith("peft"):
            call = peers.peft_call(
                work.sizes,
                sequences=work.sequences,
                length=work.length,
                context=work.window - work.length if work.window else 0,
                steps=count,
                compile=way.endswith("compiled"),
            )
        else:
            graph = way.endswith("graph")
            model = peers.Stacked(
                work.sizes, tasks, sequences=work.sequences, context=context, compile=graph
            )
            call = peers.stacked_call(model, work.length, count, graph=graph)
        call()
        row["compile_seconds"] = time.perf_counter() - start
        seconds = median_seconds(call, settings.repeats)
        row["rate"] = tasks * steps * work.per_step / seconds
    except Exception as error:  # whatever a compiler of theirs raises
        row["message"] = f"{type(error).__name__}: {error}"[:300]
    return row


def agreement(unroll: bool) -> float:
    """The largest difference of scores between N documents at once and one after another."""
    work = SMOKE["documents"]
    run, (params, xs, keys) = jax_call(work, 5, steps=6, bound=False, unroll=unroll)
    together = jax.jit(run)(params, xs, keys)[0]
    single = jax.jit(ttt.batched(_predictor(work), chunk_size=1))(params, xs, keys)[0]
    return float(jnp.abs(together - single).max())


def _predictor(work: Work) -> Any:
    module, _ = _params(_module(work, False), work, True)
    return methods.document_ttt(models.reader(module))


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Measures what is asked for, and writes the record after every row."""
    launch.chosen("work", settings.works, WORKS)
    path = launch.new_file(out)
    record = provenance.of(settings) | {"rows": [], "agreement": agreement(settings.unroll)}
    record["versions"] |= {name: provenance.version(name) for name in ("torch", "peft")}
    works = SMOKE if settings.smoke else WORKS
    for name in settings.works:
        for tasks in map(int, settings.tasks_at_once):
            makers: dict[str, Callable[[], dict[str, Any]]] = {}
            for way in settings.ways:
                if way in ("ttt_jax", "bound"):
                    for dtype in settings.logits:
                        makers[f"{way}, logits {dtype}"] = functools.partial(
                            time_jax, works[name], tasks, settings, way == "bound", dtype
                        )
                elif not way.startswith("peft") or tasks == 1:
                    makers[way] = functools.partial(time_torch, works[name], tasks, settings, way)
            for make in makers.values():
                row = {"work": name, "tasks": tasks} | make()
                record["rows"].append(row)
                launch.write_json(path, record)
                print(
                    f"{name} N={tasks} {row['way']} {row.get('logits', '')}: "
                    f"{row.get('rate', row.get('message'))} {works[name].unit}, "
                    f"compilation {row.get('compile_seconds', float('nan')):.0f} s",
                    flush=True,
                )
    return record


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    record = run(*options.chosen(_FLAGS))
    print(f"agreement with one at a time: {record['agreement']:.1e}")


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "works": flags.DEFINE_list("works", list(WORKS), "Which works."),
        "ways": flags.DEFINE_list(
            "ways",
            ["ttt_jax", "bound", "stacked", "stacked_graph", "peft", "peft_compiled"],
            "Which ways.",
        ),
        "tasks_at_once": flags.DEFINE_list("tasks_at_once", ["1", "8", "32", "128", "512"], "N."),
        "logits": flags.DEFINE_list(
            "logits", ["float32", "bfloat16"], "Dtypes of the logits in ours."
        ),
        "steps": flags.DEFINE_integer("steps", 32, "Steps of a timed call.", 1),
        "unroll": flags.DEFINE_bool("unroll", True, "Whether layers are unrolled in ours."),
        "repeats": flags.DEFINE_integer("repeats", 3, "Timed calls per row.", 1),
        "smoke": flags.DEFINE_bool("smoke", False, "Tiny decoders, for a CPU in a minute."),
    }
    flags.mark_flag_as_required("out")
    launch.run(main)

"""How fast is TTT-Linear, in which configuration of its kernels, and are those right?

``python -m benchmarks.layers --out=FILE`` times, in bfloat16 with heads of 64 and 16 of them, four
sequences of 8,192 tokens (``long``) and 64 of 1,024 (``many``), forward, and forward and backward:

* every configuration of the kernels (:data:`ttt_jax.kernels.ttt_linear.limits.CONFIGURATIONS`),
  after its outputs, with and without a backward pass, and all nine gradients were compared with
  XLA's in float32 over 1,024 tokens of random data; one whose largest relative error is over
  1e-2 is marked wrong, and never best;
* the dual form in XLA; cuDNN's causal attention; flash-linear-attention's TTT-Linear (another
  definition of the step sizes) and delta rule.

Then ``shapes``: the errors of the configurations that are chosen, at the widths asked for (all by
default) and every chunk and dtype that the kernels take. ``decode``: a token of every sequence,
beside the bandwidth of reading and writing the state, and of a copy.
``scaling``: one sequence of 1k to 128k tokens, beside cuDNN. Medians; compilation apart.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from benchmarks import options
from benchmarks.vision import median_seconds
from experiments import launch, provenance
from ttt_jax import layers
from ttt_jax.kernels.ttt_linear import layer, limits

DTYPE = jnp.bfloat16
LIMIT = 1e-2
CHUNK = 16
FLA = ("fla_chunk", "fla_fused", "fla_delta")
PARTS = ("kernels", "xla", "cudnn", *FLA, "shapes", "decode", "scaling")
# Sequences and heads, ``[B, H, ...]``; weights and norm are of a head.
_HEAD = layer.Operands(0, 0, 0, 0, None, 0, 0, 0, 0)
_SEQUENCE = layer.Operands(0, 0, 0, 0, None, None, None, None, None)


class Work(NamedTuple):
    """Sequences, tokens of each, heads, and their width."""

    batch: int
    tokens: int
    heads: int
    width: int


WORKS = {"long": Work(4, 8192, 16, 64), "many": Work(64, 1024, 16, 64)}
SMOKE = {"long": Work(1, 48, 2, 16), "many": Work(2, 16, 2, 16)}
_SMOKE_SETTINGS = {
    "configurations": ("shared",),
    "spacings": ("2",),
    "lengths": ("16",),
    "works": ("long",),
    "checked_tokens": 64,
    "repeats": 1,
    "calls": 1,
}


class Shape(NamedTuple):
    """Of heads whose errors are looked at."""

    width: int
    chunk: int
    dtype: Any


def inputs(work: Work, chunk: int = CHUNK, dtype: Any = DTYPE) -> layer.Operands:
    """Random tokens ``[B, H, T, d]``, weights and norm of each head, positions of a chunk."""
    batch, tokens, heads, width = work
    keys = jax.random.split(jax.random.key(0), 9)
    draw = lambda index, *shape: jax.random.normal(keys[index], shape)  # noqa: E731
    rows = [0.3 * draw(index, batch, heads, tokens, width) for index in range(3)]
    return layer.Operands(
        *[row.astype(dtype) for row in rows],
        gate=jax.nn.sigmoid(draw(3, batch, heads, tokens)) / width,
        scale=(1 + 0.1 * draw(4, chunk)) / jnp.arange(1.0, chunk + 1),
        weight=0.02 * draw(5, heads, width, width),
        bias=0.02 * draw(6, heads, width),
        gamma=1 + 0.1 * draw(7, heads, width),
        beta=0.1 * draw(8, heads, width),
    )


def mapped(function: Any, operands: layer.Operands) -> jax.Array:
    """Outputs of a function of one head, over sequences and heads; the scale is of all, or each."""
    own = None if operands.scale.ndim == 1 else 0
    head, sequence = _HEAD._replace(scale=own), _SEQUENCE._replace(scale=own)
    result: jax.Array = jax.vmap(jax.vmap(function, (head,)), (sequence,))(operands)
    return result


def kernels(
    operands: layer.Operands, *, configuration: str | None = None, spacing: int = 4
) -> jax.Array:
    """Outputs of every head and sequence."""
    given = None if configuration is None else limits.CONFIGURATIONS[configuration]
    one = functools.partial(layer.run, spacing=spacing, configuration=given)
    return mapped(lambda each: one(each)[0], operands)


def dual(operands: layer.Operands) -> jax.Array:
    """:func:`kernels` in XLA."""

    def one(each: layer.Operands) -> jax.Array:
        *rows, scale, weight, bias, gamma, beta = each
        return layers.ttt_linear(
            *rows,
            scale,
            (weight, bias),
            (gamma, beta),
            chunk_size=scale.shape[0],
            form="dual",
        )[0]

    return mapped(one, operands)


def attention(operands: tuple[jax.Array, ...]) -> jax.Array:
    """Causal, by cuDNN; ``[B, T, H, d]``."""
    return jax.nn.dot_product_attention(*operands, is_causal=True, implementation="cudnn")


def with_gradients(function: Callable[[Any], jax.Array]) -> Callable[[Any, jax.Array], Any]:
    """Forward and backward: outputs, and the gradients of all operands."""

    def run(operands: Any, dout: jax.Array) -> Any:
        out, backward = jax.vjp(function, operands)
        return out, *backward(dout.astype(out.dtype))

    return run


def cotangent(shape: tuple[int, ...]) -> jax.Array:
    """Random, in the compute dtype."""
    return jax.random.normal(jax.random.key(1), shape).astype(DTYPE)


@functools.lru_cache(maxsize=2)
def reference(work: Work, chunk: int, dtype: Any) -> tuple[layer.Operands, jax.Array, Any]:
    """Random operands, a cotangent, and outputs and gradients of XLA in float32."""
    operands = inputs(work, chunk, dtype)
    # One for each: a gradient of sixteen numbers in all, sums that cancel, has errors by chance.
    scale = jnp.broadcast_to(operands.scale, (work.batch, work.heads, chunk))
    operands = operands._replace(scale=scale)
    dout = cotangent(operands.q.shape)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), operands)
    with jax.default_matmul_precision("highest"):
        due = jax.jit(with_gradients(dual))(wide, dout)
    return operands, dout, due


def errors_of(function: Any, work: Work, chunk: int, dtype: Any) -> dict[str, float]:
    """Relative, of the outputs and the nine gradients, beside XLA in float32.

    ``forward``: of the outputs where no gradient follows, which come from another program.
    """
    operands, dout, due = reference(work, chunk, dtype)
    found = jax.jit(function)(operands), *jax.jit(with_gradients(function))(operands, dout)
    errors = {}
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves((due[0], *due)), strict=True)
    names = "forward", "out", *layer.Operands._fields
    for name, (ours, exact) in zip(names, leaves, strict=True):
        errors[name] = relative_error(ours, exact)
    return errors


def relative_error(ours: jax.Array, exact: jax.Array) -> float:
    """Of norms; infinite where it is not finite."""
    error = jnp.linalg.norm((ours.astype(jnp.float32) - exact).ravel())
    # A nan is over no limit.
    return float(jnp.nan_to_num(error / jnp.linalg.norm(exact.ravel()), nan=jnp.inf))


def timed(function: Any, operands: Any, settings: Any) -> tuple[float, float]:
    """Median milliseconds of a call among some that follow each other; seconds of compilation."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*operands).compile()
    compilation = time.perf_counter() - start
    several = lambda: jax.block_until_ready([compiled(*operands) for _ in range(settings.calls)])  # noqa: E731
    return 1e3 * median_seconds(several, settings.repeats) / settings.calls, compilation


def both_times(function: Any, operands: Any, dout: jax.Array, settings: Any) -> dict[str, float]:
    """Forward, and forward and backward."""
    forward, first = timed(function, (operands,), settings)
    both, second = timed(with_gradients(function), (operands, dout), settings)
    return {"forward_ms": forward, "both_ms": both, "compile_seconds": first + second}


def measured(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row; one that fails says why: a peer that is absent, a compiler that gives up."""
    try:
        return make()
    except Exception as error:  # whatever a compiler of theirs raises
        return {"message": f"{type(error).__name__}: {error}"[:300]}


def kernel_row(name: str, spacing: int, work: Work, settings: Any) -> dict[str, Any]:
    """Errors of a configuration, then its times."""
    run = functools.partial(kernels, configuration=name, spacing=spacing)
    checked = Work(4, settings.checked_tokens, 4, work.width)
    row: dict[str, Any] = {"errors": errors_of(run, checked, CHUNK, DTYPE)}
    row["right"] = max(row["errors"].values()) <= LIMIT
    operands = inputs(work)
    return row | both_times(run, operands, cotangent(operands.q.shape), settings)


def attention_row(work: Work, settings: Any) -> dict[str, Any]:
    """Times of causal attention on the same sizes."""
    shape = work.batch, work.tokens, work.heads, work.width
    keys = jax.random.split(jax.random.key(0), 3)
    operands = tuple(jax.random.normal(key, shape).astype(DTYPE) for key in keys)
    return both_times(attention, operands, cotangent(shape), settings)


def fla_row(way: str, work: Work, settings: Any) -> dict[str, Any]:
    """Times of flash-linear-attention."""
    from benchmarks import torch_layers

    start = time.perf_counter()
    forward, both = torch_layers.calls(way, tuple(work))
    row = {"forward_ms": torch_layers.median_ms(forward, settings.repeats, settings.calls)}
    try:
        row["both_ms"] = torch_layers.median_ms(both, settings.repeats, settings.calls)
    except Exception as error:  # its forward pass may do where the backward pass does not compile
        row["message"] = f"{type(error).__name__}: {error}"[:300]
    return row | {"wall_seconds": time.perf_counter() - start}


def shape_row(shape: Shape, settings: Any) -> dict[str, Any]:
    """Errors of the configurations that are chosen, for few and many heads."""
    work = Work(4, settings.checked_tokens, 4, shape.width)
    found = {
        name: errors_of(functools.partial(kernels, configuration=name), work, *shape[1:])
        for name in (limits.chosen(1), limits.chosen(1 << 16))
    }
    worst = max(max(errors.values()) for errors in found.values())
    return {"errors": found, "worst": worst, "right": worst <= LIMIT}


def decode_row(work: Work, settings: Any) -> dict[str, Any]:
    """A step of all sequences and heads, of a chunk of tokens in one loop."""
    batch, _, heads, width = work
    given = inputs(Work(batch, CHUNK, heads, width))
    each = jax.vmap(jax.vmap(layers.ttt_cache, ((0, 0),)), axis_size=batch, in_axes=(None,))
    cache = each((given.weight, given.bias))
    step = jax.vmap(layers.ttt_decode, (0, 0, 0, 0, None, 0, 0))
    step = jax.vmap(step, (0, 0, 0, 0, None, 0, None))

    def many(cache: Any, operands: layer.Operands) -> Any:
        def one(held: Any, rows: Any) -> Any:
            out, held = step(*rows, operands.scale, held, (operands.gamma, operands.beta))
            return held, out

        rows = tuple(jnp.moveaxis(leaf, 2, 0) for leaf in operands[:4])
        return jax.lax.scan(one, cache, rows)

    ms, compilation = timed(many, (cache, given), settings)
    moved = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    flat = jnp.ones(moved // 8, jnp.float32)
    copy_ms, _ = timed(lambda x: x + 1, (flat,), settings)
    row = {"step_ms": ms / CHUNK, "state_bytes": moved // 2, "copy_ms": copy_ms}
    return row | {"of_copy": copy_ms * CHUNK / ms, "compile_seconds": compilation}


def scaling_rows(lengths: Sequence[int], work: Work, settings: Any) -> Iterator[dict[str, Any]]:
    """One sequence of every length, in kernels and beside cuDNN."""
    for tokens in lengths:
        one = work._replace(batch=1, tokens=tokens)
        operands = inputs(one)
        dout = cotangent(operands.q.shape)
        ours = functools.partial(both_times, kernels, operands, dout, settings)
        yield {"part": "scaling", "way": "kernels", "tokens": tokens} | measured(ours)
        other = functools.partial(attention_row, one, settings)
        yield {"part": "scaling", "way": "cudnn", "tokens": tokens} | measured(other)


def work_rows(name: str, work: Work, settings: Any) -> Iterator[dict[str, Any]]:
    """All ways of a work, one after another."""
    made: list[dict[str, Any]] = []
    if "kernels" in settings.parts:
        for spacing in map(int, settings.spacings):
            for configuration in settings.configurations:
                row = {"part": "kernels", "work": name, "way": configuration, "spacing": spacing}
                row |= measured(
                    functools.partial(kernel_row, configuration, spacing, work, settings)
                )
                made.append(row)
                yield row
        right = [row for row in made if row.get("right") and "both_ms" in row]
        for time_name in ("forward_ms", "both_ms") if right else ():
            best = min(right, key=lambda row, key=time_name: row[key])
            way = f"{best['way']}, spacing {best['spacing']}"
            yield {"part": "best", "work": name, "way": way, time_name: best[time_name]}
    operands = inputs(work)
    others = {
        "xla": functools.partial(both_times, dual, operands, cotangent(operands.q.shape), settings),
        "cudnn": functools.partial(attention_row, work, settings),
        **{way: functools.partial(fla_row, way, work, settings) for way in FLA},
        "decode": functools.partial(decode_row, work, settings),
    }
    for way, make in others.items():
        if way in settings.parts:
            yield {"part": way, "work": name, "way": way} | measured(make)


def rows_of(settings: Any) -> Iterator[dict[str, Any]]:
    """All that is asked for."""
    works = SMOKE if settings.smoke else WORKS
    for name in settings.works:
        yield from work_rows(name, works[name], settings)
    if "shapes" in settings.parts:
        most = 1 if settings.smoke else None
        sizes = itertools.product(
            [int(width) for width in settings.widths][:most],
            limits.CHUNK_SIZES[:most],
            limits.DTYPES[:most],
        )
        for shape in itertools.starmap(Shape, sizes):
            row = measured(functools.partial(shape_row, shape, settings))
            yield {"part": "shapes", "way": " ".join(map(str, shape))} | row
    if "scaling" in settings.parts:
        lengths = tuple(map(int, settings.lengths))
        yield from scaling_rows(lengths, works["long"], settings)


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Measures what is asked for, and writes the record after every row."""
    launch.chosen("part", settings.parts, PARTS)
    launch.chosen("work", settings.works, WORKS)
    launch.chosen("width", settings.widths, list(map(str, limits.HEAD_SIZES)))
    launch.chosen("configuration", settings.configurations, limits.CONFIGURATIONS)
    for name in ("spacings", "lengths"):
        for value in settings[name]:
            if not value.isdecimal() or not int(value):
                raise launch.UserError(f"--{name} takes positive integers; got {value!r}.")
    path = launch.new_file(out)
    settings = ml_collections.ConfigDict(settings)
    settings.update(_SMOKE_SETTINGS if settings.smoke else {})
    record = provenance.of(settings) | {"rows": []}
    record["versions"] |= {name: provenance.version(name) for name in ("torch", "fla-core")}
    programs = {name: work.batch * work.heads for name, work in WORKS.items()}
    record["chosen"] = {name: limits.chosen(count) for name, count in programs.items()}
    for row in rows_of(settings):
        record["rows"].append(row)
        launch.write_json(path, record)
        print(described(row), flush=True)
    return record


def described(row: dict[str, Any]) -> str:
    """A line of a row."""
    place = " ".join(str(row[n]) for n in ("part", "work", "way", "spacing", "tokens") if n in row)
    times = {n: f"{row[n]:.3f}" for n in ("forward_ms", "both_ms", "step_ms") if n in row}
    parts = [f"{name} {value}" for name, value in times.items()]
    parts += [row["message"]] if "message" in row else []
    parts += ["wrong"] if row.get("right") is False else []
    return f"{place}: {', '.join(parts) or 'right'}"


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "parts": flags.DEFINE_list("parts", list(PARTS), "Which parts."),
        "works": flags.DEFINE_list("works", list(WORKS), "Which works."),
        "configurations": flags.DEFINE_list(
            "configurations", list(limits.CONFIGURATIONS), "Which configurations of the kernels."
        ),
        "spacings": flags.DEFINE_list("spacings", ["1", "4"], "Chunks between two kept states."),
        "widths": flags.DEFINE_list("widths", list(map(str, limits.HEAD_SIZES)), "Of shapes."),
        "lengths": flags.DEFINE_list(
            "lengths", [str(1 << power) for power in range(10, 18)], "Tokens, in scaling."
        ),
        "checked_tokens": flags.DEFINE_integer("checked_tokens", 1024, "Of a comparison.", 1),
        "repeats": flags.DEFINE_integer("repeats", 5, "Timed runs per row.", 1),
        "calls": flags.DEFINE_integer("calls", 10, "Calls of a timed run.", 1),
        "smoke": flags.DEFINE_bool(
            "smoke", False, "Tiny heads and few rows, for a CPU in a minute."
        ),
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)

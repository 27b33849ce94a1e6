"""How fast are the kernels of TTT-MLP, with how many warps, and are they right?

``python -m benchmarks.layers_mlp --out=FILE`` times, in bfloat16, 16 heads of 64 with 256 hidden
features, four sequences of 8,192 tokens (``long``) and 64 of 1,024 (``many``), forward, and forward
and backward: the kernels with every number of warps, after outputs and all eleven gradients were
compared with XLA's in float32 over 1,024 tokens of random data (a relative error over 1e-2 is
marked wrong; gradients of what heads and sequences share are compared before they are summed, as
random ones cancel), and the dual form in XLA. ``shapes``: the errors at all sizes that they take.
Medians; compilation apart.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from benchmarks import options
from benchmarks.layers import (
    CHUNK,
    DTYPE,
    LIMIT,
    SMOKE,
    WORKS,
    Work,
    both_times,
    cotangent,
    described,
    measured,
    relative_error,
    with_gradients,
)
from experiments import launch, provenance
from ttt_jax import layers
from ttt_jax.kernels.ttt_linear.limits import Configuration, Tiles
from ttt_jax.kernels.ttt_mlp import layer, limits

PARTS = ("kernels", "xla", "shapes")
_EVERY = layer.Tokens(0, 0, 0, 0)
# Sequences and heads, ``[B, H, ...]``; weights and norm are of a head.
_HEAD = layer.Operands(_EVERY, layer.Shared(None, 0, 0), layer.State(0, 0, 0, 0))
_SEQUENCE = layer.Operands(
    _EVERY, layer.Shared(None, None, None), layer.State(None, None, None, None)
)
# Of every sequence and head its own.
_APART = layer.Operands(_EVERY, layer.Shared(0, 0, 0), layer.State(0, 0, 0, 0))


def inputs(work: Work, hidden: int, dtype: Any = DTYPE) -> layer.Operands:
    """Random tokens ``[B, H, T, d]``, weights and norm of each head, positions of a chunk."""
    batch, tokens, heads, width = work
    keys = jax.random.split(jax.random.key(0), 11)
    draw = lambda index, *shape: jax.random.normal(keys[index], shape)  # noqa: E731
    rows = [0.3 * draw(index, batch, heads, tokens, width).astype(dtype) for index in range(3)]
    gate = 0.1 * jax.nn.sigmoid(draw(3, batch, heads, tokens)) / width
    scale = (1 + 0.1 * draw(4, CHUNK)) / jnp.arange(1.0, CHUNK + 1)
    norm = 1 + 0.1 * draw(5, heads, width), 0.1 * draw(6, heads, width)
    first = 0.1 * draw(7, heads, width, hidden), 0.02 * draw(8, heads, hidden)
    second = 0.1 * draw(9, heads, hidden, width), 0.02 * draw(10, heads, width)
    return layer.Operands(
        layer.Tokens(*rows, gate), layer.Shared(scale, *norm), layer.State(*first, *second)
    )


def mapped(function: Any, operands: layer.Operands) -> jax.Array:
    """Outputs of a function of one head, over sequences and heads; of :func:`apart`, too."""
    axes = (_APART, _APART) if operands.shared.scale.ndim == 3 else (_HEAD, _SEQUENCE)
    result: jax.Array = jax.vmap(jax.vmap(function, axes[:1]), axes[1:])(operands)
    return result


def apart(operands: layer.Operands) -> layer.Operands:
    """The operands with positions, norm and weights of every sequence and head, ``[B, H, ...]``."""
    heads = operands.tokens.q.shape[:2]

    def spread(leaf: jax.Array, own: int) -> jax.Array:
        return jnp.broadcast_to(leaf, (*heads, *leaf.shape[leaf.ndim - own :]))

    return layer.Operands(
        operands.tokens,
        layer.Shared(*(spread(leaf, 1) for leaf in operands.shared)),
        layer.State(*map(spread, operands.state, (2, 1, 2, 1))),
    )


def kernels(
    operands: layer.Operands, *, spacing: int = 4, configuration: Configuration | None = None
) -> jax.Array:
    """Outputs of every head and sequence."""
    one = functools.partial(layer.run, spacing=spacing, configuration=configuration)
    return mapped(lambda each: one(each)[0], operands)


def dual(operands: layer.Operands) -> jax.Array:
    """:func:`kernels` in XLA."""

    def one(each: layer.Operands) -> jax.Array:
        (q, k, v, gate), (scale, *norm), state = each
        return layers.ttt_mlp(
            q, k, v, gate, scale, tuple(state), tuple(norm), chunk_size=CHUNK, form="dual"
        )[0]

    return mapped(one, operands)


@functools.lru_cache(maxsize=1)
def reference(work: Work, hidden: int, dtype: Any) -> tuple[layer.Operands, jax.Array, Any]:
    """Random operands apart, a cotangent, and outputs and gradients of XLA in float32."""
    operands = apart(inputs(work, hidden, dtype))
    dout = cotangent(operands.tokens.q.shape)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), operands)
    with jax.default_matmul_precision("highest"):
        due = jax.jit(with_gradients(dual))(wide, dout)
    return operands, dout, due


def errors_of(function: Any, work: Work, hidden: int, dtype: Any) -> dict[str, float]:
    """Relative, of outputs without and with a backward pass, and of the eleven gradients."""
    operands, dout, due = reference(work, hidden, dtype)
    out, grads = jax.jit(with_gradients(function))(operands, dout)
    found = {"forward": jax.jit(function)(operands), "out": out} | _named(grads)
    wanted = {"forward": due[0], "out": due[0]} | _named(due[1])
    errors = {}
    for name, exact in wanted.items():
        errors[name] = relative_error(found[name], exact)
    return errors


def _named(grads: layer.Operands) -> dict[str, jax.Array]:
    return {name: leaf for part in grads for name, leaf in part._asdict().items()}


def kernel_row(warps: int, work: Work, hidden: int, settings: Any) -> dict[str, Any]:
    """Errors with so many warps, then times."""
    configuration = Configuration(Tiles(warps), Tiles(warps), parts=False)
    run = functools.partial(kernels, spacing=settings.spacing, configuration=configuration)
    checked = Work(4, settings.checked_tokens, 4, work.width)
    row: dict[str, Any] = {"errors": errors_of(run, checked, hidden, DTYPE)}
    row["right"] = max(row["errors"].values()) <= LIMIT
    operands = inputs(work, hidden)
    return row | both_times(run, operands, cotangent(operands.tokens.q.shape), settings)


def shape_row(width: int, hidden: int, dtype: Any, settings: Any) -> dict[str, Any]:
    """Errors at these sizes."""
    work = Work(4, settings.checked_tokens, 4, width)
    errors = errors_of(functools.partial(kernels, spacing=settings.spacing), work, hidden, dtype)
    worst = max(errors.values())
    return {"errors": errors, "worst": worst, "right": worst <= LIMIT}


def rows_of(settings: Any) -> Iterator[dict[str, Any]]:
    """All that is asked for."""
    works = SMOKE if settings.smoke else WORKS
    hidden = 64 if settings.smoke else 256
    for name in settings.works:
        work = works[name]
        if "kernels" in settings.parts:
            for warps in map(int, settings.warps):
                row = functools.partial(kernel_row, warps, work, hidden, settings)
                about = {"part": "kernels", "work": name, "way": f"{warps} warps"}
                yield about | measured(row)
        if "xla" in settings.parts:
            operands = inputs(work, hidden)
            dout = cotangent(operands.tokens.q.shape)
            row = functools.partial(both_times, dual, operands, dout, settings)
            yield {"part": "xla", "work": name, "way": "xla"} | measured(row)
    if "shapes" in settings.parts:
        most = 1 if settings.smoke else None
        sizes = (limits.HEAD_SIZES[:most], limits.HIDDEN_SIZES[:most], limits.DTYPES[-1:])
        sizes = sizes if settings.smoke else (*sizes[:2], limits.DTYPES)
        for width, hidden_size, dtype in itertools.product(*sizes):
            if not limits.fits(width, hidden_size, CHUNK, dtype):
                continue
            row = functools.partial(shape_row, width, hidden_size, jnp.dtype(dtype), settings)
            yield {"part": "shapes", "way": f"{width} {hidden_size} {dtype}"} | measured(row)


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Measures what is asked for, and writes the record after every row."""
    launch.chosen("part", settings.parts, PARTS)
    launch.chosen("work", settings.works, WORKS)
    launch.chosen("number of warps", settings.warps, ("4", "8", "16"))
    path = launch.new_file(out)
    settings = ml_collections.ConfigDict(settings)
    if settings.smoke:
        settings.update({"checked_tokens": 64, "repeats": 1, "calls": 1})
    record = provenance.of(settings) | {"rows": []}
    for row in rows_of(settings):
        record["rows"].append(row)
        launch.write_json(path, record)
        print(described(row), flush=True)
    return record


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "parts": flags.DEFINE_list("parts", list(PARTS), "Which parts."),
        "works": flags.DEFINE_list("works", list(WORKS), "Which works."),
        "warps": flags.DEFINE_list("warps", ["4", "8", "16"], "Of a program."),
        "spacing": flags.DEFINE_integer("spacing", 4, "Chunks between two kept states.", 1),
        "checked_tokens": flags.DEFINE_integer("checked_tokens", 1024, "Of a comparison.", 1),
        "repeats": flags.DEFINE_integer("repeats", 5, "Timed runs per row.", 1),
        "calls": flags.DEFINE_integer("calls", 3, "Calls of a timed run.", 1),
        "smoke": flags.DEFINE_bool("smoke", False, "Tiny heads, for a CPU in a minute."),
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)

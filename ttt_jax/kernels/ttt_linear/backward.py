"""Kernels of TTT-Linear's backward pass: from the last chunk to the first, whole or in three parts.

In three parts, what a chunk's gradients need of itself alone, and their shares by way of its
outputs, are made for all chunks at once; then the gradients of the weights chunk by chunk; then the
tokens' shares by way of the inner losses for all at once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ttt_jax.kernels.ttt_linear import derivatives, forward, programs
from ttt_jax.kernels.ttt_linear.algebra import Chunk, Inner, Shared, State
from ttt_jax.kernels.ttt_linear.derivatives import Gradients, Prepared
from ttt_jax.kernels.ttt_linear.limits import Tiles
from ttt_jax.kernels.ttt_linear.programs import Plan, Tokens

_VECTORS = ("rate", "mean_pull", "along")


class Backward(NamedTuple):
    """What all kernels of the pass read.

    Attributes:
      tokens: of the call.
      shared: of the call.
      states: before each chunk, ``[chunks, ...]``.
      dout: ``[T, d]``.
    """

    tokens: Tokens
    shared: Shared
    states: State
    dout: jax.Array


_ROWS = ("q", "k", "v", "gate", "dout")


class Sums(NamedTuple):
    """Of what all chunks have in common.

    Attributes:
      scale: ``[c]``.
      gamma: ``[d]``.
      beta: ``[d]``.
    """

    scale: jax.Array
    gamma: jax.Array
    beta: jax.Array


_SUMMED = Sums._fields


def _store(refs: Any, made: Gradients, place: Any) -> None:
    """What there is of the tokens' gradients."""
    for name, value in zip(Gradients._fields, made, strict=True):
        if value is not None and name not in _SUMMED:
            ref = getattr(refs, f"d{name}")
            ref[place, ...] = value.astype(ref.dtype)


def _store_sums(refs: Any, sums: Any) -> None:
    for name in _SUMMED:
        getattr(refs, f"d{name}")[...] = getattr(sums, name)


def _whole_kernel(refs: Any, *, plan: Plan) -> None:
    shared = programs.shared_of(refs)
    chunk, final = plan.chunk, np.int32(plan.chunks - 1)

    def load(index: Any) -> Any:
        rows = programs.loaded(refs, _ROWS, index, chunk)
        return rows, refs.weights[index, :, :], refs.biases[index, :]

    def one(step: Any, carry: Any) -> Any:
        index = final - step
        later, sums, tiled = carry
        following = load(jnp.maximum(index - 1, np.int32(0)))
        (*rows, dout), weight, bias = tiled
        dout = dout.astype(jnp.float32)
        whole = programs.wholeness(plan, index)
        tokens = programs.chunk_of(rows, shared, whole)
        state = State(weight.astype(jnp.float32), bias)
        ready, read = derivatives.read(state, tokens, dout, shared)
        ends = derivatives.Ends(state, later, whole)
        learned, dz = derivatives.learned(ready, tokens, ends, shared)
        before = derivatives.earlier(ready, dz, tokens, later, shared)
        made = derivatives.total(read, learned)
        _store(refs, made, pl.ds(index * chunk, chunk))
        sums = Sums(*[a + getattr(made, n) for a, n in zip(sums, _SUMMED, strict=True)])
        return before, sums, following

    later = State(refs.last_weight[...], refs.last_bias[...])
    sums = Sums(*[jnp.zeros(getattr(refs, n).shape, jnp.float32) for n in _SUMMED])
    first = load(final)
    later, sums, _ = programs.loop(plan.chunks, one, (later, sums, first))
    refs.dweight[...] = later.weight
    refs.dbias[...] = later.bias
    _store_sums(refs, sums)


def _tokens_kernel(refs: Any, *, plan: Plan) -> None:
    shared = programs.shared_of(refs)
    k, v, gate, dk = programs.loaded(refs, ("k", "v", "gate", "dk_read"), 0, plan.chunk)
    whole = programs.wholeness(plan, pl.program_id(0))
    chunk = programs.chunk_of((None, k, v, gate), shared, whole)
    later = State(refs.later_weight[...].astype(jnp.float32), refs.later_bias[...])
    ends = derivatives.Ends(forward.state_of(refs), later, whole)
    ready = _ready(*_stored(refs, 0, plan.chunk))
    made, _ = derivatives.learned(ready, chunk, ends, shared)
    _store(refs, made._replace(k=made.k + dk.astype(jnp.float32)), pl.ds(0, plan.chunk))
    _store_sums(refs, made)


def _gradient_blocks(
    given: Backward, plan: Plan, count: int, names: tuple[str, ...] = ("q", "k", "v")
) -> dict[str, Any]:
    """Of gradients: rows of the tokens, and a share of the sums for each of ``count`` programs."""
    tokens, width = given.tokens, given.dout.shape[1]
    each = plan.chunks // count * plan.chunk
    like = jax.ShapeDtypeStruct(tokens.k.shape, tokens.k.dtype)
    sizes = dict(zip(_SUMMED, (plan.chunk, width, width), strict=True))
    return {
        **{f"d{name}": programs.rows(like, each) for name in names},
        "dgate": programs.rows(programs.float32(tokens.gate.shape[0]), each),
        **{f"d{n}": programs.entry(programs.float32(count, size)) for n, size in sizes.items()},
    }


def _gradients(made: dict[str, jax.Array], *others: dict[str, jax.Array]) -> Gradients:
    """The first one's, with the others' shares in what is float32."""
    every = (made, *others)
    sums: Any = {name: sum(each[f"d{name}"].sum(0) for each in every) for name in _SUMMED}
    gate = sum((each["dgate"] for each in others), made["dgate"])
    return Gradients(made["dq"], made["dk"], made["dv"], gate, **sums)


def _inputs(given: Backward, rows: int) -> dict[str, Any]:
    return {
        **programs.of_tokens(given.tokens, rows),
        **programs.of_shared(given.shared),
        "dout": programs.rows(given.dout, rows),
    }


def whole(plan: Plan, tiles: Tiles, given: Backward, later: State) -> tuple[Gradients, State]:
    """All gradients in one scan; ``later [1, ...]`` are those of the last weights."""
    width, total = given.dout.shape[1], plan.chunks
    inputs = {
        **_inputs(given, total * plan.chunk),
        "weights": programs.rows(given.states.weight, total),
        "biases": programs.rows(given.states.bias, total),
        "last_weight": programs.entry(later.weight),
        "last_bias": programs.entry(later.bias),
    }
    outputs = {
        **_gradient_blocks(given, plan, 1),
        "dweight": programs.entry(programs.float32(1, width, width)),
        "dbias": programs.entry(programs.float32(1, width)),
    }
    kernel = functools.partial(_whole_kernel, plan=plan)
    made = programs.call(kernel, "ttt_linear_back", tiles, 1, (inputs, outputs))
    return _gradients(made), State(made["dweight"], made["dbias"])


def _prepare_kernel(refs: Any, *, plan: Plan) -> None:
    shared = programs.shared_of(refs)
    *rows, dout = programs.loaded(refs, _ROWS, 0, plan.chunk)
    chunk = programs.chunk_of(rows, shared, 1.0)
    state = forward.state_of(refs)
    (inner, output, pulled), made = derivatives.read(state, chunk, dout.astype(jnp.float32), shared)
    halves = [jnp.stack(pair, axis=-1) for pair in ((inner.unit, output), (inner.pull, pulled))]
    refs.tiles[...] = jnp.swapaxes(jnp.stack(halves, axis=-1), 0, 1).astype(refs.tiles.dtype)
    for place, name in enumerate(_VECTORS):
        refs.vectors[place, :] = getattr(inner, name)
    _store(refs, made, pl.ds(0, plan.chunk))
    _store_sums(refs, made)


def _stored(refs: Any, index: Any, chunk: int) -> Any:
    """What was prepared for the chunk with this index, as it is stored."""
    place = pl.ds(index * chunk, chunk)
    return refs.tiles[place, :, :, :], [refs.vectors[row, place] for row in range(len(_VECTORS))]


def _ready(tiles: jax.Array, vectors: list[jax.Array]) -> Prepared:
    halves = jnp.unstack(jnp.swapaxes(tiles, 0, 1).astype(jnp.float32), axis=-1)
    (unit, output), (pull, pulled) = (jnp.unstack(half, axis=-1) for half in halves)
    return Prepared(Inner(unit, pull, *vectors), output, pulled)


def prepare(plan: Plan, given: Backward) -> dict[str, jax.Array]:
    """What the chunks' gradients need of themselves alone, and the shares by way of the outputs.

    Tiles ``[T, d, 2, 2]``, which stand together so that the scan brings them to its layout at once;
    vectors ``[3, T]``.
    """
    tokens = given.tokens
    length, width = tokens.k.shape
    inputs = {
        **_inputs(given, plan.chunk),
        "weight": programs.entry(given.states.weight),
        "bias": programs.entry(given.states.bias),
    }
    tiles_of = jax.ShapeDtypeStruct((length, width, 2, 2), tokens.k.dtype)
    vectors = programs.float32(len(_VECTORS), length)
    outputs = {
        "tiles": programs.rows(tiles_of, plan.chunk),
        "vectors": programs.columns(vectors, plan.chunk),
        **_gradient_blocks(given, plan, plan.chunks, ("q", "k")),
    }
    kernel = functools.partial(_prepare_kernel, plan=plan)
    return programs.call(kernel, "ttt_linear_prepare", Tiles(), plan.chunks, (inputs, outputs))


def _weights_kernel(refs: Any, *, plan: Plan, tiles: Tiles) -> None:
    shared = programs.shared_of(refs)
    chunk, final = plan.chunk, np.int32(plan.chunks - 1)

    _, stored = programs.shared_by(tiles)

    def keep(index: Any, later: State) -> None:
        refs.later_weight[index, :, :] = later.weight.astype(refs.later_weight.dtype)
        refs.later_bias[index, :] = later.bias

    def load(index: Any) -> Any:
        return programs.loaded(refs, ("q", "k", "gate"), index, chunk), _stored(refs, index, chunk)

    def one(step: Any, carry: Any) -> Any:
        index = final - step
        later, tiled = carry
        following = load(jnp.maximum(index - 1, np.int32(0)))
        (q, k, gate), prepared = tiled
        stored(index, functools.partial(keep, index, later))
        # The values count in what was prepared alone.
        whole = programs.wholeness(plan, index)
        tokens: Chunk = programs.chunk_of((q, k, k, gate), shared, whole)
        return derivatives.scanned(_ready(*prepared), tokens, later, shared), following

    later = State(refs.last_weight[...], refs.last_bias[...])
    first = load(final)
    later, _ = programs.loop(plan.chunks, one, (later, first))
    refs.dweight[...] = later.weight
    refs.dbias[...] = later.bias


def _weights(
    plan: Plan, tiles: Tiles, given: Backward, ready: dict[str, jax.Array], later: State
) -> tuple[State, State]:
    """The gradients of the weights after each chunk, and of the first ones."""
    tokens, total = given.tokens, plan.chunks
    length, width = tokens.k.shape
    named = {"q": tokens.q, "k": tokens.k, "gate": tokens.gate, "tiles": ready["tiles"]}
    inputs = {
        **{name: programs.rows(array, length) for name, array in named.items()},
        **programs.of_shared(given.shared),
        "vectors": programs.columns(ready["vectors"], length),
        "last_weight": programs.entry(later.weight),
        "last_bias": programs.entry(later.bias),
    }
    stored = jax.ShapeDtypeStruct((total, width, width), tokens.k.dtype)
    outputs = {
        "later_weight": programs.rows(stored, total),
        "later_bias": programs.rows(programs.float32(total, width), total),
        "dweight": programs.entry(programs.float32(1, width, width)),
        "dbias": programs.entry(programs.float32(1, width)),
    }
    kernel = functools.partial(_weights_kernel, plan=plan, tiles=tiles)
    made = programs.call(kernel, "ttt_linear_back_weights", tiles, 1, (inputs, outputs))
    after = State(made["later_weight"], made["later_bias"])
    return after, State(made["dweight"], made["dbias"])


def in_parts(plan: Plan, tiles: Tiles, given: Backward, later: State) -> tuple[Gradients, State]:
    """:func:`whole` in three parts, of which ``tiles`` are of the scan."""
    ready = prepare(plan, given)
    after, first = _weights(plan, tiles, given, ready, later)
    blocks = _inputs(given, plan.chunk)
    inputs = {name: blocks[name] for name in ("k", "v", "gate", "scale", "gamma", "beta")}
    inputs |= {
        "weight": programs.entry(given.states.weight),
        "bias": programs.entry(given.states.bias),
        "later_weight": programs.entry(after.weight),
        "later_bias": programs.entry(after.bias),
        "tiles": programs.rows(ready["tiles"], plan.chunk),
        "vectors": programs.columns(ready["vectors"], plan.chunk),
        "dk_read": programs.rows(ready["dk"], plan.chunk),
    }
    outputs = _gradient_blocks(given, plan, plan.chunks, ("k", "v"))
    kernel = functools.partial(_tokens_kernel, plan=plan)
    name = "ttt_linear_back_tokens"
    made = programs.call(kernel, name, Tiles(), plan.chunks, (inputs, outputs))
    return _gradients(made | {"dq": ready["dq"]}, ready), first

"""Kernels of TTT-Linear's forward pass: the scan of the chunks, and outputs of all at once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ttt_jax.kernels.ttt_linear import algebra, programs
from ttt_jax.kernels.ttt_linear.algebra import Shared, State
from ttt_jax.kernels.ttt_linear.limits import Tiles
from ttt_jax.kernels.ttt_linear.programs import Plan, Tokens


class Part(NamedTuple):
    """What the programs of a scan do.

    Attributes:
      programs: each has as many consecutive chunks of its own.
      reads: whether they make the outputs.
      every: chunks between two states that they store; 0 for none.
      first: whether they begin at the weights of the call, ``[d, d]`` with a column for each
        feature of the output, and with means.
    """

    programs: int
    reads: bool
    every: int
    first: bool = True


class Scanned(NamedTuple):
    """Of a scan.

    Attributes:
      out: ``[T, d]``, or None.
      last: weights and bias after each program's chunks, ``[programs, ...]``.
      states: weights in the operands' dtype and biases, before the chunks at which they are
        stored; or None.
    """

    out: jax.Array | None
    last: State
    states: Any


def _scan_kernel(refs: Any, *, plan: Plan, tiles: Tiles, part: Part, per_step: int) -> None:
    shared = programs.shared_of(refs)
    chunk, held = plan.chunk, plan.chunks // part.programs
    steps = held // per_step
    names = ("q", "k", "v", "gate") if part.reads else ("k", "v", "gate")
    program, stored = programs.shared_by(tiles)
    before = program * held

    def load(step: Any) -> Any:
        at = [step * per_step + place for place in range(per_step)]
        return [programs.loaded(refs, names, index, chunk) for index in at]

    def one(step: Any, carry: Any) -> Any:
        state, tiled = carry
        # What the next step works on travels while this one computes.
        following = load(jnp.minimum(step + 1, np.int32(steps - 1))) if tiles.prefetch else None
        tiled = tiled if tiles.prefetch else load(step)
        chunks = []
        for place, values in enumerate(tiled):
            q = values[0] if part.reads else None
            index = before + step * per_step + place
            whole = programs.wholeness(plan, index)
            chunks.append(programs.chunk_of((q, *values[-3:]), shared, whole))
        made = [inner.gradient for inner in algebra.learn(state, chunks, shared)]
        if part.reads:
            for place in range(per_step):
                read = functools.partial(read_one, place, step, state, chunks, made)
                stored(step * per_step + place, read)
        return algebra.moved(state, chunks, made, shared), following

    def read_one(place: int, step: Any, state: State, chunks: Any, made: Any) -> None:
        seen, gradients = chunks[: place + 1], made[: place + 1]
        out = algebra.read(state, seen, gradients, shared)
        rows = pl.ds((step * per_step + place) * chunk, chunk)
        refs.out[rows, :] = out.astype(refs.out.dtype)

    def keep(index: Any, state: State) -> None:
        refs.weights[index, :, :] = state.weight.astype(refs.weights.dtype)
        refs.biases[index, :] = state.bias

    def group(index: Any, carry: Any) -> Any:
        if part.every:
            stored(index, functools.partial(keep, index, carry[0]))
        inside = steps // groups
        return programs.loop(inside, lambda i, c: one(index * inside + i, c), carry)

    groups = held // part.every if part.every else 1
    first = load(np.int32(0)) if tiles.prefetch else None
    start = algebra.centered(state_of(refs)) if part.first else state_of(refs)
    state, _ = programs.loop(groups, group, (start, first))
    refs.last_weight[...] = state.weight
    refs.last_bias[...] = state.bias


def scan(
    plan: Plan, tiles: Tiles, tokens: Tokens, shared: Shared, start: State, part: Part
) -> Scanned:
    """The chunks of each program one after another, from ``start`` (``[programs, ...]``) on."""
    held = plan.chunks // part.programs
    per_step = plan.per_step(tiles, part.every or held)
    width = tokens.k.shape[1]
    inputs = {
        **programs.of_tokens(tokens if part.reads else tokens._replace(q=None), held * plan.chunk),
        **programs.of_shared(shared),
        "weight": programs.entry(start.weight),
        "bias": programs.entry(start.bias),
    }
    outputs = {
        "last_weight": programs.entry(programs.float32(part.programs, width, width)),
        "last_bias": programs.entry(programs.float32(part.programs, width)),
    }
    if part.reads:
        out = jax.ShapeDtypeStruct(tokens.k.shape, tokens.k.dtype)
        outputs["out"] = programs.rows(out, held * plan.chunk)
    if part.every:
        kept = held // part.every
        shape = (part.programs * kept, width, width)
        weights = jax.ShapeDtypeStruct(shape, tokens.k.dtype)
        outputs["weights"] = programs.rows(weights, kept)
        outputs["biases"] = programs.rows(programs.float32(*shape[:2]), kept)
    kernel = functools.partial(_scan_kernel, plan=plan, tiles=tiles, part=part, per_step=per_step)
    made = programs.call(kernel, "ttt_linear_scan", tiles, part.programs, (inputs, outputs))
    states = State(made["weights"], made["biases"]) if part.every else None
    return Scanned(made.get("out"), State(made["last_weight"], made["last_bias"]), states)


def _read_kernel(refs: Any, *, plan: Plan, per_step: int) -> None:
    shared = programs.shared_of(refs)
    state = state_of(refs)
    chunks = []
    for place in range(per_step):
        values = programs.loaded(refs, ("q", "k", "v", "gate"), place, plan.chunk)
        whole = programs.wholeness(plan, pl.program_id(0) * per_step + place)
        chunks.append(programs.chunk_of(values, shared, whole))
    made = [inner.gradient for inner in algebra.learn(state, chunks, shared)]
    for place in range(per_step):
        seen, gradients = chunks[: place + 1], made[: place + 1]
        out = algebra.read(state, seen, gradients, shared)
        refs.out[pl.ds(place * plan.chunk, plan.chunk), :] = out.astype(refs.out.dtype)


def state_of(refs: Any) -> State:
    """On chip, of a program that has one."""
    return State(refs.weight[...].astype(jnp.float32), refs.bias[...])


def read(
    plan: Plan, tiles: Tiles, tokens: Tokens, shared: Shared, states: State, per_step: int
) -> jax.Array:
    """``[T, d]``: the outputs of all chunks, from the state before every ``per_step`` of them."""
    inputs = {
        **programs.of_tokens(tokens, per_step * plan.chunk),
        **programs.of_shared(shared),
        "weight": programs.entry(states.weight),
        "bias": programs.entry(states.bias),
    }
    out = jax.ShapeDtypeStruct(tokens.k.shape, tokens.k.dtype)
    outputs = {"out": programs.rows(out, per_step * plan.chunk)}
    kernel = functools.partial(_read_kernel, plan=plan, per_step=per_step)
    grid = plan.chunks // per_step
    return programs.call(kernel, "ttt_linear_read", tiles, grid, (inputs, outputs))["out"]

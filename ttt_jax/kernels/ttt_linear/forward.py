"""The kernel of TTT-Linear's forward pass: the scan of the chunks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ttt_jax.kernels.ttt_linear import algebra, programs
from ttt_jax.kernels.ttt_linear.algebra import Chunk, Shared, State
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


def _scan_kernel(refs: Any, *, plan: Plan, tiles: Tiles, part: Part) -> None:
    shared = programs.shared_of(refs)
    chunk, held = plan.chunk, plan.chunks // part.programs
    names = ("q", "k", "v", "gate") if part.reads else ("k", "v", "gate")
    program, stored = programs.shared_by(tiles)
    before, final = program * held, np.int32(held - 1)

    def load(index: Any) -> Any:
        return programs.loaded(refs, names, index, chunk)

    def one(index: Any, carry: Any) -> Any:
        state, values = carry
        # What the next chunk works on travels while this one computes.
        following = load(jnp.minimum(index + 1, final))
        q = values[0] if part.reads else None
        whole = programs.wholeness(plan, before + index)
        tokens = programs.chunk_of((q, *values[-3:]), shared, whole)
        gradient = algebra.learn(state, tokens, shared).gradient
        if part.reads:
            stored(index, functools.partial(read, index, state, tokens, gradient))
        return algebra.moved(state, tokens, gradient, shared), following

    def read(index: Any, state: State, tokens: Chunk, gradient: jax.Array) -> None:
        out = algebra.read(state, tokens, gradient, shared)
        refs.out[pl.ds(index * chunk, chunk), :] = out.astype(refs.out.dtype)

    def keep(index: Any, state: State) -> None:
        refs.weights[index, :, :] = state.weight.astype(refs.weights.dtype)
        refs.biases[index, :] = state.bias

    def group(index: Any, carry: Any) -> Any:
        if part.every:
            stored(index, functools.partial(keep, index, carry[0]))
        inside = held // groups
        return programs.loop(inside, lambda i, c: one(index * inside + i, c), carry)

    groups = held // part.every if part.every else 1
    values = load(np.int32(0))
    start = algebra.centered(state_of(refs)) if part.first else state_of(refs)
    state, _ = programs.loop(groups, group, (start, values))
    refs.last_weight[...] = state.weight
    refs.last_bias[...] = state.bias


def state_of(refs: Any) -> State:
    """On chip, of a program that has one."""
    return State(refs.weight[...].astype(jnp.float32), refs.bias[...])


def scan(
    plan: Plan, tiles: Tiles, tokens: Tokens, shared: Shared, start: State, part: Part
) -> Scanned:
    """The chunks of each program one after another, from ``start`` (``[programs, ...]``) on."""
    held = plan.chunks // part.programs
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
    kernel = functools.partial(_scan_kernel, plan=plan, tiles=tiles, part=part)
    made = programs.call(kernel, "ttt_linear_scan", tiles, part.programs, (inputs, outputs))
    states = State(made["weights"], made["biases"]) if part.every else None
    return Scanned(made.get("out"), State(made["last_weight"], made["last_bias"]), states)

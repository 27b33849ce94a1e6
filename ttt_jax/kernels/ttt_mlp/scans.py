"""The kernels of TTT-MLP: the scan of the chunks, and the scan of their derivatives.

Each program is one head of one sequence and keeps the weights, or on the way back their gradients,
from chunk to chunk without storing them. Written in Pallas for its Triton backend.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ttt_jax.kernels.ttt_linear import programs
from ttt_jax.kernels.ttt_linear.algebra import product
from ttt_jax.kernels.ttt_linear.programs import Plan
from ttt_jax.kernels.ttt_mlp import algebra, limits
from ttt_jax.kernels.ttt_mlp.algebra import Shared, State, Tokens
from ttt_jax.kernels.ttt_mlp.gradient import chunk_gradient

_TOKENS, _SHARED, _STATE = Tokens._fields, Shared._fields, State._fields


def _of(refs: Any, names: tuple[str, ...]) -> list[Any]:
    return [getattr(refs, name) for name in names]


def _tokens(refs: Any, index: Any, chunk: int) -> Tokens:
    stored = programs.loaded(refs, _TOKENS, index, chunk)
    return Tokens(*(leaf.astype(jnp.float32) for leaf in stored))


def _shared(refs: Any) -> Shared:
    return Shared(*(ref[...] for ref in _of(refs, _SHARED)))


def _forward_kernel(refs: Any, *, plan: Plan, groups: int, every: int, reads: bool) -> None:
    """One of ``groups`` programs, with ``chunks / groups`` consecutive chunks."""
    shared = _shared(refs)
    dot = functools.partial(product, operand=refs.k.dtype)
    held = plan.chunks // groups
    before = pl.program_id(0) * np.int32(held)
    start = State(*(ref[...].astype(jnp.float32) for ref in _of(refs, _STATE)))

    def one(index: Any, state: State) -> State:
        tokens = _tokens(refs, index, plan.chunk)
        whole = programs.wholeness(plan, before + index)
        state, out = algebra.chunk(state, tokens, shared, whole, dot)
        if reads:
            refs.out[pl.ds(index * plan.chunk, plan.chunk), :] = out.astype(refs.out.dtype)
        return state

    def group(index: Any, state: State) -> State:
        if every:
            for name, leaf in zip(_STATE, state, strict=True):
                ref = getattr(refs, f"kept_{name}")
                place = (index, *[slice(None)] * leaf.ndim)
                ref[place] = leaf.astype(ref.dtype)
        inside = held // parts
        return programs.loop(inside, lambda i, s: one(index * np.int32(inside) + i, s), state)

    parts = held // every if every else 1
    last = programs.loop(parts, group, start)
    if reads:
        for name, leaf in zip(_STATE, last, strict=True):
            getattr(refs, f"last_{name}")[...] = leaf


class Scanned(NamedTuple):
    """Of a scan forward.

    Attributes:
      out: ``[T, d]``, or None.
      last: the state after the last whole chunk, or None.
      kept: states before chunks, ``[kept, ...]``, matrices in the operands' dtype; or None.
    """

    out: Any
    last: Any
    kept: Any


def forward(
    plan: Plan, tokens: Tokens, shared: Shared, starts: State, every: int, reads: bool
) -> Scanned:
    """All chunks from the states ``starts`` (``[programs, ...]``) on.

    Args:
      plan: of the call.
      tokens: of the sequence.
      shared: of all chunks.
      starts: of each program, which has as many consecutive chunks as another.
      every: chunks between two states that are kept; 0 for none.
      reads: whether outputs and the last state are made.
    """
    groups = len(starts.first)
    held = plan.chunks // groups
    inputs = {
        **{n: programs.rows(leaf, held * plan.chunk) for n, leaf in tokens._asdict().items()},
        **{name: programs.same(leaf) for name, leaf in shared._asdict().items()},
        **{name: programs.entry(leaf) for name, leaf in starts._asdict().items()},
    }
    outputs: dict[str, Any] = {}
    if reads:
        out = jax.ShapeDtypeStruct(tokens.k.shape, tokens.k.dtype)
        outputs["out"] = programs.rows(out, held * plan.chunk)
        outputs |= {
            f"last_{n}": programs.entry(_like(leaf)) for n, leaf in starts._asdict().items()
        }
    if every:
        kept = held // every
        for name, leaf in starts._asdict().items():
            dtype = tokens.k.dtype if leaf.ndim == 3 else jnp.float32
            shape = jax.ShapeDtypeStruct((groups * kept, *leaf.shape[1:]), dtype)
            outputs[f"kept_{name}"] = programs.rows(shape, kept)
    kernel = functools.partial(_forward_kernel, plan=plan, groups=groups, every=every, reads=reads)
    tiles = (plan.configuration or limits.CONFIGURATION).scan
    made = programs.call(kernel, "ttt_mlp_scan", tiles, groups, (inputs, outputs))

    def state(prefix: str) -> Any:
        if f"{prefix}_first" not in made:
            return None
        return State(*(made[f"{prefix}_{name}"] for name in _STATE))

    return Scanned(made.get("out"), state("last"), state("kept"))


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)


def _backward_kernel(refs: Any, *, plan: Plan) -> None:
    shared = _shared(refs)
    dot = functools.partial(product, operand=refs.k.dtype)

    def one(number: Any, carry: Any) -> Any:
        later, of_shared = carry
        index = np.int32(plan.chunks - 1) - number
        place = pl.ds(index * plan.chunk, plan.chunk)
        state = State(*(getattr(refs, f"kept_{n}")[index].astype(jnp.float32) for n in _STATE))
        tokens, whole = _tokens(refs, index, plan.chunk), programs.wholeness(plan, index)
        dout = refs.dout[place, :].astype(jnp.float32)
        made = chunk_gradient(state, tokens, shared, whole, (later, dout), dot)
        for name, leaf in made.tokens._asdict().items():
            ref = getattr(refs, f"d{name}")
            rows = place if leaf.ndim == 1 else (place, slice(None))
            ref[rows] = leaf.astype(ref.dtype)
        added = Shared(made.scale, made.gamma, made.beta)
        return made.state, jax.tree.map(jnp.add, of_shared, added)

    later = State(*(ref[...] for ref in _of(refs, tuple(f"later_{n}" for n in _STATE))))
    # Those of the norm by row: a sum over rows makes all warps wait, and one at the end is enough.
    of_rows = jnp.zeros((plan.chunk, shared.gamma.shape[0]), jnp.float32)
    zeros = Shared(jnp.zeros_like(shared.scale), of_rows, of_rows)
    first, of_shared = programs.loop(plan.chunks, one, (later, zeros))
    of_shared = Shared(of_shared.scale, of_shared.gamma.sum(0), of_shared.beta.sum(0))
    for made in (first, of_shared):
        for name, leaf in made._asdict().items():
            getattr(refs, f"d{name}")[...] = leaf


class Gradients(NamedTuple):
    """Of a call.

    Attributes:
      tokens: as the tokens.
      shared: float32.
      state: of the first state, float32.
    """

    tokens: Tokens
    shared: Shared
    state: State


def backward(
    plan: Plan,
    tokens: Tokens,
    shared: Shared,
    kept: State,
    cotangents: tuple[jax.Array, State],
) -> Gradients:
    """From the last chunk to the first, at the states ``kept`` before each of them."""
    dout, later = cotangents
    length = len(tokens.k)
    inputs = {
        **{n: programs.rows(leaf, length) for n, leaf in tokens._asdict().items()},
        **{name: programs.same(leaf) for name, leaf in shared._asdict().items()},
        **{f"kept_{n}": programs.rows(leaf, plan.chunks) for n, leaf in kept._asdict().items()},
        "dout": programs.rows(dout, length),
        **{f"later_{n}": programs.entry(leaf[None]) for n, leaf in later._asdict().items()},
    }
    shapes = {
        n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in tokens._asdict().items()
    }
    outputs = {f"d{n}": programs.rows(shape, length) for n, shape in shapes.items()}
    single = shared._asdict() | later._asdict()
    outputs |= {f"d{n}": programs.entry(_like(leaf[None])) for n, leaf in single.items()}
    kernel = functools.partial(_backward_kernel, plan=plan)
    tiles = (plan.configuration or limits.CONFIGURATION).back
    made = programs.call(kernel, "ttt_mlp_back", tiles, 1, (inputs, outputs))
    return Gradients(
        Tokens(*(made[f"d{n}"] for n in _TOKENS)),
        Shared(*(made[f"d{n}"][0] for n in _SHARED)),
        State(*(made[f"d{n}"][0] for n in _STATE)),
    )

"""TTT-Linear in kernels, with its derivative and its rule for ``vmap``; needs Pallas' Triton."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels import shared_outputs
from ttt_jax.kernels.ttt_linear import backward, forward, limits, programs
from ttt_jax.kernels.ttt_linear.algebra import Shared, State
from ttt_jax.kernels.ttt_linear.limits import Configuration, Tiles
from ttt_jax.kernels.ttt_linear.programs import Plan, Tokens


class Operands(NamedTuple):
    """Arrays of a call, in the order of their gradients.

    Attributes:
      q: ``[T, d]``, T a multiple of the plan's chunks; as k and v in the operands' dtype.
      k: ``[T, d]``.
      v: ``[T, d]``.
      gate: ``[T]``, float32 as all that follows.
      scale: ``[c]``.
      weight: ``[d, d]``, a column for each feature of the output.
      bias: ``[d]``.
      gamma: ``[d]``.
      beta: ``[d]``.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array
    scale: jax.Array
    weight: jax.Array
    bias: jax.Array
    gamma: jax.Array
    beta: jax.Array


def run(
    operands: Operands, *, spacing: int, configuration: Configuration | None = None
) -> tuple[jax.Array, State]:
    """The layer for one head of one sequence of any length.

    Args:
      operands: any T; weights and bias as they are.
      spacing: chunks between two states that are kept for the backward pass, which makes those
        between again; at least 1.
      configuration: how the kernels run; None for the choice by the number of heads and sequences
        over which the call is mapped.

    Returns:
      ``out [T, d]``, and weights ``[d, d]`` and bias ``[d]`` after the last whole chunk.
    """
    length, chunk = operands.q.shape[0], operands.scale.shape[0]
    plan, rows = programs.planned(list(operands[:4]), chunk, spacing, configuration)
    weight, bias = operands.weight, operands.bias
    q, k, v, gate = rows
    given = operands._replace(q=q, k=k, v=v, gate=gate)
    out, last = _layer(plan, given)
    # Their means never change: they are of no consequence to the layer.
    ended = _centered(last.weight) + _mean(weight), _centered(last.bias) + _mean(bias)
    return out[:length], State(*ended)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(-1, keepdims=True)


def _centered(x: jax.Array) -> jax.Array:
    return x - _mean(x)


def by_programs(
    build: Callable[[int], Callable[..., Any]],
    programs: int = 1,
    mapped: Callable[[Any], Any] = lambda function: function,
) -> Callable[..., Any]:
    """``build(programs)``, where ``programs`` is by how much the call is mapped with ``vmap``.

    A map gives each kernel an axis of programs, as Pallas does; beyond that, how a kernel runs may
    depend on how many there are.
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> Any:
        return mapped(build(programs))(*arrays)

    @call.def_vmap
    def _(size: int, is_mapped: Any, *arrays: Any) -> Any:
        axes = jax.tree.map(lambda each: 0 if each else None, tuple(is_mapped))
        inner = by_programs(
            build, programs * size, lambda function: jax.vmap(mapped(function), in_axes=axes)
        )
        out = inner(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    return call


def _configuration(plan: Plan, programs: int) -> Configuration:
    return plan.configuration or limits.CONFIGURATIONS[limits.chosen(programs)]


def _parts(operands: Operands) -> tuple[Tokens, Shared, State]:
    tokens = Tokens(*operands[:4])
    scale, gamma, beta = operands.scale, operands.gamma, operands.beta
    shared = Shared(scale, gamma, beta, scale[-1], operands.k.dtype)
    return tokens, shared, State(operands.weight[None], operands.bias[None])


def _turned(state: State) -> State:
    """The weights with the other axis first: the kernels have features of the output as rows."""
    return State(jnp.swapaxes(state.weight, -1, -2), state.bias)


def _forward(plan: Plan, keeps: bool) -> Callable[[int], Callable[..., Any]]:
    """By the number of programs: outputs, the last state, and those that are kept or None."""

    def build(programs: int) -> Callable[..., Any]:
        chosen = _configuration(plan, programs)

        def apply(*arrays: jax.Array) -> Any:
            tokens, shared, start = _parts(Operands(*arrays))
            part = forward.Part(1, reads=True, every=plan.size if keeps else 0)
            out, last, states = forward.scan(plan, chosen.scan, tokens, shared, start, part)
            last = _turned(jax.tree.map(lambda leaf: leaf[0], last))
            return (out, last, states) if keeps else (out, last)

        return apply

    return build


def _backward(plan: Plan) -> Callable[[int], Callable[..., Any]]:
    """By the number of programs: all gradients."""

    def build(programs: int) -> Callable[..., Any]:
        chosen = _configuration(plan, programs)

        def apply(operands: Operands, states: State, dout: jax.Array, later: State) -> Operands:
            tokens, shared, _ = _parts(operands)
            if plan.size > 1:
                part = forward.Part(plan.groups, reads=False, every=1, first=False)
                states = forward.scan(plan, Tiles(), tokens, shared, states, part).states
            given = backward.Backward(tokens, shared, states, dout)
            later = _turned(jax.tree.map(lambda leaf: leaf[None], later))
            through = backward.in_parts if chosen.parts else backward.whole
            made, first = through(plan, chosen.back, given, later)
            weight, bias = _turned(jax.tree.map(lambda leaf: leaf[0], first))
            return Operands(**made._asdict(), weight=_centered(weight), bias=_centered(bias))

        return apply

    return build


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(plan: Plan, operands: Operands) -> tuple[jax.Array, State]:
    return by_programs(_forward(plan, keeps=False))(*operands)


def _layer_forward(plan: Plan, operands: Operands) -> tuple[Any, Any]:
    out, last, states = by_programs(_forward(plan, keeps=True))(*operands)
    return (out, last), (operands, states)


def _layer_backward(plan: Plan, saved: Any, cotangents: Any) -> tuple[Operands]:
    dout, later = cotangents
    return (by_programs(_backward(plan))(*saved, dout, later),)


_layer.defvjp(_layer_forward, _layer_backward, **shared_outputs.DECLARED)

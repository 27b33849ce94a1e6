"""TTT-MLP in kernels, with its derivative and its rule for ``vmap``; needs Pallas' Triton."""

import functools
from typing import Any, NamedTuple

import jax

from ttt_jax.kernels import shared_outputs
from ttt_jax.kernels.ttt_linear import programs
from ttt_jax.kernels.ttt_linear.limits import Configuration
from ttt_jax.kernels.ttt_linear.programs import Plan
from ttt_jax.kernels.ttt_mlp import scans
from ttt_jax.kernels.ttt_mlp.algebra import Shared, State, Tokens


class Operands(NamedTuple):
    """Arrays of a call.

    Attributes:
      tokens: ``[T, d]`` and ``[T]``; q, k and v in the operands' dtype, all else float32.
      shared: of all chunks.
      state: before the first token; for :func:`run` the weights ``first`` are ``[d, h]``.
    """

    tokens: Tokens
    shared: Shared
    state: State


def run(
    operands: Operands, *, spacing: int, configuration: Configuration | None = None
) -> tuple[jax.Array, State]:
    """The layer for one head of one sequence of any length.

    Args:
      operands: any T.
      spacing: chunks between two states that are kept for the backward pass, which makes those
        between again; at least 1.
      configuration: how the kernels run; None for ``limits.CONFIGURATION``.

    Returns:
      ``out [T, d]`` and the state after the last whole chunk.
    """
    tokens, shared, state = operands
    plan, tokens = programs.planned(tokens, len(shared.scale), spacing, configuration)
    out, last = _layer(plan, Operands(tokens, shared, _turned(state)))
    return out[: len(operands.tokens.k)], _turned(last)


def _turned(state: State) -> State:
    """The first layer's weights as the kernels have them, or as others do."""
    return state._replace(first=state.first.T)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _alone(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(plan: Plan, operands: Operands) -> tuple[jax.Array, State]:
    tokens, shared, state = operands
    made = scans.forward(plan, tokens, shared, _alone(state), every=0, reads=True)
    return made.out, _first(made.last)


def _layer_forward(plan: Plan, operands: Operands) -> tuple[Any, Any]:
    tokens, shared, state = operands
    made = scans.forward(plan, tokens, shared, _alone(state), every=plan.size, reads=True)
    return (made.out, _first(made.last)), (operands, made.kept)


def _layer_backward(plan: Plan, saved: Any, cotangents: Any) -> tuple[Operands]:
    (tokens, shared, _), kept = saved
    if plan.size > 1:
        kept = scans.forward(plan, tokens, shared, kept, every=1, reads=False).kept
    made = scans.backward(plan, tokens, shared, kept, cotangents)
    return (Operands(made.tokens, made.shared, made.state),)


_layer.defvjp(_layer_forward, _layer_backward, **shared_outputs.DECLARED)

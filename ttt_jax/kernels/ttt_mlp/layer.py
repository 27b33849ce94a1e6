"""TTT-MLP in kernels, with its derivative and its rule for ``vmap``; needs Pallas' Triton."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels import shared_outputs
from ttt_jax.kernels.ttt_linear.limits import Tiles
from ttt_jax.kernels.ttt_mlp import limits, scans
from ttt_jax.kernels.ttt_mlp.algebra import Shared, State, Tokens
from ttt_jax.kernels.ttt_mlp.scans import Plan


class Operands(NamedTuple):
    """Arrays of a call.

    Attributes:
      tokens: ``[T, d]`` and ``[T]``; q, k and v in the operands' dtype, all else float32.
      shared: of all chunks.
      state: before the first token.
    """

    tokens: Tokens
    shared: Shared
    state: State


def run(operands: Operands, *, spacing: int, warps: int = limits.WARPS) -> tuple[jax.Array, State]:
    """The layer for one head of one sequence of any length.

    Args:
      operands: any T.
      spacing: chunks between two states that are kept for the backward pass, which makes those
        between again; at least 1.
      warps: of a program.

    Returns:
      ``out [T, d]`` and the state after the last whole chunk.
    """
    length, chunk = len(operands.tokens.k), len(operands.shared.scale)
    chunks = -(-length // chunk)
    groups = -(-chunks // spacing)
    size = -(-chunks // groups)
    plan = Plan(chunk, size, groups, length // chunk, Tiles(warps))
    padding = plan.chunks * chunk - length

    def padded(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, ((0, padding), *((0, 0),) * (leaf.ndim - 1))) if padding else leaf

    given = operands._replace(tokens=jax.tree.map(padded, operands.tokens))
    out, last = _layer(plan, given)
    return out[:length], last


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

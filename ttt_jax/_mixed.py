"""Gradients that are themselves differentiated forward over reverse.

For ``g = dL(w, v)/dw`` and a cotangent u of it, reverse mode goes back through the backward pass.
Second derivatives are symmetric, so what u gives w and v is a tangent of one more gradient::

    (dg/dw)^T u = d/dt dL/dw (w + t u, v),    (dg/dv)^T u = d/dt dL/dv (w + t u, v),    t = 0

which a single forward sweep finds, beside the backward pass and without keeping it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_Leaves = Sequence[Any]


def value_and_grad(objective: Callable[[Any], tuple[jax.Array, Any]], fast: Any) -> Any:
    """``jax.value_and_grad(objective, has_aux=True)(fast)`` with a reverse rule of its own.

    Args:
      objective: ``fast -> (scalar, auxiliary values)``. Gradients go to what it closes over, too.
      fast: a tree of floating leaves.
    """
    # A custom rule must not close over traced values: here they become arguments.
    closed, shapes = jax.make_jaxpr(objective, return_shape=True)(fast)
    layout: Any = jax.tree.structure(shapes)
    smooth = [_is_smooth(leaf) for leaf in closed.consts]
    smooth_out = [_is_smooth(leaf) for leaf in jax.tree.leaves(shapes)]

    def outputs(leaves: _Leaves, floats: _Leaves, others: _Leaves) -> tuple[_Leaves, _Leaves]:
        """Outputs with a derivative, the loss the first of them; and the others."""
        filled = core.ClosedJaxpr(closed.jaxpr, _joined(smooth, floats, others))
        return _parted(smooth_out, core.jaxpr_as_fun(filled)(*leaves))

    call = _with_mixed_rule(outputs)
    leaves, form = jax.tree.flatten(fast)
    made, rest, grads = call(leaves, *_parted(smooth, closed.consts))
    value, aux = jax.tree.unflatten(layout, _joined(smooth_out, made, rest))
    return (value, aux), jax.tree.unflatten(form, grads)


def _with_mixed_rule(outputs: Callable[..., tuple[_Leaves, _Leaves]]) -> Callable[..., Any]:
    """``(fast, floats, others) -> (outputs, other outputs, gradient of the first in fast)``."""

    @jax.custom_vjp
    def call(leaves: _Leaves, floats: _Leaves, others: _Leaves) -> Any:
        def loss(leaves: _Leaves) -> Any:
            made, rest = outputs(leaves, floats, others)
            return made[0], (made, rest)

        (_, (made, rest)), grads = jax.value_and_grad(loss, has_aux=True)(leaves)
        return made, rest, grads

    def forward(*given: _Leaves) -> Any:
        return call(*given), given

    def backward(given: Any, cotangents: Any) -> Any:
        leaves, floats, others = given
        of_made, _, direction = cotangents

        def pulled(leaves: _Leaves, weights: _Leaves) -> Any:
            pull = jax.vjp(lambda *x: outputs(*x, others), leaves, floats, has_aux=True)[1]
            return pull(weights)

        # Of the loss alone; the cotangents of the outputs are the tangents of its weight and
        # theirs, as a gradient is linear in them.
        weights = [jnp.full_like(leaf, index == 0) for index, leaf in enumerate(of_made)]
        _, tangents = jax.jvp(pulled, (leaves, weights), (direction, of_made))
        return *tangents, None

    call.defvjp(forward, backward)
    return call


def _is_smooth(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _parted(chosen: Sequence[bool], leaves: _Leaves) -> tuple[_Leaves, _Leaves]:
    pairs = list(zip(chosen, leaves, strict=True))
    return [leaf for kept, leaf in pairs if kept], [leaf for kept, leaf in pairs if not kept]


def _joined(chosen: Sequence[bool], first: _Leaves, second: _Leaves) -> _Leaves:
    a, b = iter(first), iter(second)
    return [next(a) if kept else next(b) for kept in chosen]

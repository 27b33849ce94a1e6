"""Inner optimizers that optax does not have; any of optax's serves a fast-weight layer as well."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments

__all__ = ["momentum", "orthogonal"]

MUON = ((3.4445, -4.7750, 2.0315),) * 5
"""Coefficients of Newton-Schulz steps as of Muon (Jordan et al., 2024)."""


def momentum() -> optax.GradientTransformationExtraArgs:
    """``m <- rate * m + gradient`` with a rate of its own for each step, ``Rates.momentum``.

    References:
      Behrouz et al., `Titans <https://arxiv.org/abs/2501.00663>`_, 2025, Eqs. 9-10: past and
      momentary surprise.
    """

    def update(updates: Any, state: Any, params: Any = None, *, momentum: Any, **rest: Any) -> Any:
        del params, rest
        state = jax.tree.map(lambda held, new: momentum * held + new, state, updates)
        return state, state

    return optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), update
    )


@_arguments.checked(epsilon=_arguments.number(0.0))
def orthogonal(
    coefficients: Sequence[tuple[float, float, float]] = MUON, *, epsilon: float = 1e-7
) -> optax.GradientTransformation:
    """Updates of two axes become nearly orthogonal by Newton-Schulz steps; others stay.

    ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, from ``X`` over its norm; the smaller of the
    axes is the first.

    Args:
      coefficients: ``(a, b, c)`` of each step; as of Muon.
      epsilon: added to the norm.

    Raises:
      ValueError: no step, or no three numbers.

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    triples = isinstance(coefficients, Sequence) and not isinstance(coefficients, str)
    if triples:
        triples = all(isinstance(step, Sequence) and len(step) == 3 for step in coefficients)
    if not triples or not coefficients:
        raise ValueError(
            f"coefficients must be three numbers for each step, at least one; got {coefficients!r}."
        )

    def orthogonalized(x: jax.Array) -> jax.Array:
        if x.ndim != 2:
            return x
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (jnp.sqrt((x * x).sum()) + epsilon)
        for a, b, c in coefficients:
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return x.T if tall else x

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(orthogonalized, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

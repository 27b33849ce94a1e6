"""What methods with a memory of instances share: empty slots, their use, running statistics."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import select
from ttt_jax.base import Params, PyTree

STATISTICS = select.statistics()


def empty_slots(like: PyTree, capacity: int) -> PyTree:
    """Zeros ``[capacity, ...]`` for every leaf of one instance, or of its shapes."""
    return jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), like)


def repeated(used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of the used slots, repeated in turn to the full length, and 1 for first mentions."""
    position = jnp.arange(len(used))
    order = jnp.argsort(~used, stable=True)
    count = used.sum()
    return order[position % jnp.maximum(count, 1)], (position < count).astype(jnp.float32)


def all_finite(x: Any) -> jax.Array:
    """Whether every element of every leaf is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(x)]).all()


def with_statistics(params: Params, statistics: PyTree) -> Params:
    """``params`` with other running statistics."""
    return STATISTICS.merge(statistics, STATISTICS.split(params)[1])


def follow(old: PyTree, new: PyTree, momentum: float | jax.Array) -> PyTree:
    """``(1 - momentum) old + momentum new``."""

    def blend(a: jax.Array, b: jax.Array) -> jax.Array:
        # Views of a user's own may be wider, and so the statistics of what they show.
        return ((1 - momentum) * a + momentum * b).astype(jnp.asarray(a).dtype)

    return jax.tree.map(blend, old, new)

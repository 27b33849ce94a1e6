"""The instances of an audit: rows of trees, spoiled ones, and their bytes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _checks, _trees
from ttt_jax.base import Key


def instances(xs: Any, keys: Key) -> Any:
    """The instances as arrays; refuses leaves without a row for each of the keys."""
    count = _checks.leading_size("xs", xs)
    if keys.shape != (count,):
        raise ValueError(
            f"keys must be one for each of the {count} instances of xs; got an array of shape "
            f"{keys.shape}. Make them with ttt_jax.sample_keys(key, ids)."
        )
    return jax.tree.map(jnp.asarray, xs)


def rows(tree: Any, places: Any) -> Any:
    """The instances at some places."""
    return jax.tree.map(lambda leaf: leaf[places], tree)


def poisoned(xs: Any, place: int) -> Any:
    """The instances with nan in place of one's floating leaves."""

    def spoil(leaf: jax.Array) -> jax.Array:
        return leaf.at[place].set(jnp.nan) if _trees.is_floating(leaf) else leaf

    return jax.tree.map(spoil, xs)


def can_poison(xs: Any) -> bool:
    """Whether an instance has a floating leaf."""
    return any(_trees.is_floating(leaf) for leaf in jax.tree.leaves(xs))


def snapshot(tree: Any) -> list[tuple[str, bytes]]:
    """The bytes of every leaf, by path."""
    return [
        (path, b"" if leaf is None or _trees.is_key(leaf) else np.asarray(leaf).tobytes())
        for path, leaf in _trees.named_leaves(tree)
    ]

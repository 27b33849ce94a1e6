"""Small pytree helpers shared by the core."""

import difflib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_integer(value: Any, least: int) -> bool:
    """Whether a static argument is an integer, Python's or NumPy's, of at least ``least``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= least)


def is_hole(leaf: Any) -> bool:
    """Whether a leaf of a split tree is a hole."""
    return leaf is None


def path_name(path: Any) -> str:
    """``a/b/c`` for a key path; equal for Linen and NNX trees."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """``[(path, leaf), ...]`` in flattening order, holes included."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)
    return [(path_name(path), leaf) for path, leaf in leaves]


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is a floating-point array or number (keys, integers and holes are not).

    A Python number counts as the array that ``jit`` makes of it.
    """
    if isinstance(leaf, float):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def is_complex(leaf: Any) -> bool:
    """Whether a leaf is a complex array or number."""
    if isinstance(leaf, complex):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def same_structure(a: Any, b: Any) -> bool:
    """Whether two trees have the same containers, holes included."""
    left: Any = jax.tree.structure(a)
    return bool(left == jax.tree.structure(b))


def where(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Leafwise choice by one bool scalar; leaves that are the same object are not selected."""

    def choose(a: Any, b: Any) -> Any:
        return a if a is b else jnp.where(condition, a, b)

    return jax.tree.map(choose, on_true, on_false)


def differs(before: Any, after: Any) -> jax.Array:
    """Bool scalar: whether any leaf of ``after`` is not the value of ``before``."""
    changed = [
        jnp.any(a != b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        if a is not b
    ]
    return jnp.any(jnp.stack(changed)) if changed else jnp.zeros((), bool)


def any_nonzero(tree: Any) -> jax.Array:
    """Bool scalar: whether any element of ``tree`` differs from zero (as nan does)."""
    flags = [jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(flags).any() if flags else jnp.zeros((), bool)


def spoiled(before: Any, after: Any) -> jax.Array:
    """Bool scalar: whether a floating element that was finite before is not finite after."""
    flags = [
        jnp.any(jnp.isfinite(a) & ~jnp.isfinite(b))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        if a is not b and is_floating(b)
    ]
    return jnp.stack(flags).any() if flags else jnp.zeros((), bool)


def norm(tree: Any) -> jax.Array:
    """Global Euclidean norm in float32 (inf when it overflows)."""
    squares = [
        jnp.sum(jnp.square(jnp.asarray(leaf).astype(jnp.float32)))
        for leaf in jax.tree.leaves(tree)
        if is_floating(leaf)
    ]
    return jnp.sqrt(jnp.sum(jnp.stack(squares))) if squares else jnp.zeros((), jnp.float32)


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The names closest in spelling to ``name``."""
    pool = list(candidates)
    return difflib.get_close_matches(name, pool, n=count, cutoff=0.0) if pool else []

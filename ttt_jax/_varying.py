"""Values that differ between the devices of a caller's ``jax.shard_map``.

There the gradient with respect to a value that all devices share is summed over the mesh, and a
loop's carry must differ over the same mesh axes before and after. An adapted copy is a device's
own as soon as its loss is.
"""

from collections.abc import Callable
from typing import Any

import jax

_Axes = frozenset[Any]


def _axes_of(tree: Any) -> _Axes:
    """The manual mesh axes over which any leaf differs."""
    return frozenset().union(*map(_leaf_axes, jax.tree.leaves(tree)))


def _leaf_axes(leaf: Any) -> _Axes:
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    # From jax 0.10.2 on, and before.
    named = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if named is None else named.varying


def tracked() -> bool:
    """Whether the caller is inside a ``shard_map`` that keeps track of what differs."""
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return bool(axes) and bool(_axes_of(jax.eval_shape(lambda: jax.lax.axis_index(axes))))


def _cast(leaf: Any, axes: _Axes) -> Any:
    missing = tuple(axis for axis in axes if axis not in _leaf_axes(leaf))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def own(tree: Any, loss: Callable[[Any], Any]) -> Any:
    """``tree``, each device's own along the mesh axes over which ``loss(tree)`` differs.

    A loss that is the same on all devices (one that averages over them) has one gradient, which
    is rightly summed.
    """
    if not tracked():
        return tree
    axes = _axes_of(jax.eval_shape(loss, tree))
    return jax.tree.map(lambda leaf: _cast(leaf, axes), tree)


def alike(after: Any, before: Any) -> Any:
    """The next carry of a loop, cast as the one before it: a constant may take its place."""
    return jax.tree.map(lambda leaf, old: _cast(leaf, _leaf_axes(old)), after, before)


def carry(step: Callable[[Any], Any], start: Any) -> Any:
    """The start of a loop whose ``step(start)`` gives the next carry, cast as that one is.

    ``step`` casts its result with :func:`alike`.
    """
    if not tracked():
        return start
    while True:
        after = jax.eval_shape(step, start)
        cast = jax.tree.map(lambda leaf, end: _cast(leaf, _leaf_axes(end)), start, after)
        if jax.tree.map(_leaf_axes, cast) == jax.tree.map(_leaf_axes, start):
            return cast
        start = cast


def scan(body: Callable[[Any, Any], Any], start: Any, xs: Any) -> Any:
    """``jax.lax.scan`` whose start is cast as ``body`` makes it: as the instances, or the state."""

    def cast(carry: Any, x: Any) -> Any:
        after, out = body(carry, x)
        return alike(after, carry), out

    first = jax.tree.map(lambda leaf: leaf[0], xs)
    return jax.lax.scan(cast, carry(lambda held: cast(held, first)[0], start), xs)


def along(tree: Any, other: Any) -> Any:
    """``tree``, each device's own along the mesh axes over which ``other`` differs."""
    if not tracked():
        return tree
    axes = _axes_of(other)
    return jax.tree.map(lambda leaf: _cast(leaf, axes), tree)

"""Scans that keep a carry now and then, and compute what is between again to differentiate."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _varying

_Body = Callable[[Any, Any], tuple[Any, Any]]


def rematerialized(body: _Body, start: Any, xs: Any, remat: int | None) -> tuple[Any, Any]:
    """``jax.lax.scan`` whose steps are computed again in the backward pass.

    Args:
      body: ``(carry, x) -> (carry, y)``.
      start: the first carry.
      xs: leaves ``[T, ...]``, T at least 1.
      remat: steps between two kept carries; 0 for a plain scan, None for about ``sqrt(T)``.
    """
    (count,) = {leaf.shape[0] for leaf in jax.tree.leaves(xs)}
    every = max(1, round(math.sqrt(count))) if remat is None else remat
    if not every:
        return _varying.scan(body, start, xs)
    return grouped(body, start, xs, every=every, each=True)


def grouped(body: _Body, start: Any, xs: Any, *, every: int, each: bool) -> tuple[Any, Any]:
    """``jax.lax.scan`` whose carry is kept every few steps alone.

    Args:
      body: ``(carry, x) -> (carry, y)``.
      start: the first carry.
      xs: leaves ``[T, ...]``, T at least 1.
      every: steps of a group.
      each: whether the steps of a group that is computed again leave their carries alone, too, and
        are computed a third time; else they leave all that their derivatives need.
    """
    (count,) = {leaf.shape[0] for leaf in jax.tree.leaves(xs)}
    # A loop is a boundary that common subexpressions do not cross.
    step = jax.checkpoint(body, prevent_cse=False) if each else body
    if each and every == 1:
        return _varying.scan(step, start, xs)

    def steps(carry: Any, part: Any) -> tuple[Any, Any]:
        return _varying.scan(step, carry, part)

    group, whole = jax.checkpoint(steps, prevent_cse=False), count - count % every
    carry, made = start, []
    if whole:
        split = jax.tree.map(
            lambda leaf: leaf[:whole].reshape(count // every, every, *leaf.shape[1:]), xs
        )
        carry, ys = _varying.scan(group, carry, split)
        made.append(jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), ys))
    if whole < count:
        carry, ys = group(carry, jax.tree.map(lambda leaf: leaf[whole:], xs))
        made.append(ys)
    if len(made) == 1:
        return carry, made[0]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)

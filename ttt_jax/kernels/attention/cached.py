"""Attention of a chunk's tokens to the keys of a cache and to each other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments
from ttt_jax.kernels.attention.forms import FORMS, sparse_kernel
from ttt_jax.kernels.attention.limits import fits_sparse
from ttt_jax.kernels.attention.masked import attend_masked
from ttt_jax.kernels.attention.sight import NEVER, Sight


class Reach(NamedTuple):
    """Which keys a query sees: earlier ones, within a window or among the sinks.

    Attributes:
      queries: int32 ``[N, T]``, positions of the chunk's tokens; a negative one is padding.
      held: int32 ``[N, S]``, positions of what the cache holds; negative where that is nothing, or
        a token of the chunk itself.
      window: int32 scalar, how many tokens, itself among them, a token sees.
      sinks: int32 scalar, how many first tokens are seen for ever.
    """

    queries: jax.Array
    held: jax.Array
    window: jax.Array
    sinks: jax.Array


def sees(queries: jax.Array, keys: jax.Array, window: Any, sinks: Any) -> jax.Array:
    """Whether a query sees a key, by their positions; the arrays are broadcast."""
    return (keys >= 0) & (keys <= queries) & ((queries - keys < window) | (keys < sinks))


def sight_of(reach: Reach) -> Sight:
    """The same in two comparisons: a sink, and a query's own window, know no lower bound."""

    def bounds(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        newest = jnp.where(positions < 0, NEVER, positions)
        return newest, jnp.where(positions < reach.sinks, NEVER, positions)

    rows = reach.queries, reach.queries - reach.window
    return Sight(rows, bounds(reach.queries), bounds(reach.held))


def attend_cached(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    held: tuple[jax.Array, jax.Array],
    reach: Reach,
    *,
    form: str,
    scale: float | None = None,
    held_gradients: bool = False,
) -> jax.Array:
    """Returns ``softmax(scale query [held key, key]^T, where seen) [held value, value]``.

    No gradient goes to what the cache holds, unless it is asked for. The fused form is a kernel
    that reads positions where other kernels read a mask as large as the scores, leaves out blocks
    in which no query sees a key, and sums no gradient of held keys.

    Args:
      query: ``[N, T, H, D]``.
      key: ``[N, T, K, D]`` of the same tokens; K divides H, and head h of the queries reads head
        ``h // (H / K)``.
      value: ``[N, T, K, D]``.
      held: keys and values of the cache, each ``[N, S, K, D]``.
      reach: which keys are seen. A query that sees nothing gets a finite value without meaning.
      form: ``"xla"`` or ``"fused"``, as for
        :func:`~ttt_jax.kernels.attention.masked.attend_masked`, which takes what the kernel does
        not.
      scale: of the scores; ``None`` for ``1 / sqrt(D)``.
      held_gradients: whether gradients go to ``held``, which the kernel has none for.

    Returns:
      ``[N, T, H, D]`` of the dtype of ``value``.
    """
    query = _arguments.array("query", query, 4)
    key = _arguments.array("key", key, 4)
    value = _arguments.array("value", value, 4)
    held_key, held_value = (_arguments.array("held", each, 4) for each in held)
    _arguments.choice("form", form, FORMS)
    tokens, size = query.shape[1], query.shape[-1]
    kernel = form == "fused" and fits_sparse(tokens, size) and sparse_kernel() is not None
    if kernel and not held_gradients:
        scale = size**-0.5 if scale is None else scale
        return sparse_kernel().attend(
            scale, query, key, value, held_key, held_value, sight_of(reach)
        )
    if not held_gradients:
        held_key, held_value = map(jax.lax.stop_gradient, (held_key, held_value))
    keys = jnp.concatenate([reach.held, reach.queries], 1)
    return attend_masked(
        query,
        jnp.concatenate([held_key, key], 1),
        jnp.concatenate([held_value, value], 1),
        sees(reach.queries[:, :, None], keys[:, None], reach.window, reach.sinks),
        form=form,
        scale=scale,
    )

"""Nearby unlabelled data: an instance adapts together with, or on, its neighbors in a pool.

The neighbors of an instance depend on the instance, the pristine parameters and a fixed pool:
never on batch mates, and not on what was learned so far. The pool is one array for all instances.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _trees
from ttt_jax.base import Adapter, Key, Params, PyTree, StepInfo
from ttt_jax.source import value_of

__all__ = ["finder", "nearest", "with_neighbors"]

_METRICS = ("cosine", "euclidean")


@_arguments.checked(bank=_arguments.array(1, 2))
def nearest(features: jax.Array, bank: jax.Array, k: int, *, metric: str = "cosine") -> jax.Array:
    """The k rows of a bank that are nearest to a vector: exact, by one matrix product.

    Args:
      features: ``[D]``, or ``[..., D]`` for many vectors at once.
      bank: ``[M, D]``.
      k: how many, 1 to M; static.
      metric: ``"cosine"`` (a row of zeros has similarity 0 to everything) or ``"euclidean"``.

    Returns:
      int32 indices ``[..., k]`` into the bank, nearest first; of equally near rows the first.
      Rows that hold a nan or an inf come last.

    Raises:
      ValueError: an unknown metric, a bank that is not ``[M, D]``, features of another length,
        or a k out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> bank = jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]])
      >>> nearest(jnp.array([0.1, 1.0]), bank, 2).tolist()
      [2, 1]
      >>> nearest(jnp.array([0.1, 1.0]), bank, 2, metric="euclidean").tolist()
      [2, 0]
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {list(_METRICS)}, got {metric!r}.")
    features, bank = jnp.asarray(features, jnp.float32), jnp.asarray(bank, jnp.float32)
    if bank.ndim != 2 or features.ndim < 1 or features.shape[-1] != bank.shape[1]:
        raise ValueError(
            "neighbors.nearest compares features [..., D] with a bank [M, D]; got shapes "
            f"{features.shape} and {bank.shape}. Take both from the same model function."
        )
    if not _trees.is_integer(k, 1) or k > bank.shape[0]:
        raise ValueError(
            f"k must be an integer from 1 to the {bank.shape[0]} rows of the bank, got {k!r}."
        )
    queries = features.reshape(-1, bank.shape[1])
    # One damaged row must not become everybody's neighbor, nor spoil the center.
    usable = jnp.isfinite(bank).all(axis=1, keepdims=True)
    bank = jnp.where(usable, bank, 0.0)
    # Only the order over rows counts: what is the same for all rows is left out.
    if metric == "cosine":
        square = jnp.square(bank).sum(axis=1, keepdims=True)
        scores = _product(queries, bank * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)))
    else:
        # Distances do not change with the origin; near the data, rounding is smallest.
        center = bank.mean(axis=0, keepdims=True, where=usable)
        rows = bank - center
        scores = _product(queries - center, rows) - jnp.square(rows).sum(axis=1)[None] / 2
    scores = jnp.where(usable.T, scores, -jnp.inf)
    return jax.lax.top_k(scores, k)[1].reshape((*features.shape[:-1], k))


def _product(queries: jax.Array, rows: jax.Array) -> jax.Array:
    # A product in tf32 or bfloat16 would exchange neighbors of similar distance.
    return jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)


@_arguments.checked(k=_arguments.count())
def finder(
    features: Callable[[Params, Any], jax.Array],
    pool: PyTree,
    bank: Any,
    *,
    k: int,
    metric: str = "cosine",
    choose: Callable[[jax.Array, jax.Array, int], jax.Array] | None = None,
) -> Callable[[Params, Any], PyTree]:
    """Looks up the k instances of a pool whose features are nearest to those of an instance.

    Args:
      features: model function ``(params, inputs[N, ...]) -> [N, D]``.
      pool: unlabelled instances, a pytree like one instance with a leading axis M.
      bank: ``[M, D]``, the pool's features under the pristine parameters; or the result of
        ``source_statistics(lambda params, batch: features(params, batch.image), params, loader,
        reduce="concatenate")`` for a pool in the loader's order. ``jit`` keeps arrays that a
        function closes over as constants of its program: pass a large pool and its bank into the
        compiled function, and build the finder there.
      k: how many neighbors, static.
      metric: as in :func:`nearest`.
      choose: ``choose(features[D], bank[M, D], k) -> indices[k]``, such as
        :func:`ttt_jax.passages.sift`; ``None`` for :func:`nearest` with the metric.

    Returns:
      ``find(params, x) -> neighbors``, a pytree like ``x`` with a leading axis k, nearest first.
      An instance that is in the pool itself is its own first neighbor.

    Raises:
      ValueError: leaves of the pool whose leading axis is not that of the bank; when called: as
        in :func:`nearest`.
    """
    rows = _arguments.array()("", "bank", value_of(bank))
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(pool)}
    if lengths != {rows.shape[:1]}:
        raise ValueError(
            "neighbors.finder needs one row of the bank for each instance of the pool; got leading "
            f"axes {sorted(lengths) or None} of the pool and a bank of shape {rows.shape}."
        )

    def find(params: Params, x: Any) -> PyTree:
        query = features(params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x))
        if choose is None:
            places = nearest(query, rows, k, metric=metric)[0]
        else:
            places = choose(query[0], rows, k)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[places], pool)

    return find


@_arguments.checked()
def with_neighbors(adapter: Adapter, find: Callable[[Params, Any], PyTree]) -> Adapter:
    """Adapts to an instance together with its neighbors, as one batch.

    Args:
      adapter: one over a batch: its loss was built with ``batch=True``, or lifted by
        ``losses.over_batch``. It is given ``[1 + k, ...]``, the instance first.
      find: ``find(params, x) -> neighbors[k, ...]``, see :func:`finder`; called with the
        pristine parameters, so that the neighbors are the same at every step (and a compiled
        program searches once for all of them).

    Returns:
      An :class:`~ttt_jax.Adapter` over one instance, with the same state, for ``episodic`` and
      ``online`` alike; ``apply`` predicts the instance alone.

    Raises:
      ValueError: when called: neighbors that are not like the instance.

    References:
      Hardt and Sun, `Test-Time Training on Nearest Neighbors for Large Language Models
      <https://arxiv.org/abs/2305.18466>`_, 2024, whose steps are on the neighbors alone.
    """

    def step(params: Params, state: PyTree, x: Any, key: Key) -> tuple[PyTree, StepInfo]:
        x, neighbors = jax.tree.map(jnp.asarray, (x, find(params, x)))
        if _kind(x, axes=0) != _kind(neighbors, axes=1):
            raise ValueError(
                "neighbors.with_neighbors needs neighbors [k, ...] like the instance; got "
                f"{_described(neighbors)} for {_described(x)}. Prepare the pool as the instances."
            )
        both = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), x, neighbors)
        return adapter.step(params, state, both, key)

    return adapter._replace(step=step)


def _kind(tree: PyTree, *, axes: int) -> Any:
    """Structure, shapes without so many leading axes, and dtypes."""
    leaves = [(leaf.shape[axes:], leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def _described(tree: PyTree) -> str:
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))

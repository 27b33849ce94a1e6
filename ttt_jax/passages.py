"""Passages of a corpus: their features, those that say most about a query, and their clusters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _arguments, _extras, neighbors
from ttt_jax.base import Params, PyTree

__all__ = ["Clusters", "cluster", "in_clusters", "sift", "token_counts"]

# Knuth's multiplier: the upper bits of a product with it are spread evenly.
_SPREAD = 2_654_435_769


@_arguments.checked(size=_arguments.count(2))
def token_counts(size: int = 1024) -> Callable[[Params, Any], jax.Array]:
    """Features without a model: square roots of the shares of a passage's tokens, hashed.

    The product of two is the Bhattacharyya coefficient of their token distributions, but for
    tokens that share one of the ``size`` places. It knows words and no meanings; features of a
    model (the mean of its hidden states, an encoder of sentences) find better neighbors.

    Args:
      size: D, places of the hash.

    Returns:
      A model function ``(params, x) -> [N, D]`` of unit rows, zeros for an empty passage, with
      ``x`` integers ``[N, P]`` or a mapping of such ``tokens`` and ``mask``.

    Raises:
      ValueError: ``size`` under 2; when called: tokens that are not integers ``[N, P]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> rows = token_counts(64)(None, jnp.array([[3, 3, 5, 9], [5, 3, 9, 3], [1, 2, 2, 2]]))
      >>> print((rows @ rows.T).round(2))
      [[1. 1. 0.]
       [1. 1. 0.]
       [0. 0. 1.]]
    """

    def features(params: Params, x: Any) -> jax.Array:
        given = x if isinstance(x, Mapping) else {"tokens": x}
        tokens = jnp.asarray(given["tokens"])
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"passages.token_counts needs integer tokens [N, P]; got shape {tokens.shape} and "
                f"dtype {tokens.dtype}."
            )
        mask = jnp.asarray(given.get("mask", jnp.ones(tokens.shape, bool))) != 0
        places = (tokens.astype(jnp.uint32) * jnp.uint32(_SPREAD) >> 8) % jnp.uint32(size)

        def count(places: jax.Array, mask: jax.Array) -> jax.Array:
            counted = mask.astype(jnp.float32)
            return jnp.zeros((size,), jnp.float32).at[places].add(counted)

        counts = jax.vmap(count)(places, mask)
        return jnp.sqrt(counts / jnp.maximum(counts.sum(1, keepdims=True), 1.0))

    return features


@_arguments.checked(
    bank=_arguments.array(2),
    k=_arguments.count(),
    noise=_arguments.number(0.0, above=True),
    candidates=_arguments.count(),
)
def sift(
    features: jax.Array, bank: jax.Array, k: int, *, noise: float = 0.01, candidates: int = 200
) -> jax.Array:
    """The k rows of a bank that together say most about a vector (SIFT).

    Nearest rows repeat each other. Here each next row is the one that leaves least variance of a
    Gaussian process at the vector, given the rows before it; its kernel is the product of unit
    vectors::

        next = argmin_x  k(q, q) - k(q, x)^2 / (k(x, x) + noise),    then k is conditioned on next

    A row may come again: its noise makes a second look worth something.

    Args:
      features: q, ``[D]``.
      bank: ``[M, D]``.
      k: how many, static.
      noise: variance of what a row says; small ones forbid repetition, large ones give
        the nearest row again and again. May be traced.
      candidates: only so many nearest rows are looked at, static; a matrix of their products is
        kept.

    Returns:
      int32 indices ``[k]`` into the bank, in the order of choice; the first is the nearest.

    Raises:
      ValueError: shapes that do not fit, or an argument out of range.

    References:
      Hübotter et al., `Efficiently Learning at Test-Time: Active Fine-Tuning of LLMs
      <https://arxiv.org/abs/2410.08020>`_, 2025, Eq. 4. The authors' package (activeft) searches in
      larger pools by an approximate index, and has variants that are lazy or stop early.
    """
    if jnp.ndim(features) != 1:
        raise ValueError(
            f"passages.sift needs the features [D] of one instance; got shape "
            f"{jnp.shape(features)}. Map over instances with jax.vmap."
        )
    places = neighbors.nearest(features, bank, min(candidates, bank.shape[0]))
    query, rows = _unit(features[None])[0], _unit(bank[places])
    exact = jax.lax.Precision.HIGHEST
    kernel = jnp.matmul(rows, rows.T, precision=exact)
    target = jnp.matmul(rows, query, precision=exact)

    def choose(state: tuple[jax.Array, jax.Array], _: Any) -> Any:
        kernel, target = state
        spread = jnp.diagonal(kernel) + noise
        best = jnp.argmax(jnp.square(target) / spread)
        column = kernel[:, best] / spread[best]
        conditioned = kernel - column[:, None] * kernel[best][None]
        return (conditioned, target - column * target[best]), best

    _, chosen = jax.lax.scan(choose, (kernel, target), length=k)
    return places[chosen]


def _unit(rows: jax.Array) -> jax.Array:
    """Rows of length 1 in float32; zeros where a row has none, or is not finite."""
    rows = jnp.asarray(rows, jnp.float32)
    rows = jnp.where(jnp.isfinite(rows).all(1, keepdims=True), rows, 0.0)
    square = jnp.square(rows).sum(1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


class Clusters(NamedTuple):
    """Parts of a bank.

    Attributes:
      labels: int32 ``[M]``, the cluster of each row.
      centers: float32 ``[C, D]``, the mean of a cluster's unit rows, of length 1 again.
    """

    labels: np.ndarray
    centers: np.ndarray


@_arguments.checked(
    bank=_arguments.array(2, host=True, finite=True),
    num_clusters=_arguments.count(),
    seed=_arguments.count(0),
)
def cluster(bank: Any, num_clusters: int, *, seed: int = 0) -> Clusters:
    """Cuts a bank into clusters of similar direction, by bisecting k-means on the host.

    Args:
      bank: features ``[M, D]``.
      num_clusters: C, at most M.
      seed: of the starts.

    Raises:
      ImportError: scikit-learn is missing.
      ValueError: more clusters than rows, or an argument out of range.

    References:
      Bertolissi et al., `Local Mixtures of Experts <https://arxiv.org/abs/2505.14136>`_, 2025,
      Section 3.
    """
    library = _extras.load("sklearn.cluster", "data")
    rows = np.asarray(_unit(jnp.asarray(bank)))
    if num_clusters > len(rows):
        raise ValueError(
            f"num_clusters must be at most the {len(rows)} rows of the bank; got {num_clusters}."
        )
    model = library.BisectingKMeans(num_clusters, random_state=seed)
    labels = model.fit_predict(rows).astype(np.int32)
    means = np.stack([rows[labels == index].mean(0) for index in range(num_clusters)])
    return Clusters(labels, np.asarray(_unit(jnp.asarray(means))))


@_arguments.checked(
    labels=_arguments.array(1, host=True, kinds="iu"),
    size=_arguments.count(),
    seed=_arguments.count(0),
)
def in_clusters(pool: PyTree, labels: Any, *, size: int, seed: int = 0) -> PyTree:
    """The passages of a pool by cluster: one instance each, for training all of them at once.

    Args:
      pool: ``{"tokens", "mask"}``, each ``[M, P]``.
      labels: integers ``[M]`` of :func:`cluster`, from 0 to C - 1.
      size: S, passages of a cluster: of a larger one so many are drawn; a smaller one is filled by
        passages of mask 0, which teach nothing.
      seed: of the draws.

    Returns:
      ``{"tokens", "mask"}``, each ``[C, S, P]``, in random order.

    Raises:
      ValueError: a pool of other leaves, or not of one row per label; a cluster without any.
    """
    if not isinstance(pool, Mapping) or set(pool) != {"tokens", "mask"}:
        raise ValueError(
            "passages.in_clusters needs a pool of 'tokens' and 'mask'; got "
            f"{sorted(pool) if isinstance(pool, Mapping) else type(pool).__name__}."
        )
    tokens, mask = np.asarray(pool["tokens"]), np.asarray(pool["mask"])
    if tokens.shape != mask.shape or tokens.shape[:1] != labels.shape:
        raise ValueError(
            "labels must be one for each passage of the pool, tokens and mask [M, P]; got shapes "
            f"{labels.shape}, {tokens.shape} and {mask.shape}."
        )
    if np.unique(labels).tolist() != list(range(int(labels.max(initial=-1)) + 1)):
        raise ValueError(
            "labels must be 0 to C - 1 with a passage for each; got "
            f"{np.unique(labels)[:5].tolist()}. Take them from passages.cluster."
        )
    rng = np.random.default_rng(seed)
    shape = (int(labels.max()) + 1, size, *tokens.shape[1:])
    made = {"tokens": np.zeros(shape, tokens.dtype), "mask": np.zeros(shape, mask.dtype)}
    for index in range(shape[0]):
        rows = rng.permutation(np.flatnonzero(labels == index))[:size]
        made["tokens"][index, : len(rows)] = tokens[rows]
        made["mask"][index, : len(rows)] = mask[rows]
    return made

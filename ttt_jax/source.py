"""Statistics of the source data that some methods carry to test time."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks
from ttt_jax.base import Params, PyTree

__all__ = [
    "Moments",
    "SourceStatistics",
    "is_test_split",
    "mean_of",
    "source_statistics",
    "value_of",
]


@dataclasses.dataclass(frozen=True)
class SourceStatistics:
    """A pytree of statistics that carries the split it came from.

    Attributes:
      value: the statistics, e.g. a Fisher diagonal shaped like ``fast`` for ``anchor``.
      split: the split of the data; static, part of the tree's structure.
    """

    value: PyTree
    split: str


jax.tree_util.register_dataclass(SourceStatistics, data_fields=["value"], meta_fields=["split"])


class Moments(NamedTuple):
    """Moments of some instances, which :func:`source_statistics` joins exactly.

    Centered, since in float32 the difference of a mean square and a squared mean is lost where
    the mean is large beside the deviations.

    Attributes:
      mean: pytree of means.
      centered: pytree of the same structure: means of the squared deviations from them, of the
        shape of the mean; or, of a vector ``[D]``, of their outer products ``[D, D]``.
    """

    mean: PyTree
    centered: PyTree


def value_of(source: Any) -> Any:
    """Statistics themselves, whether or not they still carry their split."""
    return source.value if isinstance(source, SourceStatistics) else source


def mean_of(parts: Sequence[PyTree], counts: Sequence[int]) -> PyTree:
    """The mean over all instances, from the means over parts of so many of them.

    Where the parts hold :class:`Moments`, these are joined as the moments of all instances.
    """
    total = sum(counts)
    shares = [count / total for count in counts]

    def mean(*leaves: Any) -> Any:
        return sum(leaf * share for leaf, share in zip(leaves, shares, strict=True))

    def join(*nodes: Any) -> Any:
        if not isinstance(nodes[0], Moments):
            return mean(*nodes)
        center = jax.tree.map(mean, *(node.mean for node in nodes))
        spread = [
            jax.tree.map(
                lambda c, m, centered: centered + _squared(m - c, centered),
                center,
                node.mean,
                node.centered,
            )
            for node in nodes
        ]
        return Moments(center, jax.tree.map(mean, *spread))

    return jax.tree.map(join, *parts, is_leaf=lambda node: isinstance(node, Moments))


def _squared(distance: jax.Array, like: jax.Array) -> jax.Array:
    """Elementwise, or as an outer product, whichever has the shape that is due."""
    same = jnp.shape(distance) == jnp.shape(like)
    return jnp.square(distance) if same else jnp.outer(distance, distance)


def is_test_split(split: str) -> bool:
    """Whether a split holds test data: ``test[:50%]``, ``train+test``, ``cifartest``, ``all``."""
    words = re.findall(r"[a-z]+", split.lower())
    return any(
        word == "all" or word.startswith("test") or (word.endswith("test") and word not in _OTHERS)
        for word in words
    )


# English words that end in "test" and name no test data.
_OTHERS = ("latest", "fastest", "greatest", "shortest", "brightest", "lightest", "contest")


@_arguments.checked()
def source_statistics(
    fn: Callable[[Params, Any], PyTree],
    params: Params,
    data: Any,
    *,
    reduce: str = "mean",
) -> SourceStatistics:
    """Statistics of the source model over source data: Fisher, moments, feature banks.

    Args:
      fn: ``fn(params, batch) -> pytree``. With ``reduce="mean"`` its leaves are means over the
        batch (squared gradients, features, outer products) and the result is their mean over
        all instances; :class:`Moments` in it become those of all instances. With
        ``"concatenate"`` its leaves are ``[N, ...]`` rows of a bank.
      params: the pristine parameters.
      data: an iterable of batches with an attribute ``split``, such as a
        ``ttt_jax.data.Loader``; a batch is any pytree with a leading axis.
      reduce: ``"mean"`` or ``"concatenate"``.

    Returns:
      :class:`SourceStatistics` with the data's split.

    Raises:
      ValueError: a test split (statistics of the test set leak it), no batch, or an unknown
        ``reduce``.
      TypeError: data without a ``split``.

    References:
      Niu et al., `EATA <https://arxiv.org/abs/2204.02610>`_, 2022, Eq. 9 (Fisher).
    """
    if reduce not in ("mean", "concatenate"):
        raise ValueError(f"reduce must be 'mean' or 'concatenate', got {reduce!r}.")
    split = getattr(data, "split", None)
    if not isinstance(split, str):
        raise TypeError(
            "source_statistics needs data that says which split it is (a str attribute .split); "
            f"got {type(data).__name__}. Use ttt_jax.data.Loader."
        )
    if is_test_split(split):
        raise ValueError(
            f"Source statistics must not come from test data; got the split {split!r}. Use the "
            "training split."
        )
    parts, counts = [], []
    for batch in data:
        parts.append(fn(params, batch))
        counts.append(_checks.leading_size("source_statistics: a batch", batch))
    if not parts:
        raise ValueError(f"source_statistics needs at least one batch; {split!r} is empty.")
    if reduce == "concatenate":
        value = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    else:
        value = mean_of(parts, counts)
    return SourceStatistics(value, split)

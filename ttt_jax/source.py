"""Statistics of the source data that some methods carry to test time."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.base import Params, PyTree


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


def value_of(source: Any) -> Any:
    """Statistics themselves, whether or not they still carry their split."""
    return source.value if isinstance(source, SourceStatistics) else source


def is_test_split(split: str) -> bool:
    """Whether a split holds test data: ``test[:50%]``, ``train+test``, ``my_test``, ``all``."""
    words = re.findall(r"[a-z]+", split.lower())
    return any(word.startswith("test") or word == "all" for word in words)


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
        all instances; with ``"concatenate"`` its leaves are ``[N, ...]`` rows of a bank.
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
        counts.append(jnp.shape(jax.tree.leaves(batch)[0])[0])
    if not parts:
        raise ValueError(f"source_statistics needs at least one batch; {split!r} is empty.")
    if reduce == "concatenate":
        value = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    else:
        total = sum(counts)
        value = jax.tree.map(
            lambda *leaves: sum(
                leaf * (count / total) for leaf, count in zip(leaves, counts, strict=True)
            ),
            *parts,
        )
    return SourceStatistics(value, split)

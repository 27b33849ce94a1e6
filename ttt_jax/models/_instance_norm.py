"""Instance-aware batch normalization, the normalization of NOTE."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class InstanceAware(NamedTuple):
    """A way to serve BatchNorm: an instance's own statistics where they stand out (NOTE).

    With the mean m and the variance v of one instance over its L locations, and the running mu and
    s, an instance is normalized with ``mu + S(m - mu; width * sqrt(s / L))`` and ``max(s + S(v -
    s; width * s * sqrt(2 / (L - 1))), 0)``; ``S(a; b) = sign(a) max(|a| - b, 0)``. Layers without
    locations keep mu and s.

    Attributes:
      width: how many standard errors an instance may deviate unnoticed (NOTE: 4). May be traced.

    References:
      Gong et al., `NOTE <https://arxiv.org/abs/2208.05117>`_, 2022, Eqs. 3-6.
    """

    width: float | jax.Array = 4.0


def instance_aware(
    layer: nn.BatchNorm,
    variables: Mapping[str, Any],
    x: jax.Array,
    base: Mapping[str, jax.Array],
    width: float | jax.Array,
) -> jax.Array:
    """The output of a detached BatchNorm, each instance with its corrected statistics.

    Args:
      layer: without a parent, so that nothing is written.
      variables: its variables.
      x: ``[N, ..., C]``.
      base: ``mean`` and ``var``, running or of the batch.
      width: see :class:`InstanceAware`.
    """
    axes = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
    features = {axis % x.ndim for axis in axes}
    locations = tuple(axis for axis in range(1, x.ndim) if axis not in features)
    count = 1
    for axis in locations:
        count *= x.shape[axis]

    def normalize(rows: jax.Array, statistics: Mapping[str, jax.Array]) -> Any:
        return layer.apply({**variables, "batch_stats": dict(statistics)}, rows, True)

    if count < 2:
        return normalize(x, base)
    values = x.astype(jnp.float32)
    mean, var = base["mean"][None], base["var"][None]
    spread = var + layer.epsilon
    off = values.mean(axis=locations) - mean
    gap = values.var(axis=locations, ddof=1) - var
    corrected = {
        "mean": mean + _soft_shrink(off, width * jnp.sqrt(spread / count)),
        "var": jnp.maximum(var + _soft_shrink(gap, width * spread * (2 / (count - 1)) ** 0.5), 0.0),
    }
    return jax.vmap(lambda row, statistics: normalize(row[None], statistics)[0])(x, corrected)


def _soft_shrink(values: jax.Array, by: jax.Array) -> jax.Array:
    return jnp.maximum(values - by, 0.0) - jnp.maximum(-values - by, 0.0)

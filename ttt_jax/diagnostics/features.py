"""Feature shift: how far the features of some inputs lie from the source's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks
from ttt_jax.source import Moments


class FeatureShift(NamedTuple):
    """Distances of moments, in units of what as many source inputs would show; float32 scalars.

    Attributes:
      mean: of the means.
      covariance: of the covariances.
    """

    mean: jax.Array
    covariance: jax.Array


@_arguments.checked()
def feature_shift(source: Moments, target: Moments, *, count: int) -> FeatureShift:
    """How far mean and covariance of features lie from the source's.

    The squared distances that :func:`~ttt_jax.losses.moment_matching` lowers, each divided by its
    expectation for ``count`` source inputs with normal features: 1 says that nothing moved. The
    gradient of that loss, and with it the largest useful step, goes with these numbers.

    Args:
      source: moments of the source, as :func:`~ttt_jax.losses.feature_moments` gives.
      target: the same of some inputs.
      count: how many inputs those are, at least 2.

    Returns:
      A :class:`FeatureShift`.

    Raises:
      ValueError: fewer than two inputs.
    """
    _checks.check_count("feature_shift: count", count, 2)
    covariance, other = source.centered, target.centered
    width, trace = covariance.shape[0], jnp.trace(covariance)
    coral = jnp.square(covariance - other).sum() / (4 * width**2)
    means = jnp.square(source.mean - target.mean).mean() / 2
    # E |S - S'|_F^2 / (4 D^2) = (|S|_F^2 + tr(S)^2) / (n - 1) / (4 D^2), and
    # E mean((mu - mu')^2) / 2 = tr(S) / (2 n D).
    coral_unit = (jnp.square(covariance).sum() + trace**2) / (count - 1) / (4 * width**2)
    return FeatureShift(means / (trace / (2 * count * width)), coral / coral_unit)

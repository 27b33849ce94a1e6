"""The ways a BatchNorm may be served, shared by the Linen and the NNX bridge.

``"running"`` uses the source's running statistics, ``"batch"`` those of the given batch, and a
prior N blends both: ``N / (N + n)`` source and ``n / (N + n)`` test, with n the number of
instances in the batch (Schneider et al., 2020, "Improving robustness against common corruptions
by covariate shift adaptation", equation 1; mean and variance are blended linearly).
``InstanceAware`` corrects the running statistics instance by instance, in the Linen bridge alone.
"""

import functools
import math
import warnings
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _checks
from ttt_jax.models._checks import nearest
from ttt_jax.models._instance_norm import InstanceAware

Norm: TypeAlias = Literal["running", "batch"] | int | float | jax.Array | InstanceAware
"""``"running"``, ``"batch"``, a prior N >= 0 (a number, or a traced scalar), ``InstanceAware``."""


def check_norm(norm: Any) -> None:
    """Raises unless ``norm`` is ``"running"``, ``"batch"`` or a prior N >= 0.

    Raises:
      ValueError: an unknown name, a negative or non-finite prior, an array that is no scalar.
      TypeError: anything else, booleans included.
    """
    if isinstance(norm, InstanceAware):
        _checks.check_number("norm, InstanceAware.width,", norm.width, 0.0)
    elif isinstance(norm, str):
        if norm not in ("running", "batch"):
            raise ValueError(
                'norm is "running", "batch" or a prior N >= 0, received '
                f"{norm!r}; {nearest(norm, ('running', 'batch'))}"
            )
    elif isinstance(norm, jax.Array | np.ndarray):
        if norm.ndim != 0 or norm.dtype == jnp.bool_:
            raise ValueError(
                f"norm, a prior, is one number, received an array of shape {norm.shape} and dtype "
                f"{norm.dtype}: pass an int, or vmap over a scalar."
            )
        _checks.check_number("norm, a prior,", norm, 0.0)
    elif isinstance(norm, int | float | np.number) and not isinstance(norm, bool):
        if not (math.isfinite(norm) and norm >= 0):
            raise ValueError(
                f"A prior counts pseudo-instances, so it is finite and >= 0, received {norm!r}: "
                'pass 0 for batch statistics alone, or norm="running" for the source\'s.'
            )
    else:
        raise TypeError(
            'norm is "running", "batch" or a prior N >= 0, received '
            f"{norm!r} of type {type(norm).__name__}."
        )


class Served:
    """Whether a bridge met a BatchNorm: without one, ``norm`` would do nothing in silence.

    It remembers, as a later call may find the layers compiled already (``nn.jit``).
    """

    def __init__(self, bridge: str, module: Any, norm: Any):
        self._bridge, self._norm, self._met = bridge, norm, False
        self._name = type(module).__name__

    def meet(self) -> None:
        """Notes a layer."""
        self._met = True

    def check(self, params: Any) -> None:
        """Raises ``ValueError``, or warns where there are no statistics, if none was met."""
        if self._met or (isinstance(self._norm, str) and self._norm == "running"):
            return
        shown = self._norm if isinstance(self._norm, str | int | float) else "of an array"
        rule = (
            f"{self._bridge}: norm={shown!r} is served at layers of flax's own class BatchNorm, "
            f"and {self._name} called none"
        )
        if jax.tree.leaves(params.get("batch_stats", ()) if hasattr(params, "get") else ()):
            raise ValueError(
                f"{rule}, although params has batch_stats: derive your layer from BatchNorm, or "
                'serve this method with norm="running".'
            )
        _warn_none(rule)


@functools.cache
def _warn_none(rule: str) -> None:
    warnings.warn(f'{rule}, so that it does nothing: leave it out (norm="running").', stacklevel=4)


def source_weight(norm: Any, size: int) -> jax.Array:
    """``N / (N + n)``, the share of the source statistics, float32 scalar."""
    prior = jnp.asarray(norm, jnp.float32)
    return prior / (prior + size)


def refuse_single(norm: Any, size: int, where: str) -> None:
    """Raises ``ValueError`` where the statistics would be those of one instance alone.

    Normalized by its own statistics, a single feature vector is all zeros, whatever it was, and
    no error would show it. A traced prior of zero cannot be seen here.
    """
    alone = norm == "batch" or (isinstance(norm, int | float | np.number) and norm == 0)
    if alone and size < 2:
        raise ValueError(
            f"norm={norm!r} takes statistics from the batch and needs at least 2 instances, "
            f"received {size} at {where}: pass a prior such as norm=16, or use GroupNorm."
        )

"""What the diagnostics share: checks of logits and labels, predicted classes."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _checks


def as_logits(name: str, logits: Any, argument: str = "logits") -> jax.Array:
    """Logits ``[..., N, C]`` in float32; refuses anything with fewer axes, and N = 0."""
    logits = jnp.asarray(logits)
    if logits.ndim < 2 or 0 in logits.shape[-2:]:
        raise ValueError(
            f"{name} needs {argument} [..., N, C] with at least one instance; got shape "
            f"{logits.shape}. Collect the predictions of all instances first."
        )
    return logits.astype(jnp.float32)


def classes(logits: jax.Array) -> jax.Array:
    """``[..., C] -> [...]``: the predicted class; -1, which is no class, where a logit is nan."""
    return jnp.where(jnp.isnan(logits).any(-1), -1, jnp.argmax(logits, axis=-1))


def hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Bool ``[..., N]``: whether each prediction is its label (a nan prediction never is)."""
    found = classes(logits)
    return (found == jnp.broadcast_to(labels, found.shape)) & (found >= 0)


def as_labels(name: str, labels: Any, count: int, classes: int) -> jax.Array:
    """Integer labels ``[N]``."""
    labels = jnp.asarray(labels)
    if labels.shape != (count,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"{name} needs one integer label per instance as labels, shape ({count},); got shape "
            f"{labels.shape}, dtype {labels.dtype}."
        )
    known = _checks.known(labels)
    if known is not None and ((known < -1) | (known >= classes)).any():
        wrong = known[(known < -1) | (known >= classes)][0]
        raise ValueError(
            f"{name} needs labels from 0 to {classes - 1}, or -1 for none of them; got {wrong}."
        )
    return labels


def as_pair(
    name: str, logits: Any, pristine_logits: Any, argument: str = "logits"
) -> tuple[jax.Array, jax.Array]:
    """Adapted logits ``[..., N, C]`` and pristine ones ``[N, C]``."""
    logits = as_logits(name, logits, argument)
    pristine = as_logits(name, pristine_logits, "pristine_logits")
    if pristine.shape != logits.shape[-2:]:
        raise ValueError(
            f"{name} compares {argument} [..., N, C] with pristine_logits [N, C] of the same "
            f"instances; got {logits.shape} and {pristine.shape}."
        )
    return logits, pristine

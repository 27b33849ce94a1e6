"""The loss of sequences that are packed into rows, each with a weight of its own."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _contract
from ttt_jax.base import AuxLoss, Key, Params
from ttt_jax.losses.tokens import token_nats


class SequenceSums(NamedTuple):
    """Sums over the labeled tokens of every sequence, float32 ``[R, M]``.

    Attributes:
      nats: ``-log p`` of the labels.
      wrong: labels that are not the most probable token.
      labels: how many there are.
    """

    nats: jax.Array
    wrong: jax.Array
    labels: jax.Array


@_arguments.checked()
def sequence_sums(logits: jax.Array, batch: Any) -> SequenceSums:
    """Sums per packed sequence.

    Args:
      logits: ``[R, T, V]``.
      batch: a mapping of ``label`` ``[R, T]`` (-1 where there is none), ``segment`` ``[R, T]`` (-1
        for none) and ``task`` ``[R, M]``.
    """
    label, segment, task = _leaves(batch, jnp.shape(logits))
    labeled = label >= 0
    nats = token_nats(logits, jnp.maximum(label, 0))
    wrong = (logits.argmax(-1) != label).astype(jnp.float32)
    leaves = jnp.stack([nats, wrong, jnp.ones_like(nats)], -1)
    leaves = jnp.where(labeled[..., None], leaves, 0.0)
    own = jax.nn.one_hot(segment, task.shape[1], dtype=jnp.float32)
    sums = jnp.einsum("rtk,rtm->krm", leaves, own, precision="highest")
    return SequenceSums(*sums)


def _leaves(batch: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels, segments and tasks of a packed batch whose logits have this shape."""
    names = ("label", "segment", "task")
    if not isinstance(batch, Mapping) or any(name not in batch for name in names):
        known = sorted(batch) if isinstance(batch, Mapping) else _contract.described(batch)
        raise ValueError(
            f"batch must be a mapping with the leaves {', '.join(names)}; got {known}: pass "
            "grid_sequences.Packed._asdict()."
        )
    label, segment, task = (jnp.asarray(batch[name]) for name in names)
    rows = label.shape
    if len(shape) != 3 or shape[:2] != rows or segment.shape != rows or task.ndim != 2:
        raise ValueError(
            f"batch must have label and segment [R, T] and task [R, M] for logits [R, T, V]; got "
            f"{rows}, {segment.shape} and {task.shape} for {shape}."
        )
    return label.astype(jnp.int32), segment.astype(jnp.int32), task


@_arguments.checked(power=_arguments.number(0.0, 1.0))
def packed_sequences(
    apply: Callable[[Params, Any], jax.Array],
    *,
    power: float | jax.Array = 0.5,
    report: bool = False,
) -> AuxLoss:
    """Mean nats over packed sequences, between a mean over tokens and one over sequences.

    ``sum_s w[s] nats[s] / sum_s w[s] n[s]`` with ``w[s] = n[s] ** -power`` for a sequence of n
    labels: 0 is the mean over tokens, 1 that over sequences of their means.

    Args:
      apply: model function ``(params, batch) -> logits[R, T, V]``.
      power: may be traced.
      report: whether the loss returns ``(scalar, aux)`` with ``exact``, the share of sequences
        without a wrong token, and ``nats``, the mean over tokens.

    Returns:
      An ``AuxLoss`` over a packed batch, a mapping as in :func:`sequence_sums` and what the model
      takes. Without a labeled token it is 0, with gradient 0.
    """
    _contract.require_function("apply", apply, "(params, batch) -> logits[R, T, V]")

    def loss(params: Params, x: Any, key: Key) -> Any:
        sums = sequence_sums(apply(params, x), x)
        weights = jnp.where(sums.labels > 0, jnp.maximum(sums.labels, 1.0) ** -power, 0.0)
        value = (weights * sums.nats).sum() / jnp.maximum((weights * sums.labels).sum(), 1e-9)
        if not report:
            return value
        known = sums.labels > 0
        right = (known & (sums.wrong == 0)).sum(dtype=jnp.float32)
        exact = right / jnp.maximum(known.sum(dtype=jnp.float32), 1.0)
        return value, {
            "exact": exact,
            "nats": sums.nats.sum() / jnp.maximum(sums.labels.sum(), 1.0),
        }

    return loss

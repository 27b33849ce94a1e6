"""The loss of sequences that are packed into rows, each with a weight of its own."""

from collections.abc import Callable
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
    label, segment = (jnp.asarray(batch[name]).astype(jnp.int32) for name in ("label", "segment"))
    labeled = label >= 0
    nats = token_nats(logits, jnp.maximum(label, 0))
    leaves = jnp.stack([nats, logits.argmax(-1) != label, jnp.ones_like(nats)], -1)
    leaves = jnp.where(labeled[..., None], leaves, 0.0)
    own = jax.nn.one_hot(segment, jnp.shape(batch["task"])[1], dtype=jnp.float32)
    sums = jnp.einsum("rtk,rtm->krm", leaves, own, precision="highest")
    return SequenceSums(*sums)


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
        sequences = jnp.maximum((sums.labels > 0).sum(), 1)
        exact = ((sums.wrong == 0) & (sums.labels > 0)).sum() / sequences
        return value, {
            "exact": exact,
            "nats": sums.nats.sum() / jnp.maximum(sums.labels.sum(), 1.0),
        }

    return loss

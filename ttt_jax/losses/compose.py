"""Losses made of losses."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _checks
from ttt_jax.base import AuxLoss, Key, Params, PyTree, StatefulLoss


def weighted(*terms: tuple[Any, AuxLoss | StatefulLoss]) -> AuxLoss | StatefulLoss:
    """``sum_j w_j * loss_j``; term j gets the key ``fold_in(key, j)``.

    Args:
      *terms: pairs ``(weight, loss)``; weights may be traced. If any loss is a
        :class:`~ttt_jax.StatefulLoss` the result is one too, its memory a tuple with one entry
        per term.

    Returns:
      An ``AuxLoss``, or a ``StatefulLoss``.

    Raises:
      ValueError: no term, a term that is not a pair, or a known weight of nan.

    Examples:
      >>> import jax
      >>> both = weighted((2.0, lambda p, x, k: p * x), (1.0, lambda p, x, k: p))
      >>> print(both(3.0, 5.0, jax.random.key(0)))
      33.0
    """
    if not terms or not all(isinstance(term, tuple) and len(term) == 2 for term in terms):
        raise ValueError(
            "losses.weighted needs pairs (weight, loss), as in weighted((1.0, a), (0.5, b)); got "
            f"{len(terms)} arguments of types {[type(term).__name__ for term in terms]}."
        )

    for j, (weight, _) in enumerate(terms):
        _checks.check_number(f"losses.weighted: weight {j}", weight)

    def init(params: Params) -> PyTree:
        return tuple(
            loss.init(params) if isinstance(loss, StatefulLoss) else () for _, loss in terms
        )

    def value(params: Params, memory: PyTree, x: Any, key: Key) -> tuple[jax.Array, PyTree]:
        total, memories = jnp.zeros((), jnp.float32), []
        for j, ((weight, loss), old) in enumerate(zip(terms, memory, strict=True)):
            term_key = jax.random.fold_in(key, j)
            if isinstance(loss, StatefulLoss):
                term, old = loss.value(params, old, x, term_key)
            else:
                term = loss(params, x, term_key)
            total = total + weight * term
            memories.append(old)
        return total, tuple(memories)

    def after(adapted_params: Params, memory: PyTree) -> PyTree:
        return tuple(
            loss.after(adapted_params, old) if isinstance(loss, StatefulLoss) else old
            for (_, loss), old in zip(terms, memory, strict=True)
        )

    if any(isinstance(loss, StatefulLoss) for _, loss in terms):
        return StatefulLoss(init, value, after)
    stateless = ((),) * len(terms)
    return lambda params, x, key: value(params, stateless, x, key)[0]


def over_batch(loss: AuxLoss) -> AuxLoss:
    """Lifts a one-instance loss over a batch: the mean over instances, one key per instance.

    Args:
      loss: an ``AuxLoss`` over one instance.

    Returns:
      An ``AuxLoss`` over ``xs`` with a leading batch axis on every leaf.

    Raises:
      TypeError: the loss has a memory, which belongs to one instance or stream.
    """
    if isinstance(loss, StatefulLoss):
        raise TypeError(
            "losses.over_batch lifts plain losses; got a StatefulLoss, whose memory belongs to "
            "one stream. Write its value over the batch instead."
        )

    def batched_loss(params: Params, x: Any, key: Key) -> jax.Array:
        count = _checks.leading_size("losses.over_batch", x)
        keys = _checks.split_to_map("losses.over_batch", key, count)
        return jax.vmap(loss, in_axes=(None, 0, 0))(params, x, keys).mean()

    return batched_loss

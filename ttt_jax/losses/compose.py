"""Losses made of losses."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract
from ttt_jax.base import AuxLoss, Key, Params, PyTree, StatefulLoss
from ttt_jax.losses import _inputs


@_arguments.checked(terms=None)
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
            "losses.weighted needs terms, pairs (weight, loss), as weighted((1.0, a), (0.5, b)); "
            f"got {len(terms)} arguments of types {[type(term).__name__ for term in terms]}."
        )

    for j, (weight, loss) in enumerate(terms):
        _checks.check_number(f"losses.weighted: weight {j} of terms", weight)
        _check_loss(f"losses.weighted: loss {j} of terms", loss)

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
            total = total + weight * _scalar("weighted", term)
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


@_arguments.checked(loss=_arguments.loss)
def over_batch(loss: AuxLoss) -> AuxLoss:
    """Lifts a one-instance loss over a batch: the mean over instances, one key per instance.

    Args:
      loss: an ``AuxLoss`` over one instance.

    Returns:
      An ``AuxLoss`` over ``xs`` with a leading batch axis on every leaf.

    Raises:
      TypeError: the loss has a memory, which belongs to one instance or stream, or is no function.
      ValueError: the loss is over a batch already; when called: an empty batch.
    """
    if isinstance(loss, StatefulLoss):
        raise TypeError(
            "losses.over_batch lifts plain losses; got a StatefulLoss, whose memory belongs to "
            "one stream. Write its value over the batch instead."
        )
    _check_loss("losses.over_batch: loss", loss)
    if _inputs.is_over_batch(loss):
        raise ValueError(
            "losses.over_batch lifts a loss over one instance; got one that averages over a batch "
            "already (batch=True, or over_batch). Use it as it is, or build it with batch=False."
        )

    def batched_loss(params: Params, x: Any, key: Key) -> jax.Array:
        count = _inputs.count_of("over_batch", x)
        keys = _checks.split_to_map("losses.over_batch", key, count)
        values = jax.vmap(lambda one, k: _scalar("over_batch", loss(params, one, k)))(x, keys)
        return values.mean()

    return _inputs.over_batch(batched_loss)


def _check_loss(argument: str, loss: Any) -> None:
    if not isinstance(loss, StatefulLoss):
        _contract.require_function(argument, loss, "(params, x, key) -> scalar")


def _scalar(name: str, value: Any) -> jax.Array:
    """The value of one loss; refuses a report beside it, for which the sum has no place."""
    if isinstance(value, tuple | list | dict):
        raise TypeError(
            f"losses.{name} adds losses that return a scalar; one returned "
            f"{_contract.described(value)}: leave what it reports beside the scalar out, or give "
            "it to gradient_adapter by itself, with has_aux=True."
        )
    return jnp.asarray(value)

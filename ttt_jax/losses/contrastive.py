"""Contrastive instance discrimination, the auxiliary task of TTT++."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks
from ttt_jax.base import AuxLoss, Key, Params
from ttt_jax.losses import _inputs, _source
from ttt_jax.source import value_of


def _unit(vectors: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays, with a finite gradient."""
    square = jnp.square(vectors).sum(axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


@_arguments.checked()
def contrastive(
    apply: Callable[..., Any],
    augment: Callable[[Any, Key], Any],
    *,
    temperature: float | jax.Array = 0.5,
    bank: Any = None,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """NT-Xent over two random views of each instance (SimCLR).

    The mean over the 2N views of ``-log(exp(s(i, j) / t) / sum_k exp(s(i, k) / t))``: s is the
    cosine, j the other view of the same instance, k every other view and every row of the bank.

    Args:
      apply: model function of the projection head, ``(params, inputs[N, ...]) -> [N, D]``.
      augment: ``augment(x, key) -> x``, one random view of one instance.
      temperature: t > 0. May be traced.
      bank: ``[M, D]`` representations of source instances, of any length: further negatives,
        never differentiated. Needed for one instance, which has no batch mates to differ from.
        Make it with ``source_statistics(lambda params, batch: apply(params, batch.image), params,
        loader, reduce="concatenate")``, whose result is taken too.
      batch: whether ``x`` has a leading batch axis; all 2N views go through one call. The usual
        loss has no bank.
      stochastic: whether ``apply`` takes a key as third argument.

    Returns:
      An ``AuxLoss``.

    Raises:
      ValueError: one instance without a bank, or a bank that is not ``[M, D]`` with M >= 1; when
        called: a batch of images where one instance is due, a batch of one without a bank, or
        outputs that are not ``[N, D]``.

    References:
      Chen et al., `SimCLR <https://arxiv.org/abs/2002.05709>`_, 2020, Eq. 1.
    """
    if bank is None and not batch:
        raise ValueError(
            "losses.contrastive needs negatives for one instance; got bank = None. Pass stored "
            "source representations [M, D] as bank, or build the loss with batch=True."
        )
    _checks.check_number("temperature", temperature, 0.0, above=True)
    rows = None if bank is None else _arguments.array(finite=True)("", "bank", value_of(bank))
    if rows is not None and (rows.ndim != 2 or rows.shape[0] < 1):
        raise ValueError(
            f"bank must hold source representations [M, D] with M >= 1; got shape {rows.shape}."
        )
    call = _inputs.caller("contrastive", apply, stochastic)

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        instances = _inputs.check_instance("contrastive", x, batch)
        count = _inputs.batch_size(instances)
        if count < 2 and rows is None:
            raise ValueError(
                f"losses.contrastive needs at least 2 instances; got a batch of {count}. Use "
                "larger batches, or pass a bank of source representations."
            )
        view_key, model_key = jax.random.split(key)
        keys = _inputs.instance_keys("contrastive", view_key, count, batch)
        views = jax.vmap(lambda one, k: _inputs.views_of(augment, one, k, 2))(instances, keys)
        outputs = call(params, _inputs.flatten_views(views), model_key)
        width = None if rows is None else rows.shape[1]
        units = _unit(_source.check_features("contrastive", outputs, 2 * count, width))
        # The views of instance n are rows 2n and 2n + 1.
        places = jnp.arange(2 * count)
        similarity = units @ units.T / temperature
        logits = jnp.where(jnp.eye(2 * count, dtype=bool), -jnp.inf, similarity)
        if rows is not None:
            negatives = jax.lax.stop_gradient(_unit(rows.astype(jnp.float32)))
            logits = jnp.concatenate([logits, units @ negatives.T / temperature], axis=1)
        positives = similarity[places, places ^ 1]
        return (jax.nn.logsumexp(logits, axis=1) - positives).mean()

    return _inputs.over_batch(loss, batch)

"""Losses of the predicted distribution: entropy, marginal entropy, pseudo-labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks
from ttt_jax.base import AuxLoss, Key, Params
from ttt_jax.losses import _inputs


@_arguments.checked()
def entropy(
    apply: Callable[..., Any],
    *,
    weight: Callable[[jax.Array], jax.Array] | None = None,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Shannon entropy of the prediction, in nats.

    ``sum(w * H) / max(sum(w), 1)`` with ``w`` held constant; the mean of H without a weight. A
    batch whose weights are all zero makes no step.

    Args:
      apply: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``; middle axes
        (pixels) are averaged.
      weight: ``weight(logits[N, ..., C]) -> [N]``, a filter or a reliability.
      batch: whether ``x`` has a leading batch axis (Tent).
      stochastic: whether ``apply`` takes a key as third argument.

    Returns:
      An ``AuxLoss``.

    Raises:
      ValueError: when called: a batch of images where one instance is due, logits whose leading
        axis is not N, weights that are not ``[N]``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> loss = entropy(lambda params, x: x * params)
      >>> print(loss(1.0, jnp.zeros(4), jax.random.key(0)))
      1.3862944

    References:
      Wang et al., `Tent <https://arxiv.org/abs/2006.10726>`_, 2021, Section 3.1. For the filters
      of EATA and SAR see :func:`sample_adaptive_entropy` and :func:`reliable_entropy`.
    """
    call = _inputs.caller("entropy", apply, stochastic)

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        inputs = _inputs.check_instance("entropy", x, batch)
        count = _inputs.batch_size(inputs)
        logits = _inputs.check_logits("entropy", call(params, inputs, key), count)
        values = _inputs.per_instance(_inputs.entropy(_inputs.log_probabilities(logits)))
        if weight is None:
            return values.mean()
        weights = jnp.asarray(weight(logits))
        if weights.shape != (count,):
            raise ValueError(
                f"weight must return one value per instance, shape ({count},); got {weights.shape}."
            )
        return _inputs.weighted_mean(weights, values)

    return _inputs.over_batch(loss, batch)


@_arguments.checked()
def marginal_entropy(
    apply: Callable[..., Any],
    augment: Callable[[Any, Key], Any],
    *,
    num_views: int,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Entropy of the mean prediction over random views of one instance (MEMO), in nats.

    ``H(p_bar)`` with ``log p_bar = logsumexp_j log p_j - log V``.

    Args:
      apply: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``.
      augment: ``augment(x, key) -> x``, one random view of one instance.
      num_views: V, the number of views (MEMO: 32 on CIFAR, 64 on ImageNet).
      batch: whether ``x`` has a leading batch axis; all N * V views go through one call and the
        loss averages the N marginal entropies.
      stochastic: whether ``apply`` takes a key as third argument.

    Returns:
      An ``AuxLoss``.

    Raises:
      ValueError: ``num_views`` < 1; when called: a batch of images where one instance is due,
        or logits whose leading axis is not the number of views.

    References:
      Zhang et al., `MEMO <https://arxiv.org/abs/2110.09506>`_, 2022, Eqs. 1-2.
    """
    _checks.check_count("num_views", num_views)
    call = _inputs.caller("marginal_entropy", apply, stochastic)

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        instances = _inputs.check_instance("marginal_entropy", x, batch)
        count = _inputs.batch_size(instances)
        view_key, model_key = jax.random.split(key)
        keys = _inputs.instance_keys("marginal_entropy", view_key, count, batch)
        views = jax.vmap(lambda one, k: _inputs.views_of(augment, one, k, num_views))(
            instances, keys
        )
        logits = call(params, _inputs.flatten_views(views), model_key)
        logits = _inputs.check_logits("marginal_entropy", logits, count * num_views)
        log_p = _inputs.log_probabilities(logits)
        log_p = log_p.reshape((count, num_views) + log_p.shape[1:])
        marginal = jax.nn.logsumexp(log_p, axis=1) - jnp.log(float(num_views))
        return _inputs.entropy(marginal).mean()

    return _inputs.over_batch(loss, batch)


@_arguments.checked()
def pseudo_label(
    apply: Callable[..., Any],
    *,
    threshold: float | jax.Array = 0.0,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Cross-entropy to the model's own most likely class.

    Instances whose confidence is below ``threshold`` weigh nothing:
    ``sum(w * CE) / max(sum(w), 1)``, ``w = [max p >= threshold]``.

    Args:
      apply: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``; with middle axes
        the mean over them decides.
      threshold: confidence in [0, 1]. May be traced.
      batch: whether ``x`` has a leading batch axis.
      stochastic: whether ``apply`` takes a key as third argument.

    Returns:
      An ``AuxLoss``.

    Raises:
      ValueError: when called: a batch of images where one instance is due, or logits whose
        leading axis is not N.

    References:
      Lee, Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method, 2013.
    """
    _checks.check_share("threshold", threshold)
    call = _inputs.caller("pseudo_label", apply, stochastic)

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        inputs = _inputs.check_instance("pseudo_label", x, batch)
        logits = call(params, inputs, key)
        logits = _inputs.check_logits("pseudo_label", logits, _inputs.batch_size(inputs))
        log_p = jax.nn.log_softmax(logits, axis=-1)
        # The entry, not the maximum: classes that tie would share its gradient, and none be sure.
        best = jnp.take_along_axis(log_p, logits.argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
        confidence = _inputs.per_instance(jnp.exp(best))
        return _inputs.weighted_mean(confidence >= threshold, -_inputs.per_instance(best))

    return _inputs.over_batch(loss, batch)

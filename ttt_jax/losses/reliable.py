"""Entropy of the samples worth learning from: the filters of EATA and SAR."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks
from ttt_jax.base import AuxLoss, Key, Params, PyTree, StatefulLoss
from ttt_jax.losses import _inputs


@_arguments.checked(reference=_arguments.params)
def reliable_entropy(
    apply: Callable[..., Any],
    *,
    margin: float | jax.Array = 0.4,
    reference: Params | None = None,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Mean entropy of the reliable instances, those with ``H < E0 = margin * ln C`` (SAR).

    In nats; exactly 0, with a gradient of 0, where no instance is reliable.

    SAR filters twice, before and after its climb to the sharpest nearby weights: an instance
    counts there only if it is reliable under both. That is ``reference``::

        loss = reliable_entropy(apply, batch=True)
        adapter = sharpness_aware_adapter(
            loss, optimizer, select=select, rho=0.05,
            peak_loss=lambda params: reliable_entropy(apply, reference=params, batch=True))

    Args:
      apply: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``; the entropies of
        middle axes (pixels) are averaged.
      margin: the margin as a share of ``ln C``, the largest entropy there is. May be traced.
      reference: parameters under which an instance must be reliable too.
      batch: whether ``x`` has a leading batch axis.
      stochastic: whether ``apply`` takes a key as third argument.

    Returns:
      An ``AuxLoss``.

    Raises:
      ValueError: when called: a batch of images where one instance is due, or logits whose
        leading axis is not N.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> loss = reliable_entropy(lambda params, x: x * params, batch=True)
      >>> unsure, sure = jnp.zeros(4), jnp.array([3.0, 0.0, 0.0, 0.0])
      >>> print(round(float(loss(1.0, jnp.stack([unsure, sure]), jax.random.key(0))), 4))
      0.5291

    References:
      Niu et al., `Towards Stable Test-Time Adaptation in Dynamic Wild World
      <https://arxiv.org/abs/2302.12400>`_, 2023, Eqs. 1-2; the second filter is in the authors'
      code, github.com/mr-eggplant/SAR, ``sar.py``.
    """
    name = "reliable_entropy"
    _checks.check_number("margin", margin, 0.0)
    call = _inputs.caller(name, apply, stochastic)

    def measure(params: Params, inputs: Any, key: Key) -> tuple[jax.Array, jax.Array]:
        logits = call(params, inputs, key)
        log_p = _log_p(name, logits, _inputs.batch_size(inputs))
        entropy = _inputs.per_instance(_inputs.entropy(log_p))
        return entropy, entropy < margin * jnp.log(float(log_p.shape[-1]))

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        inputs = _inputs.check_instance(name, x, batch)
        entropy, reliable = measure(params, inputs, key)
        if reference is not None:
            reliable &= measure(reference, inputs, key)[1]
        return _inputs.weighted_mean(reliable, entropy)

    return _inputs.over_batch(loss, batch)


@_arguments.checked()
def sample_adaptive_entropy(
    apply: Callable[..., Any],
    *,
    num_classes: int,
    epsilon: float | jax.Array,
    margin: float | jax.Array = 0.4,
    decay: float | jax.Array = 0.9,
    batch: bool = False,
    stochastic: bool = False,
) -> StatefulLoss:
    """Weighted entropy of the instances that are reliable and not redundant (EATA), in nats.

    The mean of ``exp(E0 - H) * H`` over the instances with ``H < E0`` and ``cos(p, m) <
    epsilon``, where ``E0 = margin * ln C``, the weights are constants, and m is the moving
    average of the predictions taken so far: ``m <- decay * m + (1 - decay) * mean(p)`` over the
    instances taken now. Until the first is taken, there is no m and nothing is redundant. The
    loss is exactly 0, with a gradient of 0, where no instance is taken.

    EATA adds a penalty on leaving the source weights: ``gradient_adapter(...,
    anchor=2 * beta * fisher)``, see :func:`fisher_diagonal`.

    Args:
      apply: model function ``(params, inputs[N, ...]) -> logits[N, C]``.
      num_classes: C.
      epsilon: the largest cosine between a prediction and the average: 0.05 for ImageNet's 1000
        classes. Predictions over few classes lie closer together: 0.4 is in use for CIFAR-10.
        May be traced.
      margin: the entropy margin as a share of ``ln C``. May be traced.
      decay: weight of the old average. May be traced.
      batch: whether ``x`` has a leading batch axis.
      stochastic: whether ``apply`` takes a key as third argument.

    Returns:
      A ``StatefulLoss``; its memory holds the average ``probability`` ``[C]`` and whether it has
      ``started``.

    Raises:
      ValueError: ``num_classes`` < 2; when called: a batch of images where one instance is due,
        or logits that are not ``[N, C]``.

    References:
      Niu et al., `EATA <https://arxiv.org/abs/2204.02610>`_, 2022, Eqs. 2-6; constants from the
      authors' code, github.com/mr-eggplant/EATA, ``eata.py``.
    """
    name = "sample_adaptive_entropy"
    _checks.check_count("num_classes", num_classes, 2)
    _checks.check_number("epsilon", epsilon, 0.0)
    _checks.check_number("margin", margin, 0.0)
    _checks.check_share("decay", decay)
    call = _inputs.caller(name, apply, stochastic)

    def init(params: Params) -> PyTree:
        return {
            "probability": jnp.zeros((num_classes,), jnp.float32),
            "started": jnp.zeros((), bool),
        }

    def value(params: Params, memory: PyTree, x: Any, key: Key) -> tuple[jax.Array, PyTree]:
        inputs = _inputs.check_instance(name, x, batch)
        count = _inputs.batch_size(inputs)
        log_p = _log_p(name, call(params, inputs, key), count, num_classes)
        if log_p.ndim != 2:
            raise ValueError(
                f"losses.{name} compares one prediction per instance and needs logits [N, C]; got "
                f"shape {log_p.shape}. Average the other axes in the model function."
            )
        entropy, p = _inputs.entropy(log_p), jax.lax.stop_gradient(jnp.exp(log_p))
        margin_nats = margin * jnp.log(float(num_classes))
        average, started = memory["probability"], memory["started"]
        lengths = jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(average)
        # Before the first average the length is 0, and so is the cosine.
        cosine = jnp.sum(p * average[None], axis=-1) / jnp.where(lengths > 0, lengths, 1.0)
        taken = (entropy < margin_nats) & (~started | (cosine < epsilon))
        number = taken.sum().astype(jnp.float32)
        weights = jnp.where(taken, jnp.exp(margin_nats - entropy), 0.0)
        total = jnp.sum(jax.lax.stop_gradient(weights) * entropy)
        new = jnp.where(taken[:, None], p, 0.0).sum(axis=0) / jnp.maximum(number, 1)
        blended = (decay * average + (1 - decay) * new).astype(jnp.float32)
        moved = jnp.where(started, blended, new)
        memory = {
            "probability": jnp.where(number > 0, moved, average),
            "started": started | (number > 0),
        }
        return total / jnp.maximum(number, 1), memory

    def after(adapted_params: Params, memory: PyTree) -> PyTree:
        return memory

    return StatefulLoss(init, value, after)


def _log_p(name: str, logits: Any, count: int, classes: int | None = None) -> jax.Array:
    return _inputs.log_probabilities(_inputs.check_logits(name, logits, count, classes))

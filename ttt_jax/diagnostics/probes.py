"""All diagnostics of a classifier and an auxiliary task: of one instance, and of many of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks
from ttt_jax.base import Adapter, AuxLoss, Info, Key, Params, Predictor, Selection
from ttt_jax.diagnostics import (
    _inputs,
    alignment as alignment_lib,
    maps,
    monitors,
    selectors,
)


class Probe(NamedTuple):
    """What :func:`probe` tells of one instance, over L learning rates and S steps.

    Attributes:
      logits: ``[L, S + 1, C]``, entry 0 of the second axis before adapting.
      drift: float32 ``[L, S + 1]``, of the parameters that both losses read.
      accuracy: ``[L, S + 1]``, of the auxiliary task; None where it has no right answer.
      alignment: of the gradients before adapting.
      smoothness: float32 scalar, see :func:`secant_smoothness`.
    """

    logits: jax.Array
    drift: jax.Array
    accuracy: jax.Array | None
    alignment: alignment_lib.Alignment
    smoothness: jax.Array


@_arguments.checked(
    classify=_arguments.function(2, "(params, x) -> logits"), learning_rates=_arguments.array(1)
)
def probe(
    classify: Callable[[Params, Any], jax.Array],
    aux_loss: AuxLoss,
    make: Callable[[jax.Array], Adapter],
    *,
    select: Selection,
    learning_rates: Any,
    num_steps: int,
    accuracy: Callable[[Params, Any], jax.Array] | None = None,
) -> Predictor:
    """Alignment, smoothness and a step size map of one labeled instance.

    **Needs labels**, for the alignment and the smoothness alone. Gradients are compared, and
    drift is measured, in the selected parameters that both losses read; the main loss is the
    cross-entropy.

    Args:
      classify: one-instance function ``(params, x) -> logits[C]``.
      aux_loss: what the steps descend.
      make: ``make(learning_rate) -> Adapter``, as in :func:`step_size_map`.
      select: the parameters that adapt.
      learning_rates: ``[L]``, as in :func:`step_size_map`.
      num_steps: S, static.
      accuracy: ``(params, x) -> scalar`` of the auxiliary task, as :func:`auxiliary_accuracy`.

    Returns:
      A predictor ``(params, (x, label), key) -> (Probe, Info)`` to run with
      :func:`~ttt_jax.batched`; the ``Info`` has a leading axis L.

    Raises:
      ValueError: when called: as :func:`shared_parameters` and :func:`step_size_map`.
    """

    def main_loss(params: Params, x: Any, label: Any, key: Key) -> jax.Array:
        logits = classify(params, x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    def measure(params: Params, example: Any, key: Key) -> tuple[Probe, Info]:
        x, label = example
        losses, instance = (main_loss, aux_loss), (params, x, label, key)
        shared = alignment_lib.shared_parameters(*losses, select=select)(*instance)

        def observe(adapted: Params, x: Any) -> tuple[Any, ...]:
            right = None if accuracy is None else accuracy(adapted, x)
            return classify(adapted, x), monitors.drift(params, adapted, shared), right

        predict = maps.step_size_map(
            make, observe, learning_rates=learning_rates, num_steps=num_steps
        )
        (logits, drift, right), info = predict(params, x, key)
        aligned = alignment_lib.gradient_alignment(*losses, select=shared)(*instance)
        smoothness = alignment_lib.secant_smoothness(*losses, select=shared)(*instance)
        return Probe(logits, drift, right, aligned, smoothness), info

    return measure


@_arguments.checked(labels=_arguments.array(), rate_index=_arguments.count(0))
def summary(
    probes: Probe, info: Info, labels: Any, *, rate_index: int, classes_kept: float = 0.9
) -> dict[str, jax.Array]:
    """What the probes of N instances tell together.

    **Needs labels**: all but the monitors and the choice called ``label_free`` is an evaluation
    that may choose nothing.

    Args:
      probes: of :func:`probe`, every leaf with a leading axis N.
      info: of the same instances.
      labels: integers ``[N]``.
      rate_index: which learning rate "after" is about; the number of steps is the largest.
      classes_kept: the share of the :func:`effective_classes` before adapting that the choice
        without labels must keep.

    Returns:
      Scalars by name, and ``[L, S + 1]`` for names that end in ``_map``. Means of the alignment
      are over the instances whose gradients are finite; ``guaranteed_step`` is the median where
      that step exists, nan where it never does.
    """
    _checks.check_share("classes_kept", classes_kept)
    logits = jnp.moveaxis(probes.logits, 0, 2)
    _inputs.as_labels("summary", labels, *logits.shape[-2:])
    if rate_index >= len(logits):
        raise ValueError(
            f"rate_index must be the place of one of {len(logits)} rates; got {rate_index}."
        )
    values = {
        **_alignment(probes.alignment, probes.smoothness),
        **_outcome(logits[rate_index, -1], logits[0, 0], labels),
        "drift": probes.drift.mean(0)[rate_index, -1],
        "non_finite": (~info.ok[:, rate_index]).sum(),
        **_map(logits, labels, classes_kept),
    }
    if probes.accuracy is not None:
        accuracy = probes.accuracy.mean(0)[rate_index]
        values["auxiliary_accuracy_before"] = accuracy[0]
        values["auxiliary_accuracy_after"] = accuracy[-1]
    return values


def _alignment(alignment: alignment_lib.Alignment, smoothness: jax.Array) -> dict[str, jax.Array]:
    finite = jnp.isfinite(alignment.main_norm) & jnp.isfinite(alignment.aux_norm)
    step = alignment_lib.guaranteed_step(alignment, smoothness=smoothness)
    columns = {
        "inner_product": alignment.inner,
        "cosine": alignment.cosine,
        "main_norm": alignment.main_norm,
        "aux_norm": alignment.aux_norm,
        "aligned_share": alignment.inner > 0,
        "smoothness": smoothness,
    }
    means = {name: jnp.mean(column, where=finite) for name, column in columns.items()}
    guaranteed = jnp.nanmedian(jnp.where(finite & (step > 0), step, jnp.nan))
    return means | {"guaranteed_step": guaranteed}


def _outcome(after: jax.Array, before: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """What the configured steps did to the predictions ``[N, C]``."""
    harm = monitors.harm(after, before, labels)
    source_error, ttt_error = _errors(before, labels), _errors(after, labels)
    return {
        "source_error": source_error,
        "ttt_error": ttt_error,
        "gain": source_error - ttt_error,
        "turned_right": harm.turned_right / len(labels),
        "turned_wrong": harm.rate,
        "agreement": monitors.agreement(after, before),
        "effective_classes_before": monitors.effective_classes(before),
        "effective_classes_after": monitors.effective_classes(after),
        "predicted_classes_before": monitors.predicted_classes(before),
        "predicted_classes_after": monitors.predicted_classes(after),
    }


def _map(logits: jax.Array, labels: jax.Array, classes_kept: float) -> dict[str, jax.Array]:
    """Over ``logits[L, S + 1, N, C]``: two choices, and what they chose from."""
    classes = monitors.effective_classes(logits)
    errors = _errors(logits, labels)
    criterion = selectors.lowest_entropy(floor=classes_kept * classes[0, 0])
    free = selectors.select_label_free(logits, criterion=criterion)
    oracle = selectors.oracle_select(logits, labels)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return {
        "label_free_rate_index": free.rate_index,
        "label_free_num_steps": free.num_steps,
        "label_free_error": errors[free.rate_index, free.num_steps],
        "oracle_rate_index": oracle.oracle_rate_index,
        "oracle_num_steps": oracle.oracle_num_steps,
        "oracle_error": 1 - oracle.oracle_accuracy,
        "entropy_map": -(jnp.exp(log_p) * log_p).sum(-1).mean(-1),
        "effective_classes_map": classes,
        "oracle_error_map": errors,
    }


def _errors(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of wrong predictions, ``[..., N, C] -> [...]``; one with a nan is wrong."""
    return (~_inputs.hits(logits, labels)).mean(axis=-1, dtype=jnp.float32)

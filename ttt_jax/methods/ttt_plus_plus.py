"""TTT++: the contrastive task of training, and the moments of the source's features."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks, losses, resets, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import (
    AuxLoss,
    FromSource,
    Key,
    Params,
    PyTree,
    Reset,
    Selection,
    StatefulLoss,
    Stream,
)
from ttt_jax.losses import _source
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.online import online
from ttt_jax.source import Moments, value_of

Features = Callable[[Params, Any], jax.Array]


@_arguments.checked()
def ttt_plus_plus(
    classify: Callable[[Params, Any], jax.Array],
    features: Features,
    project: Features,
    *,
    augment: Callable[[Any, Key], Any],
    encoder_weight: float | jax.Array = 0.05,
    head_weight: float | jax.Array = 0.2,
    contrastive_weight: float | jax.Array = 0.5 / 0.07,
    temperature: float | jax.Array = 0.5,
    queue: int = 1280,
    count: int = 1536,
    optimizer: optax.GradientTransformation = optax.sgd(0.01, momentum=0.9),
    select: Selection = select.everything(),
    num_steps: int = 1,
    reset: Reset = resets.never(),
    predict: str = "after",
    batch: bool = True,
    serve: Serve | None = None,
) -> FromSource:
    """Contrastive loss and feature matching over a stream of batches (TTT++).

    Loss: ``contrastive_weight * NT-Xent + encoder_weight * d(features) + head_weight *
    d(projections)``, where ``d = |S - S'|_F^2 / (4 D^2) / c + mean((mu - mu')^2) / 2 / m``
    compares covariance and mean over the batch and the ``queue`` feature vectors before it with
    the source's. c and m are what the two distances are between two sets of ``count`` source
    instances.

    **Published:** batches of 256, the defaults; their NT-Xent is the usual one times the
    temperature over a base of 0.07, hence ``contrastive_weight``; ``count`` is queue and batch.
    The model is trained jointly with the contrastive task.

    **Fails** on streams ordered by label, as all that match moments do: those of one class are
    not the source's. The weights stand for features of the authors' network.

    **Cost** of an instance: ``4 num_steps`` forward and backward passes (two views, and the
    instance at both layers) and one forward pass. Once: two forward passes of the source.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ...]``.
      features: model function of the encoder, ``(params, inputs[N, ...]) -> [N, D]``.
      project: model function of the projection head, ``(params, inputs[N, ...]) -> [N, P]``.
      augment: ``augment(x, key) -> x``, one random view of one instance, as in training.
      encoder_weight: weight of the distance at the encoder. May be traced.
      head_weight: weight of the distance at the projection head. May be traced.
      contrastive_weight: weight of NT-Xent. May be traced.
      temperature: of NT-Xent. May be traced.
      queue: how many feature vectors are remembered, static, at least 2.
      count: n of the sets that c and m belong to, static, at least 2.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per batch, static.
      reset: when the stream is pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"after"`` or ``"before"`` the update.
      batch: True; the contrastive loss has no form for one instance.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify``.

    Returns:
      A :class:`~ttt_jax.FromSource`; ``build`` gives a :class:`~ttt_jax.Stream`.

    Raises:
      ValueError: ``queue`` or ``count`` below 2, or ``batch=False``; from ``build``: ``num_steps``
        or ``predict`` out of range.

    References:
      Liu et al., `TTT++ <https://openreview.net/forum?id=86NHK__yFDl>`_, 2021; weights and
      distances from the authors' code, github.com/vita-epfl/ttt-plus-plus. There the divisors
      are measured between sets of source images; here they are what they would be if features
      were normal. The authors pass up to 500 times over the test set and stop by test labels;
      here it is one pass, and the last iterate counts.
    """
    _checks.check_count("methods.ttt_plus_plus: queue", queue, 2)
    _checks.check_count("methods.ttt_plus_plus: count", count, 2)
    for name, weight in (
        ("encoder_weight", encoder_weight),
        ("head_weight", head_weight),
        ("contrastive_weight", contrastive_weight),
    ):
        _checks.check_number(f"methods.ttt_plus_plus: {name}", weight, 0.0)
    heads = {"encoder": features, "head": project}
    weights = {"encoder": encoder_weight, "head": head_weight}
    moments = {name: losses.feature_moments(apply) for name, apply in heads.items()}
    contrastive = losses.contrastive(project, augment, temperature=temperature, batch=batch)

    def measure(params: Params, inputs: Any) -> PyTree:
        return {name: moments_of(params, inputs) for name, moments_of in moments.items()}

    def build(statistics: PyTree) -> Stream:
        source = value_of(statistics)
        distances = [
            (weights[name], _matching(apply, source[name], queue=queue, count=count))
            for name, apply in heads.items()
        ]
        loss = losses.weighted((contrastive_weight, contrastive), *distances)
        return online(
            gradient_adapter(loss, optimizer, select=select),
            prediction(classify, serve, batch),
            num_steps=num_steps,
            reset=reset,
            predict=predict,
        )

    return FromSource(measure, "mean", build)


def _matching(
    features: Features, moments: PyTree, *, queue: int, count: int
) -> AuxLoss | StatefulLoss:
    """Distance of covariance and mean from the source's, in units of the source's own scatter.

    The authors measure the divisors between two sets of source images. :func:`_scatter` has one
    set against the whole source, and two sets are twice as far apart: ``count`` source images
    have a distance of 1/2 + 1/4.
    """
    moments = _source.moments_of("moment_matching", moments, "feature_moments")
    of_covariance, of_half_mean = _scatter(moments, count)
    return losses.moment_matching(
        features,
        moments,
        mean_weight=1 / (4 * of_half_mean),
        covariance_weight=1 / (2 * of_covariance),
        queue=queue,
        batch=True,
    )


def _scatter(moments: Moments, count: int) -> tuple[jax.Array, jax.Array]:
    """How far the moments of ``count`` source images lie from the source's, for normal features.

    The expected ``|S - S'|_F^2 / (4 D^2)``, which is ``(|S|_F^2 + tr(S)^2) / (n - 1) / (4 D^2)``,
    and the expected ``mean((mu - mu')^2) / 2``, which is ``tr(S) / (2 n D)``.
    """
    covariance = moments.centered
    width, trace = covariance.shape[0], jnp.trace(covariance)
    of_covariance = (jnp.square(covariance).sum() + trace**2) / (count - 1) / (4 * width**2)
    return of_covariance, trace / (2 * count * width)

"""TTT++: the contrastive task of training, and the moments of the source's features."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import ttt_jax as ttt
from experiments import auxiliary
from experiments.methods import steps, whole_batch
from experiments.methods.method import Measurement, Method, Settings, with_defaults
from experiments.problem import Problem

_MOMENTS_BATCH = 500


def ttt_plus(grid: Any, problem: Problem) -> Method:
    """Contrastive loss and moment matching over a stream of batches (Liu et al. 2021).

    ``contrastive_weight * NT-Xent + encoder_weight * d(features) + head_weight * d(projections)``
    with d as in :func:`matching`, over the batch and the ``queue`` feature vectors before it; set
    ``count`` to the sum of both. One pass over the stream, the last iterate counts; the authors
    pass up to 500 times and stop by test labels.

    Raises:
      ValueError: a model without a projection head.
    """
    norm = whole_batch.statistics_of(problem)
    if problem.model(norm).project is None:
        raise ValueError(
            "methods.ttt_plus needs a model with a projection head, but this one has none; set "
            "model.projection and train with train.aux='contrastive'."
        )

    def places(settings: Settings) -> dict[str, Callable[[Any, Any], jax.Array]]:
        model = problem.model(settings.get("prior", norm))
        return {"encoder": model.features, "head": model.project}

    def measurement(settings: Settings) -> Measurement:
        moments = {
            place: ttt.losses.feature_moments(apply) for place, apply in places(settings).items()
        }
        return Measurement(
            lambda params, images: {place: fn(params, images) for place, fn in moments.items()},
            _MOMENTS_BATCH,
        )

    def make(settings: Settings, moments: Any) -> ttt.Stream:
        model = problem.model(settings.get("prior", norm))
        terms = [
            (
                settings[f"{place}_weight"],
                matching(apply, moments[place], queue=settings["queue"], count=settings["count"]),
            )
            for place, apply in places(settings).items()
        ]
        alone = auxiliary.contrastive(model)
        loss = ttt.losses.weighted((settings["contrastive_weight"], alone), *terms)
        return whole_batch.online(steps.adapter(loss, settings), model.classify, settings)

    def cost(settings: Settings) -> tuple[int, int]:
        # Two views for the contrastive loss, and the image at both places.
        return 4 * settings["num_steps"] + 1, 4 * settings["num_steps"]

    # The weights and the rule of vita-epfl/ttt-plus-plus; its batches have 256 images.
    published = {"optimizer": "sgd", "momentum": 0.9, "num_steps": 1, "predict": "after"}
    published |= {"encoder_weight": 0.05, "head_weight": 0.2}
    # Its NT-Xent (SupConLoss) is the usual one times the temperature over a base of 0.07.
    published |= {"contrastive_weight": auxiliary.TEMPERATURE / 0.07}
    published |= {"queue": 1280, "count": 1536}
    return Method(
        "stream",
        make,
        with_defaults(grid, **published),
        cost,
        reset="per_domain",
        whole_batch=True,
        measurement=measurement,
    )


def matching(
    apply: Callable[[Any, Any], jax.Array], moments: Any, *, queue: int, count: int
) -> ttt.StatefulLoss:
    """Distance of covariance and mean from the source's, in units of the source's own scatter.

    ``|S - S'|_F^2 / (4 D^2)`` over what it is between two sets of source images, and half of
    ``mean((mu - mu')^2)`` over what that is between them (vita-epfl/ttt-plus-plus, offline.py and
    ttt++.py). The authors measure the divisors; here they come from :func:`scatter`, which has one
    set against the whole source: two sets are twice as far apart. So ``count`` source images have
    a distance of 1/2 + 1/4.

    Args:
      apply: ``(params, images[N, ...]) -> features [N, D]``.
      moments: of the source, as ``ttt_jax.losses.feature_moments`` measures them.
      queue: how many feature vectors are remembered beside the batch's, at least 2.
      count: how many images the sets of the divisors have, at least 2; the published choice is
        ``queue`` and a batch.

    Raises:
      ValueError: ``queue`` or ``count`` below 2.
    """
    if min(queue, count) < 2:
        raise ValueError(
            f"queue and count must be at least 2 feature vectors; got queue={queue}, count={count}."
        )
    of_covariance, of_half_mean = scatter(moments, count)
    return ttt.losses.moment_matching(
        apply,
        moments,
        mean_weight=1 / (4 * of_half_mean),
        covariance_weight=1 / (2 * of_covariance),
        queue=queue,
        batch=True,
    )


def scatter(moments: Any, count: int) -> tuple[jax.Array, jax.Array]:
    """How far the moments of some source images lie from the source's, were features normal.

    Args:
      moments: of the source, as ``ttt_jax.losses.feature_moments`` measures them.
      count: n, how many images, at least 2.

    Returns:
      The expected ``|S - S'|_F^2 / (4 D^2)``, which is ``(|S|_F^2 + tr(S)^2) / (n - 1) / (4 D^2)``,
      and the expected ``mean((mu - mu')^2) / 2``, which is ``tr(S) / (2 n D)``.
    """
    mean = moments["mean"]
    covariance = moments["outer"] - jnp.outer(mean, mean)
    width, trace = mean.shape[0], jnp.trace(covariance)
    of_covariance = (jnp.square(covariance).sum() + trace**2) / (count - 1) / (4 * width**2)
    return of_covariance, trace / (2 * count * width)

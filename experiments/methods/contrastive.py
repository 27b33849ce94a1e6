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

    ``NT-Xent + encoder_weight * d(features) + head_weight * d(projections)`` with d as in
    :func:`matching`, over the batch and the ``queue`` feature vectors before it. One pass over
    the stream, the last iterate counts; the authors pass up to 500 times and stop by test labels.

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
            (settings[f"{place}_weight"], matching(apply, moments[place], settings["queue"]))
            for place, apply in places(settings).items()
        ]
        loss = ttt.losses.weighted((1.0, auxiliary.contrastive(model)), *terms)
        return whole_batch.online(steps.adapter(loss, settings), model.classify, settings)

    def cost(settings: Settings) -> tuple[int, int]:
        # Two views for the contrastive loss, and the image at both places.
        return 4 * settings["num_steps"] + 1, 4 * settings["num_steps"]

    # The weights and the rule of vita-epfl/ttt-plus-plus; 1280 and batches of 256 make 1536.
    published = {"optimizer": "sgd", "momentum": 0.9, "num_steps": 1, "predict": "after"}
    published |= {"encoder_weight": 0.05, "head_weight": 0.2, "queue": 1280}
    return Method(
        "stream",
        make,
        with_defaults(grid, **published),
        cost,
        reset="per_domain",
        whole_batch=True,
        measurement=measurement,
    )


def matching(apply: Callable[[Any, Any], jax.Array], moments: Any, queue: int) -> ttt.StatefulLoss:
    """Distance of covariance and mean from the source's, in units of the source's own scatter.

    TTT++ divides ``|S - S'|_F^2 / (4 D^2)`` and ``mean((mu - mu')^2) / 2`` by what they are
    between source images and source images. Here the divisors are those of :func:`scatter` for as
    many images as the queue holds, so 1 + 1 is no shift at all.

    Args:
      apply: ``(params, images[N, ...]) -> features [N, D]``.
      moments: of the source, as ``ttt_jax.losses.feature_moments`` measures them.
      queue: how many feature vectors are remembered, at least 2.

    Raises:
      ValueError: a ``queue`` below 2.
    """
    if queue < 2:
        raise ValueError(f"queue must be at least 2 feature vectors; got {queue}.")
    covariance_unit, mean_unit = scatter(moments, queue)
    return ttt.losses.moment_matching(
        apply,
        moments,
        mean_weight=1 / mean_unit,
        covariance_weight=1 / covariance_unit,
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

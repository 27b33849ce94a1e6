"""Methods that adapt to an image together with what lies near it in the training images."""

from typing import Any

import jax

import ttt_jax as ttt
from experiments.methods import outputs, steps
from experiments.methods.method import Measurement, Method, Settings, with_defaults
from experiments.problem import Problem
from ttt_jax import models

_POOL_BATCH = 500


def rotation_neighbors(grid: Any, problem: Problem) -> Method:
    """Rotation prediction on the image and on its ``k`` nearest training images.

    Their labels are not used. Near is what has a similar direction of features under the pristine
    model, among ``pool_images`` training images (None: all); the rule of Hardt and Sun (2024), with
    the instance itself beside its neighbors.

    Raises:
      ValueError: a model without ``features``.
    """
    if not hasattr(problem.module, "features"):
        raise ValueError(
            "methods.rotation_neighbors needs a model with a method features; "
            f"{type(problem.module).__name__} has none: use model.name='resnet' or 'vit'."
        )
    raw = models.from_linen(problem.module, "features")

    def features(params: Any, images: jax.Array) -> jax.Array:
        return raw(params, problem.normalize(images))

    def measurement(settings: Settings) -> Measurement:
        def pool(params: Any, images: jax.Array) -> Any:
            return {"images": images, "features": features(params, images)}

        return Measurement(pool, _POOL_BATCH, settings["pool_images"], reduce="concatenate")

    def make(settings: Settings, pool: Any) -> ttt.Predictor:
        find = ttt.neighbors.finder(features, pool["images"], pool["features"], k=settings["k"])
        alone = steps.adapter(steps.rotation_loss(problem, settings, batch=True), settings)
        return ttt.episodic(
            ttt.neighbors.with_neighbors(alone, find),
            outputs.plain(problem, settings, "rotation"),
            num_steps=settings["num_steps"],
            trace=True,
        )

    def cost(settings: Settings) -> tuple[int, int]:
        passes = (1 + settings["k"]) * steps.work(settings)
        # And one forward pass each for the search and the prediction.
        return passes + 2, passes

    return Method(
        "per_sample",
        make,
        with_defaults(grid, pool_images=None),
        cost,
        "rotation",
        traced=True,
        reset="episodic",
        predict="after",
        measurement=measurement,
    )

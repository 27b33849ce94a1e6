"""Methods over whole batches that carry statistics of the source data to test time."""

from typing import Any

import jax

import ttt_jax as ttt
from experiments.methods import steps, whole_batch
from experiments.methods.method import Measurement, Method, Settings, with_defaults
from experiments.problem import Problem
from ttt_jax import models

# The authors measure the Fisher information in batches of 64, and their weight belongs to it.
_FISHER_BATCH = 64
_MOMENTS_BATCH = 500


def eata(grid: Any, problem: Problem) -> Method:
    """Entropy of reliable, non-redundant images under a Fisher penalty (Niu et al. 2022).

    ``margin`` is a share of ln C; the penalty is ``fisher_weight * sum(fisher * (fast -
    fast0)^2)``, with the Fisher information of ``fisher_images`` training images.
    """

    def classify(settings: Settings) -> Any:
        norm = whole_batch.statistics_of(problem)
        return problem.model(settings.get("prior", norm)).classify

    def measurement(settings: Settings) -> Measurement:
        fisher = ttt.losses.fisher_diagonal(
            classify(settings), select=steps.selection(settings), batch=True
        )
        return Measurement(fisher, _FISHER_BATCH, settings["fisher_images"])

    def make(settings: Settings, fisher: Any) -> ttt.Stream:
        apply = classify(settings)
        loss = ttt.losses.sample_adaptive_entropy(
            apply,
            num_classes=problem.module.num_classes,
            epsilon=settings["epsilon"],
            margin=settings["margin"],
            batch=True,
        )
        weight = 2 * settings["fisher_weight"]
        anchor = jax.tree.map(lambda leaf: weight * leaf, fisher)
        adapter = steps.adapter(loss, settings, anchor=anchor)
        return whole_batch.online(adapter, apply, settings)

    published = {"predict": "before", "margin": 0.4, "fisher_images": 2000}
    grid = with_defaults(grid, **whole_batch.DEFAULTS | published)
    return _method(grid, make, measurement)


def actmad(grid: Any, problem: Problem) -> Method:
    """Matches the activations of every normalization layer with the source's (Mirza et al. 2023).

    BatchNorm keeps its running statistics throughout; the batch adapts on one random view of each
    image and is predicted as it is. The source's moments are those of views too, as moments differ
    where views show what is beyond the image. The prediction counted is the last iterate's, never
    the best.
    """
    raw = models.linen_activations(problem.module)
    apply = problem.model("running").classify

    def collect(params: Any, images: jax.Array) -> Any:
        return raw(params, problem.normalize(images))

    def of_views(params: Any, images: jax.Array) -> Any:
        # An image's view is drawn by its place in the batch.
        keys = jax.random.split(jax.random.key(0), len(images))
        return collect(params, jax.vmap(problem.view)(images, keys))

    def measurement(settings: Settings) -> Measurement:
        return Measurement(ttt.losses.activation_moments(of_views), _MOMENTS_BATCH)

    def make(settings: Settings, moments: Any) -> ttt.Stream:
        loss = ttt.losses.activation_matching(
            collect, moments, augment=problem.view, num_views=1, batch=True
        )
        return whole_batch.online(steps.adapter(loss, settings), apply, settings)

    published = {"num_steps": 1, "predict": "after", "select": "all", "optimizer": "sgd"}
    published |= {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    return _method(with_defaults(grid, **published), make, measurement)


def _method(grid: Any, make: Any, measurement: Any) -> Method:
    return Method(
        "stream",
        make,
        grid,
        whole_batch.cost,
        reset="per_domain",
        whole_batch=True,
        measurement=measurement,
    )

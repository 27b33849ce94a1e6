"""Methods that take one image at a time and keep nothing of it."""

from collections.abc import Callable
from typing import Any

import jax

import ttt_jax as ttt
from experiments import auxiliary
from experiments.methods import outputs, steps, train_mode
from experiments.methods.method import Method, Settings, with_defaults
from experiments.problem import Problem


def source(grid: Any, problem: Problem) -> Method:
    """The pristine model."""
    return Method(
        "per_sample", lambda s: ttt.source(outputs.plain(problem, s)), grid, lambda s: (1, 0)
    )


def norm_prior(grid: Any, problem: Problem) -> Method:
    """Blends the statistics of the one image into those of the source; no gradient."""
    return source(grid, problem)


def norm_prior_views(grid: Any, problem: Problem) -> Method:
    """Every view in one batch with blended statistics: the composition without its gradient."""
    views = outputs.num_views(problem)

    def make(settings: Settings) -> ttt.Predictor:
        return ttt.source(outputs.every_view(problem, settings))

    return Method("per_sample", make, grid, lambda s: (views, 0))


def augmented(grid: Any, problem: Problem) -> Method:
    """Mean probability over random views."""

    def make(settings: Settings) -> ttt.Predictor:
        one = ttt.unbatched(outputs.model_of(problem, settings).classify)
        view, count = steps.view(problem, settings), settings["num_views"]
        predict = ttt.augmented(one, view, num_views=count)

        def labelled(params: Any, image: jax.Array, key: jax.Array) -> Any:
            logits, info = predict(params, image, key)
            return {"logits": logits}, info

        return labelled

    return Method("per_sample", make, grid, lambda s: (s["num_views"], 0))


Adapt = Callable[[Problem, Settings], ttt.Adapter]


def _gradient(loss: Callable[[Problem, Settings], ttt.AuxLoss]) -> Adapt:
    return lambda problem, settings: steps.adapter(loss(problem, settings), settings)


def _traced(grid: Any, problem: Problem, adapt: Adapt, probe: str) -> Method:
    """An episodic method that predicts the plain image after every step."""

    def make(settings: Settings) -> ttt.Predictor:
        apply = outputs.plain(problem, settings, probe)
        adapter = adapt(problem, settings)
        return ttt.episodic(adapter, apply, num_steps=settings["num_steps"], trace=True)

    def cost(settings: Settings) -> tuple[int, int]:
        return steps.work(settings) + 1, steps.work(settings)

    return Method(
        "per_sample", make, grid, cost, probe, traced=True, reset="episodic", predict="after"
    )


def rotation(grid: Any, problem: Problem) -> Method:
    """Test-time training on rotation prediction (Sun et al. 2020).

    With ``statistics_momentum`` the model adapts in training mode.
    """

    def adapt(problem: Problem, settings: Settings) -> ttt.Adapter:
        if "statistics_momentum" in settings:
            return train_mode.rotation_adapter(problem, settings)
        return _gradient(steps.rotation_loss)(problem, settings)

    return _traced(grid, problem, adapt, "rotation")


def memo(grid: Any, problem: Problem) -> Method:
    """Marginal entropy over views (Zhang et al. 2022). The probe's views are crops in any case."""
    return _traced(grid, problem, _gradient(steps.memo_loss), "memo")


def mae(grid: Any, problem: Problem) -> Method:
    """Test-time training on masked reconstruction (Gandelsman et al. 2022).

    Raises:
      ValueError: a model that cannot reconstruct.
    """
    auxiliary.require_reconstruction(problem.module, "methods.mae")
    grid = with_defaults(grid, mask_ratio=problem.mask_ratio, num_masks=1)
    return _traced(grid, problem, _gradient(steps.mae_loss), "mae")


def rotation_memo_augmented(grid: Any, problem: Problem) -> Method:
    """Adapts to rotation and marginal entropy together; predicts the mean over every view."""
    views = outputs.num_views(problem)

    def make(settings: Settings) -> ttt.Predictor:
        loss = steps.rotation_memo_loss(problem, settings)
        apply = outputs.every_view(problem, settings, "rotation")
        return ttt.episodic(steps.adapter(loss, settings), apply, num_steps=settings["num_steps"])

    def cost(settings: Settings) -> tuple[int, int]:
        return steps.work(settings) + views, steps.work(settings)

    return Method("per_sample", make, grid, cost, "rotation", reset="episodic", predict="after")

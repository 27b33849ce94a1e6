"""Methods that carry what they learn from one image of a stream to the next."""

from collections.abc import Callable
from typing import Any

import ttt_jax as ttt
from experiments.methods import outputs, steps
from experiments.methods.method import Method, Settings, with_defaults
from experiments.problem import Problem


def rotation_online(grid: Any, problem: Problem) -> Method:
    """Test-time training on rotation prediction, online (Sun et al. 2020)."""

    def predict(settings: Settings) -> outputs.Apply:
        return outputs.plain(problem, settings, "rotation")

    return _online(grid, problem, steps.rotation_loss, predict, lambda settings: 1)


def rotation_augmented_online(grid: Any, problem: Problem) -> Method:
    """Test-time training on rotation prediction, online; predicts the mean over views."""
    return _augmented_online(grid, problem, steps.rotation_loss)


def rotation_memo_augmented_online(grid: Any, problem: Problem) -> Method:
    """Rotation and marginal entropy together, online; predicts the mean over views."""
    return _augmented_online(grid, problem, steps.rotation_memo_loss)


Loss = Callable[[Problem, Settings], ttt.AuxLoss]


def _augmented_online(grid: Any, problem: Problem, loss: Loss) -> Method:
    def predict(settings: Settings) -> outputs.Apply:
        return outputs.every_view(problem, settings, "rotation")

    def views(settings: Settings) -> int:
        return outputs.num_views(problem, settings["view_stride"])

    return _online(with_defaults(grid, view_stride=1), problem, loss, predict, views)


def _online(
    grid: Any,
    problem: Problem,
    loss: Loss,
    predict: Callable[[Settings], outputs.Apply],
    views: Callable[[Settings], int],
) -> Method:
    def make(settings: Settings) -> ttt.Stream:
        return ttt.online(
            steps.adapter(loss(problem, settings), settings),
            predict(settings),
            num_steps=settings["num_steps"],
            reset=ttt.resets.never(),
            predict="after",
        )

    def cost(settings: Settings) -> tuple[int, int]:
        return steps.work(settings) + views(settings), steps.work(settings)

    return Method("stream", make, grid, cost, "rotation", reset="per_domain", predict="after")

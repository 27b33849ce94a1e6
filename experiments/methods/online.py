"""Methods that carry what they learn from one image of a stream to the next."""

from typing import Any

import ttt_jax as ttt
from experiments.methods import outputs, steps
from experiments.methods.method import Method, Settings
from experiments.problem import Problem


def rotation_online(grid: Any, problem: Problem) -> Method:
    """Test-time training on rotation prediction, online (Sun et al. 2020)."""

    def make(settings: Settings) -> ttt.Stream:
        return ttt.online(
            steps.adapter(steps.rotation_loss(problem, settings), settings),
            outputs.plain(problem, settings, "rotation"),
            num_steps=settings["num_steps"],
            reset=ttt.resets.never(),
            predict="after",
        )

    def cost(settings: Settings) -> tuple[int, int]:
        return steps.work(settings) + 1, steps.work(settings)

    return Method("stream", make, grid, cost, "rotation", reset="per_domain", predict="after")

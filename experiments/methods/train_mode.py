"""Adapting a model with BatchNorm in training mode: its running statistics follow the views.

Sun et al. 2020 adapt their networks with BatchNorm so (Table A1): every inner step normalises the
copies by their own statistics, as in training, and the running statistics, with which the plain
image is then predicted, take a share of them.
"""

from typing import Any

import jax

import ttt_jax as ttt
from experiments.methods import steps
from experiments.methods.method import Settings
from experiments.problem import Problem, has_batch_norm
from ttt_jax import models


def rotation_adapter(problem: Problem, settings: Settings) -> ttt.Adapter:
    """Steps on rotation prediction whose running statistics follow the rotated copies.

    ``statistics_momentum`` is the weight of the old statistics. They are the loss's memory, and
    the model is served with them. A step size of 0 moves nothing else.

    Raises:
      ValueError: a ``statistics_momentum`` outside [0, 1], or a model without BatchNorm.
    """
    momentum = settings["statistics_momentum"]
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"statistics_momentum is the weight of the old statistics, in [0, 1]; got {momentum!r}."
        )
    if not has_batch_norm(problem):
        raise ValueError(
            "statistics_momentum needs a model with BatchNorm; this one has no running "
            "statistics. Leave the option out."
        )
    forward = models.linen_statistics(problem.module, "rotation", outputs=True)
    # What it collects is what the pass of the loss has seen.
    follow = ttt.statistics_adapter(lambda params, seen: seen, momentum=momentum)

    def value(params: Any, memory: Any, image: jax.Array, key: jax.Array) -> Any:
        passes = []

        def rotation(params: Any, images: jax.Array) -> jax.Array:
            logits, seen = forward(params, problem.normalize(images))
            passes.append(seen)
            return logits

        descend = ttt.losses.rotation(rotation, copies=settings["copies"], augment=problem.view)
        loss = descend(params, image, key)
        (seen,) = passes
        memory, _ = follow.step(params, memory, seen, key)
        return loss, memory

    loss = ttt.StatefulLoss(follow.init, value, after=lambda adapted, memory: memory)
    adapter = steps.adapter(loss, settings)

    def merge(params: Any, state: ttt.AdapterState) -> Any:
        return follow.merge(adapter.merge(params, state), state.memory)

    return adapter._replace(merge=merge)

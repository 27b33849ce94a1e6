"""Methods whose instance is a whole batch: one copy of the model, and statistics of all images.

The model function goes in as it is, so a BatchNorm layer sees the batch. A ``prior`` blends its
statistics into those of the source; models without BatchNorm ignore both.
"""

from collections.abc import Callable
from typing import Any

import jax

import ttt_jax as ttt
from experiments import problem as problem_lib
from experiments.methods import steps
from experiments.methods.method import Method, Settings, with_defaults
from experiments.problem import Problem

# The published rule on CIFAR: Adam, one step, the affine parameters of normalization layers
# (github.com/DequanWang/tent). There the prediction comes before the update: ``predict``.
_DEFAULTS = {"optimizer": "adam", "num_steps": 1, "predict": "after", "select": "norm"}

Loss = Callable[[Any, Settings], ttt.AuxLoss]


def tent(grid: Any, problem: Problem) -> Method:
    """Entropy of the batch (Wang et al. 2021), pristine again at the next batch."""
    return _episodic(grid, problem, _entropy)


def pseudo_label(grid: Any, problem: Problem) -> Method:
    """Cross-entropy to the model's own labels (Lee 2013), pristine again at the next batch."""
    return _episodic(grid, problem, _own_labels)


def tent_online(grid: Any, problem: Problem) -> Method:
    """Entropy of the batch, kept from one batch of a stream to the next."""
    return Method(
        "stream",
        _maker(problem, _entropy),
        with_defaults(grid, **_DEFAULTS),
        _cost,
        reset="per_domain",
        whole_batch=True,
    )


def bn_adapt(grid: Any, problem: Problem) -> Method:
    """BatchNorm statistics of the batch (Schneider et al. 2020); no gradient.

    Raises:
      ValueError: a model without BatchNorm.
    """
    if not problem_lib.has_batch_norm(problem):
        raise ValueError(
            "methods.bn_adapt needs a model with BatchNorm, but this one has none; set "
            "model.norm='batch', or remove the method."
        )

    def make(settings: Settings) -> ttt.Predictor:
        classify = problem.model(settings.get("prior", "batch")).classify
        return ttt.source(lambda params, images: {"logits": classify(params, images)})

    return Method("batch", make, grid, lambda s: (1, 0), whole_batch=True)


def _entropy(classify: Any, settings: Settings) -> ttt.AuxLoss:
    return ttt.losses.entropy(classify, batch=True)


def _own_labels(classify: Any, settings: Settings) -> ttt.AuxLoss:
    threshold = settings.get("threshold", 0.0)
    return ttt.losses.pseudo_label(classify, threshold=threshold, batch=True)


def _maker(problem: Problem, loss: Loss) -> Callable[[Settings], ttt.Stream]:
    """``settings -> Stream`` over batches."""
    norm = "batch" if problem_lib.has_batch_norm(problem) else "running"

    def make(settings: Settings) -> ttt.Stream:
        classify = problem.model(settings.get("prior", norm)).classify
        return ttt.online(
            steps.adapter(loss(classify, settings), settings),
            lambda params, images: {"logits": classify(params, images)},
            num_steps=settings["num_steps"],
            reset=ttt.resets.never(),
            predict=settings["predict"],
        )

    return make


def _episodic(grid: Any, problem: Problem, loss: Loss) -> Method:
    """The first step of a stream, for every batch: unlike ``ttt.episodic`` it knows "before"."""
    stream_of = _maker(problem, loss)

    def make(settings: Settings) -> ttt.Predictor:
        stream = stream_of(settings)

        def predict(params: Any, images: jax.Array, key: jax.Array) -> Any:
            _, (output, info) = stream.step(params, stream.init(params), images, key)
            return output, ttt.Info(info.loss, info.grad_norm, info.ok, info.updated)

        return predict

    grid = with_defaults(grid, **_DEFAULTS)
    return Method("batch", make, grid, _cost, reset="episodic", whole_batch=True)


def _cost(settings: Settings) -> tuple[int, int]:
    return settings["num_steps"] + 1, settings["num_steps"]

"""Methods whose instance is a whole batch: one copy of the model, and statistics of all images.

The model function goes in as it is, so a BatchNorm layer sees the batch. A ``prior`` blends its
statistics into those of the source; models without BatchNorm ignore both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import ttt_jax as ttt
from experiments import problem as problem_lib
from experiments.methods import steps
from experiments.methods.method import Method, Settings, with_defaults
from experiments.problem import Problem

# The published rule on CIFAR: Adam, one step, the affine parameters of normalization layers
# (github.com/DequanWang/tent). There the prediction comes before the update: ``predict``.
DEFAULTS = {"optimizer": "adam", "num_steps": 1, "predict": "after", "select": "norm"}

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
        with_defaults(grid, **DEFAULTS),
        cost,
        reset="per_domain",
        whole_batch=True,
    )


def sar(grid: Any, problem: Problem) -> Method:
    """Sharpness-aware entropy of the reliable images, with recovery (Niu et al. 2023).

    ``margin`` is a share of ln C. The state is pristine again where the moving average of the loss
    falls below ``reset_below``. The released code keeps the average when it resets, and so resets
    again at the next batches; here it starts anew, as the paper has it.
    """
    norm = statistics_of(problem)

    def make(settings: Settings) -> ttt.Stream:
        classify = problem.model(settings.get("prior", norm)).classify

        def reliable(reference: Any = None) -> ttt.AuxLoss:
            return ttt.losses.reliable_entropy(
                classify, margin=settings["margin"], reference=reference, batch=True
            )

        adapter = ttt.sharpness_aware_adapter(
            reliable(),
            steps.optimizer(settings),
            select=steps.selection(settings),
            rho=settings["rho"],
            peak_loss=reliable,
        )

        def health(output: Any, info: ttt.Info) -> jax.Array:
            # Without a reliable image there is no loss: its 0 must not enter the average.
            return jnp.where(info.updated, info.loss[-1], jnp.nan)

        reset = ttt.resets.on_collapse(health, settings["reset_below"])
        return online(adapter, classify, settings, reset=reset)

    published = {"optimizer": "sgd", "momentum": 0.9, "predict": "before"}
    published |= {"margin": 0.4, "rho": 0.05, "reset_below": 0.2}
    return Method(
        "stream",
        make,
        with_defaults(grid, **DEFAULTS | published),
        lambda s: (2 * s["num_steps"] + 1, 2 * s["num_steps"]),
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


def online(
    adapter: ttt.Adapter, classify: Any, settings: Settings, *, reset: ttt.Reset | None = None
) -> ttt.Stream:
    """The stream of an adapter over batches; without a reset it keeps its state."""
    return ttt.online(
        adapter,
        lambda params, images: {"logits": classify(params, images)},
        num_steps=settings["num_steps"],
        reset=reset or ttt.resets.never(),
        predict=settings["predict"],
    )


def statistics_of(problem: Problem) -> str:
    """How BatchNorm is served where it takes its statistics from the batch, if there is any."""
    return "batch" if problem_lib.has_batch_norm(problem) else "running"


def _entropy(classify: Any, settings: Settings) -> ttt.AuxLoss:
    return ttt.losses.entropy(classify, batch=True)


def _own_labels(classify: Any, settings: Settings) -> ttt.AuxLoss:
    threshold = settings.get("threshold", 0.0)
    return ttt.losses.pseudo_label(classify, threshold=threshold, batch=True)


def _maker(problem: Problem, loss: Loss) -> Callable[[Settings], ttt.Stream]:
    """``settings -> Stream`` over batches."""
    norm = statistics_of(problem)

    def make(settings: Settings) -> ttt.Stream:
        classify = problem.model(settings.get("prior", norm)).classify
        return online(steps.adapter(loss(classify, settings), settings), classify, settings)

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

    grid = with_defaults(grid, **DEFAULTS)
    return Method("batch", make, grid, cost, reset="episodic", whole_batch=True)


def cost(settings: Settings) -> tuple[int, int]:
    """Passes per image: the inner steps, and the prediction."""
    return settings["num_steps"] + 1, settings["num_steps"]

"""The auxiliary task of training: what a model learns beside its main task, and adapts with."""

from typing import Any

import ml_collections

import ttt_jax as ttt
from experiments import launch
from experiments.problem import MODELS, Model, Problem

TASKS = ("rotation", "mae", "contrastive", "none")

# Of NT-Xent: that of SimCLR on CIFAR-10 (Chen et al. 2020, appendix B.9) and of TTT++.
TEMPERATURE = 0.5


def name_of(config: ml_collections.ConfigDict) -> str:
    """``train.aux`` of a config, checked against its model.

    Raises:
      ValueError: an unknown task, or one that the model has no head for.
    """
    name = launch.setting(config, "train.aux")
    if name not in TASKS:
        raise ValueError(f"train.aux must be one of {list(TASKS)}; got {name!r}.")
    # An unknown model has an error of its own, when the problem is built.
    if name == "mae" and config.model.name in MODELS:
        require_reconstruction(MODELS[config.model.name], "train.aux='mae'")
    if name == "contrastive" and not config.model.get("projection", 0):
        raise ValueError(
            "train.aux='contrastive' needs a projection head: set model.name='resnet' and "
            f"model.projection to its outputs, such as 128; got model.name={config.model.name!r} "
            "without one."
        )
    return name


def require_reconstruction(module: Any, asking: str) -> None:
    """Refuses a model (a module or its class) that cannot reconstruct.

    Raises:
      ValueError: it has no ``reconstruct`` method.
    """
    if not hasattr(module, "reconstruct"):
        able = sorted(name for name, known in MODELS.items() if hasattr(known, "reconstruct"))
        model = getattr(module, "__name__", type(module).__name__)
        raise ValueError(
            f"{asking} needs a model that reconstructs masked images, but {model} does not; use "
            f"model.name={' or '.join(map(repr, able))}, or another task."
        )


def training_loss(name: str, problem: Problem, model: Model) -> ttt.AuxLoss | None:
    """The loss of a task over a batch, or None for ``"none"``.

    ``rotation``: all four rotations of every image. ``mae``: one mask of ``train.mask_ratio``
    per image. ``contrastive``: two views of every image against those of all others.
    """
    if name == "none":
        return None
    if name == "mae":
        return reconstruction(problem, model, mask_ratio=problem.mask_ratio, batch=True)
    if name == "contrastive":
        return contrastive(model)
    return ttt.losses.rotation(model.rotation, batch=True)


def contrastive(model: Model) -> ttt.AuxLoss:
    """NT-Xent over a batch, in the views of SimCLR."""
    return ttt.losses.contrastive(
        model.project, ttt.views.image.simclr(), temperature=TEMPERATURE, batch=True
    )


def reconstruction(
    problem: Problem, model: Model, *, mask_ratio: float, num_masks: int = 1, batch: bool = False
) -> ttt.AuxLoss:
    """Masked reconstruction in the patches of the problem's model."""
    return ttt.losses.masked_reconstruction(
        model.reconstruct,
        patch=problem.module.patch,
        mask_ratio=mask_ratio,
        num_masks=num_masks,
        batch=batch,
    )

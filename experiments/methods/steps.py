"""What an inner step of a method is: its loss, its optimizer, what it adapts, its cost."""

from typing import Any

import jax
import optax

import ttt_jax as ttt
from experiments import auxiliary
from experiments.methods.method import Settings
from experiments.methods.outputs import model_of
from experiments.problem import Problem
from ttt_jax import views


def adapter(loss: Any, settings: Settings, *, anchor: Any = 0.0) -> ttt.Adapter:
    """Gradient steps on a loss with the optimizer and the selection of some settings."""
    return ttt.gradient_adapter(
        loss, optimizer(settings), select=selection(settings), anchor=anchor
    )


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """``sgd`` (the default), with ``momentum`` (and ``nesterov``) if there is one, or ``adam``.

    ``weight_decay`` adds to the gradient, as PyTorch's does.
    """
    name, momentum = settings.get("optimizer", "sgd"), settings.get("momentum")
    if name == "sgd":
        nesterov = settings.get("nesterov", False)
        base = optax.sgd(settings["learning_rate"], momentum=momentum, nesterov=nesterov)
    elif name == "adam" and momentum is None:
        base = optax.adam(settings["learning_rate"])
    else:
        raise ValueError(
            "optimizer must be 'sgd', with or without momentum, or 'adam' without; got "
            f"{name!r} with momentum={momentum!r}."
        )
    decay = settings.get("weight_decay")
    return base if decay is None else optax.chain(optax.add_decayed_weights(decay), base)


def selection(settings: Settings) -> ttt.Selection:
    """``all``, ``norm``, ``biases`` or a pattern for ``select.paths``."""
    named = {
        "all": ttt.select.everything,
        "norm": ttt.select.norm_affine,
        "biases": ttt.select.biases,
    }
    chosen = settings["select"]
    return named[chosen]() if chosen in named else ttt.select.paths(chosen)


def parameter_counts(settings: Settings, shapes: Any) -> dict[str, int]:
    """How many parameters some settings adapt, 0 where no gradient is taken, and of how many.

    Args:
      settings: of a method.
      shapes: the variables of the model, ``{"params": ...}``, or their shapes.
    """
    learned = {"params": shapes["params"]}
    if "select" not in settings:
        return {
            "adapted_parameters": 0,
            "total_parameters": sum(leaf.size for leaf in jax.tree.leaves(learned)),
        }
    chosen = ttt.select.describe(selection(settings), learned)
    return {"adapted_parameters": chosen.num_elements, "total_parameters": chosen.total_elements}


def rotation_loss(problem: Problem, settings: Settings, *, batch: bool = False) -> ttt.AuxLoss:
    """Rotation prediction over augmented copies of the image, or of every image of a batch."""
    copies = settings["copies"]
    rotation = model_of(problem, settings).rotation
    return ttt.losses.rotation(rotation, copies=copies, augment=problem.view, batch=batch)


def view(problem: Problem, settings: Settings) -> views.image.Augment:
    """The option ``views``: ``crops`` (the default), as in training, or ``augmix`` of such a crop.

    Raises:
      ValueError: another name.
    """
    named = {"crops": problem.view, "augmix": views.image.chain(problem.view, views.augmix.augmix)}
    chosen = settings.get("views", "crops")
    if chosen not in named:
        raise ValueError(f"views must be 'crops', the default, or 'augmix'; got {chosen!r}.")
    return named[chosen]


def memo_loss(problem: Problem, settings: Settings) -> ttt.AuxLoss:
    """Entropy of the mean prediction over random views."""
    views = settings["num_views"]
    classify = model_of(problem, settings).classify
    return ttt.losses.marginal_entropy(classify, view(problem, settings), num_views=views)


def rotation_memo_loss(problem: Problem, settings: Settings) -> ttt.AuxLoss:
    """Rotation prediction plus ``memo_weight`` times marginal entropy."""
    return ttt.losses.weighted(
        (1.0, rotation_loss(problem, settings)),
        (settings["memo_weight"], memo_loss(problem, settings)),
    )


def mae_loss(problem: Problem, settings: Settings) -> ttt.AuxLoss:
    """Reconstruction of the hidden patches under several masks."""
    return auxiliary.reconstruction(
        problem,
        model_of(problem, settings),
        mask_ratio=settings["mask_ratio"],
        num_masks=settings["num_masks"],
    )


def work(settings: Settings) -> int:
    """Forward (and backward) passes of all inner steps: views per step times steps."""
    copies = 4 if settings.get("copies", 0) is None else settings.get("copies", 0)
    views = copies + settings.get("num_views", 0) + settings.get("num_masks", 0)
    return settings["num_steps"] * views

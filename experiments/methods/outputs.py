"""What a method returns for one image: logits, and a probe of an auxiliary loss."""

from collections.abc import Callable
from typing import Any

import jax

import ttt_jax as ttt
from experiments import auxiliary
from experiments.methods.method import Settings
from experiments.problem import Model, Problem

# The views of the probes are fixed, so that the values before and after adapting differ by the
# adaptation alone.
_PROBE_KEY = 8
_PROBE_VIEWS = 8

Apply = Callable[[Any, jax.Array], dict[str, jax.Array]]


def probes(problem: Problem) -> dict[str, Callable[[Any, jax.Array], jax.Array]]:
    """Deterministic readings ``(params, image) -> scalar`` of the auxiliary losses.

    They use running statistics, so that they move with the weights alone.
    """
    key = jax.random.key(_PROBE_KEY)
    model = problem.model()
    losses = {
        "rotation": ttt.losses.rotation(model.rotation),
        "memo": ttt.losses.marginal_entropy(model.classify, problem.view, num_views=_PROBE_VIEWS),
    }
    if model.reconstruct is not None:
        losses["mae"] = auxiliary.reconstruction(
            problem, model, mask_ratio=problem.mask_ratio, num_masks=_PROBE_VIEWS
        )
    return {
        name: lambda params, image, loss=loss: loss(params, image, key)
        for name, loss in losses.items()
    }


def model_of(problem: Problem, settings: Settings) -> Model:
    """The model functions of a candidate: a ``prior`` blends source and test statistics."""
    return problem.model(settings.get("prior", "running"))


def plain(problem: Problem, settings: Settings, probe: str | None = None) -> Apply:
    """Predicts the image as it is."""
    one = ttt.unbatched(model_of(problem, settings).classify)
    if probe is None:
        return lambda params, image: {"logits": one(params, image)}
    read = probes(problem)[probe]
    return lambda params, image: {"logits": one(params, image), "aux": read(params, image)}


def every_view(problem: Problem, settings: Settings, probe: str | None = None) -> Apply:
    """Predicts the mean probability over every view, or over one in ``view_stride``; one batch."""
    classify = model_of(problem, settings).classify
    read = probes(problem)[probe] if probe else None
    stride = settings.get("view_stride", 1)

    def apply(params: Any, image: jax.Array) -> dict[str, jax.Array]:
        log_p = jax.nn.log_softmax(classify(params, problem.every_view(image)[::stride]), axis=-1)
        # The logarithm of the mean but for a constant, which changes no prediction.
        output = {"logits": jax.nn.logsumexp(log_p, axis=0)}
        return output | ({"aux": read(params, image)} if read else {})

    return apply


def num_views(problem: Problem, stride: int = 1) -> int:
    """How many views :func:`every_view` looks at."""
    image = jax.ShapeDtypeStruct(problem.image_shape, "float32")
    total: int = jax.eval_shape(problem.every_view, image).shape[0]
    return -(-total // stride)

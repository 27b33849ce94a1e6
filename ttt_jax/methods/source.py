"""The source model, which adapts nothing."""

from collections.abc import Callable
from typing import Any

import jax

from ttt_jax import _arguments, predictors
from ttt_jax.base import Params, Predictor
from ttt_jax.methods._batches import Serve, prediction


@_arguments.checked()
def source(
    classify: Callable[[Params, Any], jax.Array], *, batch: bool = False, serve: Serve | None = None
) -> Predictor:
    """A predictor that returns the prediction of the pristine model.

    It is the baseline of every comparison. A BatchNorm model is served by ``classify`` as the
    caller built it: with its running statistics (``from_linen(net)``), with those of a batch, or
    with a blend of both.

    **Published:** nothing to set. CIFAR-10-C at level 5, ResNet-26 with GroupNorm trained on both
    tasks: 33.28 % error (Sun et al., 2020), which is where test-time training begins.

    **Fails** where the test data differ from the training data.

    **Cost** of an instance: one forward pass.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> outputs[N, ...]``.
      batch: whether the instance is a batch ``[N, ...]``.
      serve: ``(params, x) -> output`` instead of ``classify`` at N = 1 (of ``classify`` itself with
        ``batch=True``), for example :func:`~ttt_jax.methods.mean_over_views`.

    Returns:
      A :class:`~ttt_jax.Predictor` with S = 0.
    """
    return predictors.source(prediction(classify, serve, batch))

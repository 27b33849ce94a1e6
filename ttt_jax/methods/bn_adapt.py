"""BatchNorm adaptation: the statistics of the test data, without a gradient."""

from collections.abc import Callable
from typing import Any

import jax

from ttt_jax import _arguments, predictors
from ttt_jax.base import Params, Predictor
from ttt_jax.methods._batches import Serve, prediction


@_arguments.checked()
def bn_adapt(
    classify: Callable[[Params, Any], jax.Array], *, batch: bool = True, serve: Serve | None = None
) -> Predictor:
    """A predictor that returns what the model predicts with BatchNorm statistics of the test data.

    Every BatchNorm normalizes by ``N / (N + n)`` source and ``n / (N + n)`` test statistics, n
    instances of the batch. The statistics are in ``classify``: ``models.from_linen(net,
    norm="batch")`` takes those of the batch alone (N = 0), and ``from_linen(net, norm=N)`` blends.
    No parameter moves.

    **Published:** the batch alone where it is large, a prior where it is small (MEMO has N = 16
    for one image). ImageNet-C, ResNet-50, mean corruption error: source 76.7, one image with a
    prior 65.0, large batches 62.2 (bethgelab/robustness).

    **Fails** on small batches without a prior, whose statistics are noise; on streams ordered by
    label, where the batch has the statistics of few classes (NOTE's repository: correlated
    CIFAR-10-C 73.4 % error, source 42.3 %); and it does nothing to a model without BatchNorm. One
    image alone needs ``batch=False`` and a prior.

    **Cost** of an instance: one forward pass of its batch.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> outputs[N, ...]`` that serves its
        BatchNorm with test statistics.
      batch: whether the instance is a batch ``[N, ...]``; with False one instance, at n = 1.
      serve: ``(params, x) -> output`` instead of ``classify``; :func:`mean_over_views` takes the
        statistics of all views of one instance.

    Returns:
      A :class:`~ttt_jax.Predictor` with S = 0.

    Raises:
      ValueError: when called: from the bridge, batch statistics of a single instance.

    References:
      Schneider et al., `Improving robustness against common corruptions by covariate shift
      adaptation <https://arxiv.org/abs/2006.16971>`_, 2020; Nado et al., `Evaluating
      Prediction-Time Batch Normalization <https://arxiv.org/abs/2006.10963>`_, 2020. The blend is
      made at every layer during the forward pass, as in the authors' code.
    """
    return predictors.source(prediction(classify, serve, batch))

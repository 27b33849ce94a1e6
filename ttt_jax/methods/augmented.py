"""Test-time augmentation: the mean prediction over views, random or fixed."""

from collections.abc import Callable
from typing import Any

import jax

from ttt_jax import _arguments, predictors
from ttt_jax.base import Key, Params, Predictor
from ttt_jax.batching import unbatched
from ttt_jax.methods._batches import Serve, checked


@_arguments.checked()
def augmented(
    classify: Callable[[Params, Any], jax.Array],
    *,
    augment: Callable[[Any, Key], Any],
    num_views: int = 32,
    include_identity: bool = True,
    mean: str = "probability",
) -> Predictor:
    """A predictor that returns the mean prediction over random views (test-time augmentation).

    ``log mean_j p(view_j(x))``: no gradient. It is the baseline of MEMO: what is gained beyond it
    is owed to adapting.

    **Published**, as the baseline in Zhang et al., 2022: the views of MEMO, 32 on CIFAR-10, 64 on
    ImageNet, and the mean of their probabilities.

    **Fails** where views move an image further from the training data: ImageNet-C at level 5 with
    ResNet-50 has 82.30 % error with 64 views and 82.01 % without (table of the EATA repository).

    **Cost** of an instance: ``num_views`` forward passes.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``; every view is
        predicted at N = 1.
      augment: ``augment(x, key) -> x``, one random view of one instance; see
        :mod:`ttt_jax.views`.
      num_views: V, static.
      include_identity: whether the first of the V views is the instance itself.
      mean: ``"probability"``, or ``"logit"`` for the mean of the logits.

    Returns:
      A :class:`~ttt_jax.Predictor` with output ``[..., C]``, a vector of logits, and S = 0.

    Raises:
      ValueError: ``num_views`` < 1, or an unknown ``mean``.

    References:
      Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, 2012;
      Zhang et al., `MEMO <https://arxiv.org/abs/2110.09506>`_, 2022.
    """
    return predictors.augmented(
        unbatched(classify),
        augment,
        num_views=num_views,
        include_identity=include_identity,
        mean=mean,
    )


@_arguments.checked()
def every_view(
    classify: Callable[[Params, Any], jax.Array], *, views: Callable[[Any], Any]
) -> Predictor:
    """A predictor that returns the mean prediction over a fixed set of views, in one batch.

    All views of the instance go through ``classify`` together, so a BatchNorm that is served with
    ``norm="batch"`` or a prior takes its statistics from them. See :func:`augmented`.

    **Published:** ten crops and flips in Krizhevsky et al., 2012. Set the views that training
    drew: ``views.image.every_view(padding, flipped=True)``.

    **Fails** as :func:`augmented` does.

    **Cost** of an instance: V forward passes.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``.
      views: ``views(x) -> [V, ...]``, the views of one instance.

    Returns:
      A :class:`~ttt_jax.Predictor` with the output of :func:`mean_over_views` and S = 0.
    """
    return predictors.source(mean_over_views(classify, views))


@_arguments.checked()
def mean_over_views(
    classify: Callable[[Params, Any], jax.Array], views: Callable[[Any], Any]
) -> Serve:
    """Returns the function ``(params, x) -> logits`` that averages probabilities over views.

    It is a ``serve`` for the methods of this package, which then adapt to the instance and predict
    the mean over its views.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``, called once with
        the V views of an instance.
      views: ``views(x) -> [V, ...]``.

    Returns:
      ``serve(params, x) -> [..., C]``: ``log sum_j p(view_j(x))``. A softmax of it is the mean
      probability; the constant ``log V`` is left in, as it changes no prediction.
    """
    classify = checked("mean_over_views", classify)

    def serve(params: Params, x: Any) -> jax.Array:
        log_p = jax.nn.log_softmax(classify(params, views(x)), axis=-1)
        return jax.nn.logsumexp(log_p, axis=0)

    return serve

"""Tent: the entropy of the predictions, on the affine parameters of normalization layers."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ttt_jax import _arguments, losses, resets, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Params, Reset, Selection, Stream
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.online import online


@_arguments.checked()
def tent(
    classify: Callable[[Params, Any], jax.Array],
    *,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    select: Selection = select.norm_affine(),
    num_steps: int = 1,
    reset: Reset = resets.never(),
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream over batches that minimizes the mean entropy of its predictions (Tent).

    Loss: ``mean_n H(p_n)``. Scale and bias of the normalization layers adapt, and BatchNorm takes
    its statistics from the batch: build ``classify`` with ``models.from_linen(net, norm="batch")``.

    **Published:** CIFAR-10-C in batches of 200, Adam with step size 0.001, one step a batch,
    pristine at each corruption. Level 5, WRN-28-10: source 43.5 % error, batch statistics 20.4 %,
    Tent 18.6 % (README of DequanWang/tent).

    **Fails** by collapse: entropy is lowest where everything is one class. Long streams, and
    streams ordered by label, end there: 87.6 % error with ResNet-26 and GroupNorm on correlated
    CIFAR-10-C, source 32.7 % (benchmark of mariodoebler/test-time-adaptation). Watch
    ``diagnostics.predicted_classes``, and choose a reset. Small batches have noisy statistics.

    **Cost** of an instance: ``num_steps`` forward and backward passes and one forward pass.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per batch, static.
      reset: when the stream is pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"before"`` the update, as the authors' code does, or ``"after"``.
      batch: whether the instance is a batch ``[N, ...]``; with False, one instance.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify``.

    Returns:
      A :class:`~ttt_jax.Stream`; :func:`~ttt_jax.episode` makes it forget after every batch.

    Raises:
      ValueError: ``num_steps`` or ``predict`` out of range; when called: what
        :func:`~ttt_jax.losses.entropy` refuses.

    References:
      Wang et al., `Tent <https://arxiv.org/abs/2006.10726>`_, 2021, Section 3.1. The computation
      is that of the authors' code, github.com/DequanWang/tent.
    """
    adapter = gradient_adapter(losses.entropy(classify, batch=batch), optimizer, select=select)
    return online(
        adapter,
        prediction(classify, serve, batch),
        num_steps=num_steps,
        reset=reset,
        predict=predict,
    )

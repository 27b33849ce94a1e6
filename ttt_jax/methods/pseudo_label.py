"""Pseudo-labels: cross-entropy to the model's own most likely class."""

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
def pseudo_label(
    classify: Callable[[Params, Any], jax.Array],
    *,
    threshold: float | jax.Array = 0.0,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    select: Selection = select.norm_affine(),
    num_steps: int = 1,
    reset: Reset = resets.never(),
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream over batches that trusts its own most likely classes (pseudo-labels).

    Loss: ``sum_n w_n CE(p_n, argmax p_n) / max(sum_n w_n, 1)`` with ``w_n = [max p_n >=
    threshold]``. A batch without a confident instance makes no step.

    **Published:** Lee trains with pseudo-labels of unlabeled training images; the rule at test
    time is the baseline of the Tent paper, with Tent's settings and no threshold.

    **Fails** as Tent does, and sooner: a wrong label counts in full, so that errors are learned.
    With a threshold above the confidence of the source model nothing is ever learned.

    **Cost** of an instance: ``num_steps`` forward and backward passes and one forward pass.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``, its BatchNorm
        served with the statistics of the batch.
      threshold: least confidence, in [0, 1]. May be traced.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per batch, static.
      reset: when the stream is pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"before"`` or ``"after"`` the update.
      batch: whether the instance is a batch ``[N, ...]``; with False, one instance.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify``.

    Returns:
      A :class:`~ttt_jax.Stream`; :func:`~ttt_jax.episode` makes it forget after every batch.

    Raises:
      ValueError: ``num_steps`` or ``predict`` out of range; when called: what
        :func:`~ttt_jax.losses.pseudo_label` refuses.

    References:
      Lee, Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method, 2013; as a
      baseline at test time in Wang et al., `Tent <https://arxiv.org/abs/2006.10726>`_, 2021.
    """
    loss = losses.pseudo_label(classify, threshold=threshold, batch=batch)
    return online(
        gradient_adapter(loss, optimizer, select=select),
        prediction(classify, serve, batch),
        num_steps=num_steps,
        reset=reset,
        predict=predict,
    )

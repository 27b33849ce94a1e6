"""RDumb: EATA without its penalty, pristine again every thousand batches."""

import math
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
def rdumb(
    classify: Callable[[Params, Any], jax.Array],
    *,
    num_classes: int,
    epsilon: float | jax.Array = 0.05,
    margin: float | jax.Array = 0.5 - 1 / math.log(1000),
    optimizer: optax.GradientTransformation = optax.sgd(2.5e-4, momentum=0.9),
    select: Selection = select.norm_affine(),
    num_steps: int = 1,
    reset: Reset = resets.every(1000),
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream over batches with the filtered entropy of EATA and regular resets (RDumb).

    Loss: the mean of ``exp(E0 - H) H`` over the instances with ``H < E0 = margin * ln C`` and
    ``cos(p, m) < epsilon``, m the moving average of the predictions taken so far (this is ETA:
    :func:`eata` without its penalty). Every 1000 batches weights, optimizer and m are pristine.

    **Published:** ImageNet-C, CCC and other long streams in batches of 64: the defaults. E0 is
    ``ln(1000) / 2 - 1`` nats, 0.355 of ``ln C``. The interval was chosen on held-out corruptions.

    **Fails** as EATA does where epsilon does not fit the number of classes, and loses what it has
    learned at every reset: on a stream that never changes, resets only cost.

    **Cost** of an instance: ``num_steps`` forward and backward passes and one forward pass.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, C]``, its BatchNorm served
        with the statistics of the batch.
      num_classes: C.
      epsilon: the largest cosine to the average prediction. May be traced.
      margin: E0 as a share of ``ln C``. May be traced.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per batch, static.
      reset: when the stream is pristine again.
      predict: ``"before"`` or ``"after"`` the update.
      batch: whether the instance is a batch ``[N, ...]``; with False, one instance.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify``.

    Returns:
      A :class:`~ttt_jax.Stream`.

    Raises:
      ValueError: ``num_classes`` < 2, ``num_steps`` or ``predict`` out of range.

    References:
      Press et al., `RDumb <https://arxiv.org/abs/2306.05401>`_, 2023, Section 5; constants from
      the authors' code, github.com/oripress/CCC, whose ETA takes the absolute cosine: the same,
      as probabilities are not negative.
    """
    loss = losses.sample_adaptive_entropy(
        classify, num_classes=num_classes, epsilon=epsilon, margin=margin, batch=batch
    )
    return online(
        gradient_adapter(loss, optimizer, select=select),
        prediction(classify, serve, batch),
        num_steps=num_steps,
        reset=reset,
        predict=predict,
    )

"""Test-time training on rotation prediction, the method that named the field."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ttt_jax import _arguments, losses, resets, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Key, Params, Predictor, Reset, Selection, Stream
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.online import online
from ttt_jax.predictors import episodic


@_arguments.checked()
def ttt_rotation(
    classify: Callable[[Params, Any], jax.Array],
    rotation: Callable[[Params, Any], jax.Array],
    *,
    augment: Callable[[Any, Key], Any] | None = None,
    copies: int | None = 32,
    optimizer: optax.GradientTransformation = optax.sgd(1e-3),
    select: Selection = select.everything(),
    num_steps: int = 10,
    trace: bool = False,
    serve: Serve | None = None,
) -> Predictor:
    """A predictor that adapts to one image by predicting how its copies were rotated (TTT).

    Loss: ``mean_j CE(rotation(R_r view_j(x)), r)``, each copy turned by a right angle drawn
    uniformly. The model was trained on this task and the main one together.

    **Published:** CIFAR-10, ResNet-26 with GroupNorm: the encoder and the rotation branch adapt
    (``select.paths``), 32 copies per step in the views of training
    (``augment=views.image.crop_flip(4)``), SGD without momentum. *Standard*: the defaults. *Jump*:
    one step of 0.01. *Online*: :func:`ttt_rotation_online`. CIFAR-10-C at level 5, mean error:
    joint training 33.28 %, standard 30.95 %, online 20.40 %.

    **Fails** where rotation says nothing of the class: images without an upright direction, or a
    model that was not trained on the task. ``diagnostics.gradient_alignment`` measures beforehand
    whether the gradients of both losses agree. For BatchNorm see
    :func:`~ttt_jax.methods.ttt_rotation_statistics`.

    **Cost** of an instance: ``copies`` forward and backward passes a step, and one forward pass.

    Args:
      classify: model function ``(params, images[N, H, W, C]) -> logits[N, ..., classes]``.
      rotation: model function of the rotation head, ``(params, images[N, H, W, C]) -> [N, 4]``.
      augment: ``augment(image, key) -> image``, one random view; ``None`` for none.
      copies: rotated copies per step, static; ``None`` for the four rotations of one view.
      optimizer: an optax transformation.
      select: the parameters that adapt; those that ``rotation`` does not read never move.
      num_steps: inner steps per image, static; 0 is the source prediction.
      trace: whether the output has a leading axis ``[num_steps + 1]``, entry 0 the source's.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify`` at N = 1.

    Returns:
      A :class:`~ttt_jax.Predictor` over one square image ``[H, W, C]``.

    Raises:
      ValueError: ``copies`` or ``num_steps`` out of range; when called: what
        :func:`~ttt_jax.losses.rotation` refuses.

    References:
      Sun et al., `Test-Time Training with Self-Supervision
      <https://arxiv.org/abs/1909.13231>`_, 2020. The authors' code,
      github.com/yueatsprograms/ttt_cifar_release, can skip images on which the rotation head is
      confident, and by default does not; :func:`~ttt_jax.filtered` does that.
    """
    loss = losses.rotation(rotation, copies=copies, augment=augment)
    adapter = gradient_adapter(loss, optimizer, select=select)
    return episodic(adapter, prediction(classify, serve, False), num_steps=num_steps, trace=trace)


@_arguments.checked()
def ttt_rotation_online(
    classify: Callable[[Params, Any], jax.Array],
    rotation: Callable[[Params, Any], jax.Array],
    *,
    augment: Callable[[Any, Key], Any] | None = None,
    copies: int | None = 32,
    optimizer: optax.GradientTransformation = optax.sgd(1e-3),
    select: Selection = select.everything(),
    num_steps: int = 1,
    reset: Reset = resets.never(),
    predict: str = "after",
    serve: Serve | None = None,
) -> Stream:
    """A stream that keeps what rotation prediction taught it from image to image (TTT, online).

    The loss, the views and the selection of :func:`ttt_rotation`; the parameters go on.

    **Published:** the defaults: one step per image, never reset within one corruption. The paper
    reports that it does not work with BatchNorm.

    **Fails** as :func:`ttt_rotation` does, and where the stream changes its kind: what was learned
    on one corruption is there at the next. Choose a reset, or start a stream per domain.

    **Cost** of an instance: ``copies`` forward and backward passes a step, and one forward pass.

    Args:
      classify: as for :func:`ttt_rotation`, and so are all that follow but these two.
      rotation: model function of the rotation head.
      augment: one random view.
      copies: rotated copies per step.
      optimizer: an optax transformation; its state goes on too.
      select: the parameters that adapt.
      num_steps: inner steps per image.
      reset: when the stream is pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"after"`` the update, or ``"before"``.
      serve: ``(params, x) -> output``, for example :func:`~ttt_jax.methods.mean_over_views`.

    Returns:
      A :class:`~ttt_jax.Stream` over images ``[H, W, C]``.

    Raises:
      ValueError: ``copies``, ``num_steps`` or ``predict`` out of range.

    References:
      Sun et al., `Test-Time Training with Self-Supervision
      <https://arxiv.org/abs/1909.13231>`_, 2020, online version.
    """
    loss = losses.rotation(rotation, copies=copies, augment=augment)
    return online(
        gradient_adapter(loss, optimizer, select=select),
        prediction(classify, serve, False),
        num_steps=num_steps,
        reset=reset,
        predict=predict,
    )

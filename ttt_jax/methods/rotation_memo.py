"""Rotation prediction and marginal entropy together: a composition of TTT and MEMO."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ttt_jax import _arguments, _checks, losses, resets, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import AuxLoss, Key, Params, Predictor, Reset, Selection, StatefulLoss, Stream
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.online import online
from ttt_jax.predictors import episodic


@_arguments.checked()
def rotation_memo(
    classify: Callable[[Params, Any], jax.Array],
    rotation: Callable[[Params, Any], jax.Array],
    *,
    augment: Callable[[Any, Key], Any],
    copies: int | None = 32,
    num_views: int = 32,
    memo_weight: float | jax.Array = 1.0,
    optimizer: optax.GradientTransformation = optax.sgd(1e-3),
    select: Selection = select.everything(),
    num_steps: int = 1,
    trace: bool = False,
    serve: Serve | None = None,
) -> Predictor:
    """A predictor that adapts to one image by both losses of TTT and MEMO.

    Loss: ``mean_j CE(rotation(R_r view_j(x)), r) + memo_weight * H(mean_k p(view_k(x)))``, of
    :func:`~ttt_jax.methods.ttt_rotation` and :func:`~ttt_jax.methods.memo`.

    **Published** apart, not together: copies, views and step size are those of the two papers, the
    weight is for validation shifts to choose. With ``serve=mean_over_views(classify, views)`` it
    predicts the mean over views as well.

    **Fails** where either loss does; the entropy gains weight as the rotation loss falls, and a
    stream that was chosen on short ones can collapse on a longer one.

    **Cost** of an instance: ``copies + num_views`` forward and backward passes a step, and one
    forward pass.

    Args:
      classify: model function ``(params, images[N, H, W, C]) -> logits[N, ..., classes]``.
      rotation: model function of the rotation head, ``(params, images[N, H, W, C]) -> [N, 4]``.
      augment: ``augment(image, key) -> image``, one random view, for both losses.
      copies: rotated copies per step, static; ``None`` for the four rotations of one view.
      num_views: views of the entropy per step, static.
      memo_weight: weight of the entropy. May be traced.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per image, static; 0 is the source prediction.
      trace: whether the output has a leading axis ``[num_steps + 1]``, entry 0 the source's.
      serve: ``(params, x) -> output``; ``None`` for ``classify`` at N = 1.

    Returns:
      A :class:`~ttt_jax.Predictor` over one square image ``[H, W, C]``.

    Raises:
      ValueError: ``copies``, ``num_views`` or ``num_steps`` out of range.

    References:
      Sun et al., `Test-Time Training with Self-Supervision
      <https://arxiv.org/abs/1909.13231>`_, 2020; Zhang et al., `MEMO
      <https://arxiv.org/abs/2110.09506>`_, 2022.
    """
    loss = _loss(classify, rotation, augment, copies, num_views, memo_weight)
    adapter = gradient_adapter(loss, optimizer, select=select)
    return episodic(adapter, prediction(classify, serve, False), num_steps=num_steps, trace=trace)


@_arguments.checked()
def rotation_memo_online(
    classify: Callable[[Params, Any], jax.Array],
    rotation: Callable[[Params, Any], jax.Array],
    *,
    augment: Callable[[Any, Key], Any],
    copies: int | None = 32,
    num_views: int = 32,
    memo_weight: float | jax.Array = 1.0,
    optimizer: optax.GradientTransformation = optax.sgd(1e-3),
    select: Selection = select.everything(),
    num_steps: int = 1,
    reset: Reset = resets.never(),
    predict: str = "after",
    serve: Serve | None = None,
) -> Stream:
    """A stream that goes on from image to image with both losses of :func:`rotation_memo`.

    Args:
      classify: as for :func:`rotation_memo`, and so are all but ``reset`` and ``predict``.
      rotation: model function of the rotation head.
      augment: one random view, for both losses.
      copies: rotated copies per step.
      num_views: views of the entropy per step.
      memo_weight: weight of the entropy. May be traced.
      optimizer: an optax transformation; its state goes on too.
      select: the parameters that adapt.
      num_steps: inner steps per image.
      reset: when the stream is pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"after"`` the update, or ``"before"``.
      serve: ``(params, x) -> output``; ``None`` for ``classify`` at N = 1.

    Returns:
      A :class:`~ttt_jax.Stream` over images ``[H, W, C]``.

    Raises:
      ValueError: ``copies``, ``num_views``, ``num_steps`` or ``predict`` out of range.
    """
    loss = _loss(classify, rotation, augment, copies, num_views, memo_weight)
    return online(
        gradient_adapter(loss, optimizer, select=select),
        prediction(classify, serve, False),
        num_steps=num_steps,
        reset=reset,
        predict=predict,
    )


def _loss(
    classify: Callable[[Params, Any], jax.Array],
    rotation: Callable[[Params, Any], jax.Array],
    augment: Callable[[Any, Key], Any],
    copies: int | None,
    num_views: int,
    memo_weight: float | jax.Array,
) -> AuxLoss | StatefulLoss:
    _checks.check_number("memo_weight", memo_weight)
    return losses.weighted(
        (1.0, losses.rotation(rotation, copies=copies, augment=augment)),
        (memo_weight, losses.marginal_entropy(classify, augment, num_views=num_views)),
    )

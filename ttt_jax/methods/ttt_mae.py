"""Test-time training with masked autoencoders."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ttt_jax import _arguments, losses
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Params, Predictor, Selection
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.predictors import episodic


@_arguments.checked(mask_ratio=_arguments.number())
def ttt_mae(
    classify: Callable[[Params, Any], jax.Array],
    reconstruct: Callable[[Params, Any, jax.Array], jax.Array],
    *,
    patch: int,
    mask_ratio: float = 0.75,
    num_masks: int = 128,
    optimizer: optax.GradientTransformation = optax.sgd(5e-3, momentum=0.9),
    select: Selection,
    num_steps: int = 20,
    trace: bool = False,
    serve: Serve | None = None,
) -> Predictor:
    """A predictor that adapts to one image by reconstructing its hidden patches (TTT-MAE).

    Loss: the mean over masks and hidden patches of ``|D(E(visible)) - normalized patch|^2``.

    **Published:** ViT-L/16 on ImageNet: the defaults, on the encoder alone
    (``select=select.paths(r"params/encoder/.*")``), the decoder frozen, the classifier trained on
    the frozen encoder. ImageNet-C at level 5, mean accuracy: 32.06 % without adapting, 43.25 %
    with it (as read in the plots of killian31/ttt_mae_online, an independent reproduction).

    **Fails** with Adam, by the paper: accuracy peaks and then falls with more steps, where SGD
    keeps improving. Brightness gained least there (68.3 % to 69.1 %), then contrast (6.4 % to
    9.8 %). Targets are normalized per patch, so an image of flat patches, where there is nothing
    but noise to reconstruct, is a bad teacher.

    **Cost** of an instance: ``num_masks`` forward and backward passes a step, of the encoder over
    the visible patches only, and one forward pass.

    Args:
      classify: model function ``(params, images[N, H, W, C]) -> logits[N, ..., classes]``.
      reconstruct: model function ``(params, images[N, H, W, C], keep[N, K]) -> patches[N, P,
        patch * patch * C]``, ``keep`` the sorted indices of the visible patches.
      patch: side of a patch in pixels, static.
      mask_ratio: share of the patches that are hidden, static.
      num_masks: masks per step, static.
      optimizer: an optax transformation; its momentum begins anew with every image.
      select: the parameters that adapt.
      num_steps: inner steps per image, static; 0 is the source prediction.
      trace: whether the output has a leading axis ``[num_steps + 1]``, entry 0 the source's.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify`` at N = 1.

    Returns:
      A :class:`~ttt_jax.Predictor` over one image ``[H, W, C]``.

    Raises:
      ValueError: ``patch``, ``mask_ratio``, ``num_masks`` or ``num_steps`` out of range; when
        called: what :func:`~ttt_jax.losses.masked_reconstruction` refuses.

    References:
      Gandelsman et al., `Test-Time Training with Masked Autoencoders
      <https://arxiv.org/abs/2209.07522>`_, 2022. The authors' code,
      github.com/yossigandelsman/test_time_training_mae, also adapts the mask token, which
      ``ttt_jax.models.ViT`` counts to the decoder.
    """
    loss = losses.masked_reconstruction(
        reconstruct, patch=patch, mask_ratio=mask_ratio, num_masks=num_masks
    )
    adapter = gradient_adapter(loss, optimizer, select=select)
    return episodic(adapter, prediction(classify, serve, False), num_steps=num_steps, trace=trace)

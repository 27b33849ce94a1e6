"""MEMO: marginal entropy over views of one instance."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ttt_jax import _arguments, losses, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Key, Params, Predictor, Selection
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.predictors import episodic


@_arguments.checked()
def memo(
    classify: Callable[[Params, Any], jax.Array],
    *,
    augment: Callable[[Any, Key], Any],
    num_views: int = 32,
    optimizer: optax.GradientTransformation = optax.sgd(5e-3),
    select: Selection = select.everything(),
    num_steps: int = 1,
    trace: bool = False,
    serve: Serve | None = None,
) -> Predictor:
    """A predictor that adapts until the views of one instance agree with confidence (MEMO).

    Loss: ``H(mean_j p(view_j(x)))``. It needs no auxiliary head, so any classifier will do.

    **Published:** CIFAR-10, ResNet-26 with GroupNorm: the defaults, on AugMix views
    (``views.image.chain(views.image.crop_flip(4), views.augmix.augmix)``). ImageNet: 64 views,
    ResNet-50 with SGD 0.00025 and BatchNorm with a prior of 16 source images per view
    (``from_linen(net, norm=16 * 64)``). ImageNet-C at level 5, ResNet-50: source 82.0 % error,
    MEMO 76.1 % (table of the EATA repository).

    **Fails** on instances that the model gets wrong with confidence, which it makes more so; one
    class for everything has entropy zero, so several steps or a stream without resets collapse.
    Report :func:`~ttt_jax.methods.augmented` beside it.

    **Cost** of an instance: ``num_views`` forward and backward passes a step, and one forward
    pass.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``.
      augment: ``augment(x, key) -> x``, one random view of one instance; see
        :mod:`ttt_jax.views`.
      num_views: views per step, static.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per instance, static; 0 is the source prediction.
      trace: whether the output has a leading axis ``[num_steps + 1]``, entry 0 the source's.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify`` at N = 1.

    Returns:
      A :class:`~ttt_jax.Predictor` over one instance.

    Raises:
      ValueError: ``num_views`` or ``num_steps`` out of range; when called: what
        :func:`~ttt_jax.losses.marginal_entropy` refuses.

    References:
      Zhang et al., `MEMO <https://arxiv.org/abs/2110.09506>`_, 2022, Eqs. 1-2. The authors'
      ImageNet code, github.com/zhangmarvin/memo, carries the moments of AdamW from image to image;
      here they are private.
    """
    loss = losses.marginal_entropy(classify, augment, num_views=num_views)
    adapter = gradient_adapter(loss, optimizer, select=select)
    return episodic(adapter, prediction(classify, serve, False), num_steps=num_steps, trace=trace)

"""Test-time training on denoising."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ttt_jax import _arguments, losses, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Params, Predictor, Selection
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.predictors import episodic


@_arguments.checked()
def ttt_denoising(
    classify: Callable[[Params, Any], jax.Array],
    denoise: Callable[[Params, Any], jax.Array],
    *,
    noise: float | jax.Array,
    num_copies: int,
    optimizer: optax.GradientTransformation = optax.sgd(1e-3),
    select: Selection = select.everything(),
    num_steps: int = 1,
    trace: bool = False,
    serve: Serve | None = None,
) -> Predictor:
    """A predictor that adapts to one instance by recovering it from noisy copies.

    Loss: ``mean |denoise(x + noise * n) - x|^2`` with standard normal n. It needs a decoder that
    was trained to do so.

    **Published** for training (Vincent et al., 2008): noise on the input, its clean version as the
    target. No test-time setting of this loss is known to us, so ``noise`` and ``num_copies`` have
    no default; optimizer and number of steps are for validation shifts to choose. Karani et al.,
    2021, adapt with a denoising autoencoder of the *outputs*, which is another loss.

    **Fails** under corruptions that are noise themselves: the instance is the target, so the model
    learns to reproduce what should be removed.

    **Cost** of an instance: ``num_copies`` forward and backward passes a step, and one forward
    pass.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``.
      denoise: model function of the decoder, ``(params, inputs[N, ...]) -> [N, ...]``, of the
        inputs' shape.
      noise: standard deviation, in the units of ``x``. May be traced.
      num_copies: noisy copies per step, static.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per instance, static; 0 is the source prediction.
      trace: whether the output has a leading axis ``[num_steps + 1]``, entry 0 the source's.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify`` at N = 1.

    Returns:
      A :class:`~ttt_jax.Predictor` over one floating array.

    Raises:
      ValueError: ``noise``, ``num_copies`` or ``num_steps`` out of range; when called: what
        :func:`~ttt_jax.losses.denoising` refuses.

    References:
      Vincent et al., Extracting and Composing Robust Features with Denoising Autoencoders, 2008;
      Karani et al., `Test-Time Adaptable Neural Networks for Robust Medical Image Segmentation
      <https://arxiv.org/abs/2004.04668>`_, 2021.
    """
    loss = losses.denoising(denoise, noise=noise, num_copies=num_copies)
    adapter = gradient_adapter(loss, optimizer, select=select)
    return episodic(adapter, prediction(classify, serve, False), num_steps=num_steps, trace=trace)

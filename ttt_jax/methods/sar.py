"""SAR: sharpness-aware entropy of the reliable instances, with recovery."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks, losses, resets, select
from ttt_jax.adapters import sharpness_aware_adapter
from ttt_jax.base import AuxLoss, Info, Params, Selection, Stream
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.online import online


@_arguments.checked()
def sar(
    classify: Callable[[Params, Any], jax.Array],
    *,
    margin: float | jax.Array = 0.4,
    rho: float | jax.Array = 0.05,
    reset_below: float | jax.Array = 0.2,
    optimizer: optax.GradientTransformation = optax.sgd(2.5e-4, momentum=0.9),
    select: Selection = select.norm_affine(),
    num_steps: int = 1,
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream over batches that minimizes reliable entropy where it is flat, and recovers (SAR).

    With ``S = {n: H_n < E0 = margin * ln C}`` and ``g = grad mean_S H``, the gradient is taken at
    ``theta + rho g / |g|``, over the instances of S that are still reliable there, and stepped
    from ``theta``. When the moving average of that loss falls below ``reset_below``, the whole
    state is pristine again. A batch without a reliable instance makes no step and is left out of
    the average.

    **Published:** ImageNet, the defaults with ResNet-50; step size 0.001 with a ViT, batches of
    64. Norms of all but the last stage adapt, or of all but the last three blocks and the final
    norm: ``select.exclude``. Label-shifted ImageNet-C, accuracy: ResNet-50 with GroupNorm 30.6 %
    to 37.2 %, ViT-B 29.9 % to 58.0 %.

    **Fails** quietly where the threshold does not fit: 0.2 belongs to 1000 classes, whose E0 is
    2.76. With ten classes E0 is 0.92, a sound model may be below 0.2 on its reliable images, and
    SAR resets after every batch: 20.4 % error on CIFAR-10-C, that of batch statistics alone
    (benchmark of mariodoebler/test-time-adaptation). Read ``info.reset``, and scale the threshold
    with ``ln C``.

    **Cost** of an instance: ``2 num_steps`` forward and backward passes and one forward pass.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``.
      margin: E0 as a share of ``ln C``. May be traced.
      rho: radius of the climb. May be traced.
      reset_below: the average loss, in nats, below which the stream recovers. May be traced.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per batch, static.
      predict: ``"before"`` or ``"after"`` the update.
      batch: whether the instance is a batch ``[N, ...]``; with False, one instance.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify``.

    Returns:
      A :class:`~ttt_jax.Stream`.

    Raises:
      ValueError: ``num_steps`` or ``predict`` out of range; when called: what
        :func:`~ttt_jax.losses.reliable_entropy` refuses.

    References:
      Niu et al., `Towards Stable Test-Time Adaptation in Dynamic Wild World
      <https://arxiv.org/abs/2302.12400>`_, 2023, Eqs. 1-5 and Section 4. The authors' code,
      github.com/mr-eggplant/SAR, keeps average and momentum when it resets, and so resets again
      at the next batches; here both start anew, as the paper has it. There a batch without a
      reliable instance still moves the weights by momentum.
    """
    _checks.check_number("methods.sar: reset_below", reset_below)

    def reliable(reference: Params | None = None) -> AuxLoss:
        return losses.reliable_entropy(classify, margin=margin, reference=reference, batch=batch)

    def health(output: Any, info: Info) -> Any:
        # Without a reliable instance there is no loss: its 0 must not enter the average.
        return jnp.where(info.updated, info.loss[-1], jnp.nan) if num_steps else jnp.nan

    adapter = sharpness_aware_adapter(
        reliable(), optimizer, select=select, rho=rho, peak_loss=reliable
    )
    return online(
        adapter,
        prediction(classify, serve, batch),
        num_steps=num_steps,
        reset=resets.on_collapse(health, reset_below),
        predict=predict,
    )

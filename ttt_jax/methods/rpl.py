"""RPL: pseudo-labels under a loss that wrong labels cannot rule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks, resets, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Key, Params, Reset, Selection, Stream
from ttt_jax.methods._batches import Serve, batch_size, checked, prediction, with_batch_axis
from ttt_jax.online import online


@_arguments.checked()
def rpl(
    classify: Callable[[Params, Any], jax.Array],
    *,
    q: float | jax.Array = 0.8,
    optimizer: optax.GradientTransformation = optax.sgd(0.75e-3),
    select: Selection = select.norm_affine(),
    num_steps: int = 1,
    reset: Reset = resets.never(),
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream over batches by robust pseudo-labels (RPL).

    Loss: ``mean_n (1 - max_c p_nc^q) / q``, the generalized cross-entropy to the most likely
    class. It goes from cross-entropy (``q`` to 0) to the mean absolute error (``q = 1``): the
    slope of an unsure instance, with the likelihood ``p`` of its label, is ``p^q`` times that of
    cross-entropy, so that doubtful labels teach less.

    **Published:** ImageNet-C, ResNet-50 with BatchNorm from the batch, batches of 96, SGD with
    step size 0.00075, q = 0.8, five passes over the test images of a corruption.

    **Fails** as Tent does, later: on long streams it ends below the source model (Press et al.,
    2023, `RDumb <https://arxiv.org/abs/2306.05401>`_, on CCC). One pass of the published step
    moves little; its five passes see every test image before the last prediction of it.

    **Cost** of an instance: ``num_steps`` forward and backward passes and one forward pass.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``, its BatchNorm
        served with the statistics of the batch; middle axes (pixels) are averaged.
      q: exponent in (0, 1]. May be traced.
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
      ValueError: a concrete ``q`` outside (0, 1], ``num_steps`` or ``predict`` out of range; when
        called: an empty batch.

    References:
      Rusak et al., `If your data distribution shifts, use self-learning
      <https://arxiv.org/abs/2104.12928>`_, 2022; the loss is of Zhang and Sabuncu, `Generalized
      Cross Entropy Loss <https://arxiv.org/abs/1805.07836>`_, 2018, Eq. 6. The computation is that
      of the authors' code, github.com/bethgelab/robustness (``gce.py``), in one pass.
    """
    classify = checked("rpl", classify)
    rule = "Near 0 the loss is cross-entropy, at 1 the mean absolute error."
    _checks.check_number("methods.rpl: q", q, 0.0, 1.0, above=True, hint=rule)

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        inputs = with_batch_axis(x, batch)
        if not batch_size(inputs):
            raise ValueError("methods.rpl needs at least one instance; got 0 in the batch.")
        log_p = jax.nn.log_softmax(classify(params, inputs).astype(jnp.float32), axis=-1)
        # The entry, not the maximum: classes that tie would share its gradient.
        label = log_p.argmax(axis=-1, keepdims=True)
        best = jnp.take_along_axis(log_p, label, axis=-1)[..., 0]
        return ((1.0 - jnp.exp(q * best)) / q).mean()

    return online(
        gradient_adapter(loss, optimizer, select=select),
        prediction(classify, serve, batch),
        num_steps=num_steps,
        reset=reset,
        predict=predict,
    )

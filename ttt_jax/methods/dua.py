"""DUA: running normalization statistics that follow the stream ever more slowly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, resets
from ttt_jax.base import Adapter, Key, Params, PyTree, Reset, StepInfo, Stream
from ttt_jax.methods._batches import Serve, batch_size, prediction, with_batch_axis
from ttt_jax.online import online
from ttt_jax.running_statistics import statistics_adapter


@_arguments.checked()
def dua(
    classify: Callable[[Params, Any], jax.Array],
    statistics: Callable[[Params, Any], PyTree],
    *,
    augment: Callable[[Any, Key], Any],
    num_views: int = 64,
    momentum: float | jax.Array = 0.1,
    decay: float | jax.Array = 0.94,
    floor: float | jax.Array = 0.005,
    reset: Reset = resets.never(),
    predict: str = "after",
    batch: bool = False,
    serve: Serve | None = None,
) -> Stream:
    """A stream over single images that updates BatchNorm's running statistics (DUA).

    At image k (from 1) the weight of the new statistics is ``w_k = momentum * decay^k + floor``:
    ``statistics <- (1 - w_k) statistics + w_k s(views)``, with s the mean and variance of every
    BatchNorm over ``num_views`` random views of the image. Nothing is differentiated.

    **Published:** the defaults; views are random crops, flips and rotations by quarter turns.
    CIFAR-10-C level 5, WRN-40-2 with AugMix, 80 images: source 18.3 % error, DUA 12.1 %
    (README of jmiemirza/DUA). That figure is an oracle: the labeled test set is evaluated after
    every image and the least error is reported.

    **Fails** on streams that change after many images: the weight has fallen to its floor by
    then; a reset starts it anew. The statistics of one image are those of one class, which the
    small weight hides and a long stream ordered by label does not.

    **Cost** of an instance: ``num_views`` forward passes and one for the prediction.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ...]`` that serves the
        running statistics (``models.from_linen(net)``).
      statistics: ``(params, inputs[N, ...]) -> statistics`` in the layout of
        ``select.statistics()``, such as ``models.linen_statistics(net)``.
      augment: ``augment(x, key) -> x``, one random view of one instance.
      num_views: views of each instance, static.
      momentum: weight of new statistics before its first decay. May be traced.
      decay: factor of the weight at every instance. May be traced.
      floor: what the weight falls to. May be traced.
      reset: when statistics and weight are pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"after"`` or ``"before"`` the update.
      batch: whether the instance is a batch ``[N, ...]``, whose statistics are over all views.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify``.

    Returns:
      A :class:`~ttt_jax.Stream` whose ``loss`` and ``grad_norm`` are 0.

    Raises:
      ValueError: ``num_views`` < 1, an unknown ``predict``; when called: ``params`` without
        ``batch_stats``.

    References:
      Mirza et al., `The Norm Must Go On <https://arxiv.org/abs/2112.00463>`_, 2022, Eqs. 3-4;
      constants from the authors' code, github.com/jmiemirza/DUA. There new variances divide by
      n - 1; here ``statistics`` decides, and flax divides by n.
    """
    _checks.check_count("methods.dua: num_views", num_views)
    _checks.check_share("methods.dua: momentum", momentum)
    _checks.check_share("methods.dua: decay", decay)
    _checks.check_share("methods.dua: floor", floor)

    def views_of(x: Any, key: Key) -> Any:
        """``[N * num_views, ...]``."""
        instances = with_batch_axis(x, batch)
        count = batch_size(instances)
        repeated = jax.tree.map(lambda leaf: leaf.repeat(num_views, axis=0), instances)
        keys = _checks.split_to_map("methods.dua", key, count * num_views)
        return jax.vmap(augment)(repeated, keys)

    def step(params: Params, state: PyTree, x: Any, key: Key) -> tuple[PyTree, StepInfo]:
        weight = momentum * decay ** (state.count + 1).astype(jnp.float32) + floor
        follow = statistics_adapter(statistics, momentum=1 - weight)
        return follow.step(params, state, views_of(x, key), key)

    fixed = statistics_adapter(statistics, momentum=0.0)
    return online(
        Adapter(fixed.init, step, fixed.merge),
        prediction(classify, serve, batch),
        reset=reset,
        predict=predict,
    )

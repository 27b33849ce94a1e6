"""Test-time training on nearest neighbors: the instance adapts with its like from a pool."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ttt_jax import _arguments, losses, neighbors as neighbors_lib, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import FromSource, Key, Params, Predictor, PyTree, Selection
from ttt_jax.methods._batches import Serve, prediction
from ttt_jax.predictors import episodic
from ttt_jax.source import value_of


@_arguments.checked()
def neighbors(
    classify: Callable[[Params, Any], jax.Array],
    rotation: Callable[[Params, Any], jax.Array],
    features: Callable[[Params, Any], jax.Array],
    *,
    augment: Callable[[Any, Key], Any] | None = None,
    copies: int | None = 32,
    k: int = 20,
    optimizer: optax.GradientTransformation = optax.sgd(1e-3),
    select: Selection = select.everything(),
    num_steps: int = 1,
    trace: bool = False,
    serve: Serve | None = None,
) -> FromSource:
    """A method that adapts to one image together with its k nearest source images.

    Loss: the mean of :func:`~ttt_jax.methods.ttt_rotation`'s over the image and its neighbors,
    ``1/(1 + k) [loss(x) + sum_n loss(n)]``. Near is what has a similar direction (cosine) of
    features under the pristine model. Labels are not used. Neighbors depend on the instance and
    the pool alone, never on batch mates.

    **Published** for language models: one gradient step on each of the nearest texts of the
    training set, 20 of which give most of the gain. The loss and the step size for images are
    those of :func:`~ttt_jax.methods.ttt_rotation`.

    **Fails** where the pool holds nothing like the instance: the neighbors of a corrupted image in
    a clean pool are clean, and training on them pulls back to the source. A pool of test images is
    another protocol than one image at a time: say so where it is reported.

    **Cost** of an instance: ``(1 + k) * copies`` forward and backward passes a step, and two
    forward passes (search and prediction). Once: a forward pass of the source instances.

    Args:
      classify: model function ``(params, images[N, H, W, C]) -> logits[N, ..., classes]``.
      rotation: model function of the rotation head, ``(params, images[N, H, W, C]) -> [N, 4]``.
      features: model function ``(params, images[N, H, W, C]) -> [N, D]``, for the search.
      augment: ``augment(image, key) -> image``, one random view; ``None`` for none.
      copies: rotated copies of each image per step, static.
      k: how many neighbors, static, at most the size of the pool.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per image, static; 0 is the source prediction.
      trace: whether the output has a leading axis ``[num_steps + 1]``, entry 0 the source's.
      serve: ``(params, x) -> output``; ``None`` for ``classify`` at N = 1.

    Returns:
      A :class:`~ttt_jax.FromSource`. ``measure`` gives ``{"instances", "features"}`` of the
      pool, which ``reduce`` concatenates; ``build`` gives a :class:`~ttt_jax.Predictor`. Pass the
      pool into the compiled function and build there: closed over, it would be stored in the
      program.

    Raises:
      ValueError: ``copies`` out of range; from ``build``: ``num_steps`` out of range; when called:
        a ``k`` larger than the pool, or what :func:`~ttt_jax.losses.rotation` refuses.

    References:
      Hardt and Sun, `Test-Time Training on Nearest Neighbors for Large Language Models
      <https://arxiv.org/abs/2305.18466>`_, 2024, whose steps are on the neighbors alone, one after
      the other; here the instance and its neighbors are one batch.
    """
    loss = losses.rotation(rotation, copies=copies, augment=augment, batch=True)

    def measure(params: Params, x: Any) -> PyTree:
        return {"instances": x, "features": features(params, x)}

    def build(statistics: PyTree) -> Predictor:
        pool = value_of(statistics)
        find = neighbors_lib.finder(features, pool["instances"], pool["features"], k=k)
        adapter = gradient_adapter(loss, optimizer, select=select)
        return episodic(
            neighbors_lib.with_neighbors(adapter, find),
            prediction(classify, serve, False),
            num_steps=num_steps,
            trace=trace,
        )

    return FromSource(measure, "concatenate", build)

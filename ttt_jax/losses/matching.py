"""Losses that pull the statistics of test data to those of the source: ActMAD and TTT++."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract, _trees
from ttt_jax.base import AuxLoss, Key, Params, PyTree, StatefulLoss
from ttt_jax.losses import _inputs, _source
from ttt_jax.source import Moments

_EXACT = jax.lax.Precision.HIGHEST


@_arguments.checked(collect=_arguments.model)
def activation_moments(
    collect: Callable[[Params, Any], PyTree],
) -> Callable[[Params, Any], Moments]:
    """The moments that :func:`activation_matching` compares with, for ``source_statistics``.

    Args:
      collect: ``collect(params, inputs[N, ...]) -> pytree`` of activations ``[N, ...]``, such as
        ``ttt_jax.models.linen_activations`` builds. Batches of ``ttt_jax.data`` hold strings:
        compile ``jax.jit(collect)``, not the result.

    Returns:
      ``fn(params, batch) -> Moments``: mean and variance (divided by N) over the leading axis of
      every activation, in float32, which ``source_statistics`` joins exactly. ``batch`` is a
      batch of ``ttt_jax.data`` (its ``image`` is taken) or the inputs themselves.

    Examples:
      >>> import jax.numpy as jnp
      >>> moments = activation_moments(lambda params, x: {"layer": params * x})
      >>> print(moments(2.0, jnp.array([[1.0], [3.0]])).centered["layer"])
      [4.]
    """
    _contract.require_model_function("losses.activation_moments", collect)

    def moments(params: Params, batch: Any) -> Moments:
        found = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32), collect(params, _source.images_of(batch))
        )
        return Moments(
            mean=jax.tree.map(lambda leaf: leaf.mean(axis=0), found),
            centered=jax.tree.map(lambda leaf: leaf.var(axis=0), found),
        )

    return moments


@_arguments.checked()
def activation_matching(
    collect: Callable[..., PyTree],
    source: Any,
    *,
    augment: Callable[[Any, Key], Any] | None = None,
    num_views: int | None = None,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Matches mean and variance of every activation with the source's (ActMAD).

    ``1/2 * sum over layers of [mean|mu - mu_src| + mean|var - var_src|]``. The statistics are
    taken over the leading axis only, so there is one per channel and location; the variances of
    n activations divide by n - 1, as the authors' code does.

    Args:
      collect: ``collect(params, inputs[N, ...]) -> pytree`` of activations ``[N, ...]``; each
        leaf counts as a layer.
      source: ``source_statistics(activation_moments(collect), params, loader)``, or its value.
      augment: ``augment(x, key) -> x``, one random view of one instance. Needed for one
        instance, whose statistics are those of its views.
      num_views: V views of each instance, given together with ``augment``.
      batch: whether ``x`` has a leading batch axis; the statistics are then over the batch, or
        over all N * V views of it.
      stochastic: whether ``collect`` takes a key as third argument.

    Returns:
      An ``AuxLoss``.

    Raises:
      ValueError: one instance without views, one of ``augment`` and ``num_views`` alone, or
        ``source`` of another form; when called: a batch of images where one instance is due,
        fewer than two inputs, or activations that differ from the source's in name or shape.

    References:
      Mirza et al., `ActMAD <https://arxiv.org/abs/2211.12870>`_, 2023.
    """
    name = "activation_matching"
    if (augment is None) != (num_views is None) or (augment is None and not batch):
        raise ValueError(
            f"losses.{name} takes the statistics of one instance over its views: give both "
            f"augment and num_views (got augment = {augment}, num_views = {num_views}), or build "
            "the loss with batch=True for the statistics of a batch."
        )
    least = 1 if batch else 2
    if num_views is not None:
        _checks.check_count("num_views", num_views, least)
    means, variances = (
        {path: jnp.asarray(leaf, jnp.float32) for path, leaf in _trees.named_leaves(tree)}
        for tree in _source.moments_of(name, source, "activation_moments")
    )
    call = _inputs.caller(name, collect, stochastic, "collect")

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        inputs = _inputs.check_instance(name, x, batch)
        view_key, model_key = jax.random.split(key)
        if augment is not None and num_views is not None:
            size = _inputs.batch_size(inputs)
            keys = _inputs.instance_keys(name, view_key, size, batch)
            views = jax.vmap(lambda one, k: _inputs.views_of(augment, one, k, num_views))
            inputs = _inputs.flatten_views(views(inputs, keys))
        count = _inputs.batch_size(inputs)
        if count < 2:
            raise ValueError(
                f"losses.{name} needs the statistics of at least 2 inputs; got a batch of {count}. "
                "Use larger batches, or views (augment and num_views)."
            )
        found = dict(_trees.named_leaves(call(params, inputs, model_key)))
        _check_layers(name, found, means, count)
        total = jnp.zeros((), jnp.float32)
        for path, leaf in found.items():
            leaf = leaf.astype(jnp.float32)
            total += jnp.abs(leaf.mean(axis=0) - means[path]).mean()
            total += jnp.abs(leaf.var(axis=0, ddof=1) - variances[path]).mean()
        return total / 2

    return _inputs.over_batch(loss, batch)


def _check_layers(name: str, found: dict[str, Any], means: dict[str, Any], count: int) -> None:
    shapes = {path: jnp.shape(leaf) for path, leaf in found.items()}
    wanted = {path: (count, *leaf.shape) for path, leaf in means.items()}
    wrong = sorted(path for path in shapes | wanted if shapes.get(path) != wanted.get(path))
    if wrong or not found:
        what = [
            f"{path!r}: {shapes.get(path, 'missing')}, not {wanted.get(path, 'in the source')}"
            for path in wrong[:3]
        ]
        raise ValueError(
            f"losses.{name}: {len(wrong)} of {len(shapes | wanted)} activations differ from the "
            f"source's ({'; '.join(what)}). Take source statistics with the same collect, on "
            "inputs of the same shape; activations have the leading axis of the inputs."
        )


@_arguments.checked()
def feature_moments(
    features: Callable[[Params, Any], jax.Array],
) -> Callable[[Params, Any], Moments]:
    """The moments that :func:`moment_matching` compares with, for ``source_statistics``.

    Args:
      features: model function ``(params, inputs[N, ...]) -> [N, D]``; compile this one, not the
        result, as batches of ``ttt_jax.data`` hold strings.

    Returns:
      ``fn(params, batch) -> Moments``: mean ``[D]`` and covariance ``[D, D]`` (divided by N) over
      the batch, in float32, which ``source_statistics`` joins exactly. ``batch`` is a batch of
      ``ttt_jax.data`` (its ``image`` is taken) or the inputs themselves.

    Raises:
      ValueError: when called: features that are not ``[N, D]``.
    """
    _contract.require_model_function("losses.feature_moments", features)

    def moments(params: Params, batch: Any) -> Moments:
        inputs = _source.images_of(batch)
        count = _inputs.batch_size(inputs)
        found = _source.check_features("feature_moments", features(params, inputs), count)
        mean = found.mean(axis=0)
        apart = found - mean[None]
        return Moments(mean, jnp.matmul(apart.T, apart, precision=_EXACT) / count)

    return moments


@_arguments.checked()
def moment_matching(
    features: Callable[..., jax.Array],
    source: Any,
    *,
    mean_weight: float | jax.Array,
    covariance_weight: float | jax.Array,
    queue: int = 0,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss | StatefulLoss:
    """Matches mean and covariance of features with the source's (TTT++).

    ``covariance_weight * |S_src - S_tgt|_F^2 / (4 D^2) + mean_weight / 2 * mean((mu_src -
    mu_tgt)^2)`` with the target's moments over the current features and the queued ones, which
    are constants. ``S_tgt`` divides by n - 1, as the authors' code does.

    TTT++ adds this loss at the encoder's output and at the auxiliary head's to
    :func:`contrastive`, by :func:`weighted`.

    Args:
      features: model function ``(params, inputs[N, ...]) -> [N, D]``.
      source: ``source_statistics(feature_moments(features), params, loader)``, or its value.
      mean_weight: weight of the means' distance. May be traced.
      covariance_weight: weight of the covariances' distance. May be traced.
      queue: Q, how many feature vectors are remembered, static. Every inner step appends its own
        after their use; the oldest ones go. Places not yet filled do not count.
      batch: whether ``x`` has a leading batch axis. One instance needs a queue, which
        :func:`~ttt_jax.online` carries along a stream; its first step, with an empty queue,
        compares a covariance of zero.
      stochastic: whether ``features`` takes a key as third argument.

    Returns:
      An ``AuxLoss``, or with a queue a ``StatefulLoss``; its memory holds ``features`` ``[Q, D]``,
      the newest last, and their ``count``.

    Raises:
      ValueError: a negative ``queue``, one instance without a queue, or ``source`` of another
        form; when called: a batch of images where one instance is due, features that are not
        ``[N, D]``, or a batch of one without a queue.

    References:
      Liu et al., `TTT++ <https://openreview.net/forum?id=86NHK__yFDl>`_, 2021; Sun and Saenko,
      `Deep CORAL <https://arxiv.org/abs/1607.01719>`_, 2016.
    """
    name = "moment_matching"
    _checks.check_count("queue", queue, 0)
    _checks.check_number("mean_weight", mean_weight, 0.0)
    _checks.check_number("covariance_weight", covariance_weight, 0.0)
    if queue == 0 and not batch:
        raise ValueError(
            f"losses.{name} needs more than the one feature vector of one instance; got queue = 0. "
            "Set queue to the number of vectors to remember, or build the loss with batch=True."
        )
    moments = _source.moments_of(name, source, "feature_moments")
    mean_src, covariance_src = (jnp.asarray(moment, jnp.float32) for moment in moments)
    width = mean_src.shape[0]
    call = _inputs.caller(name, features, stochastic, "features")

    def current(params: Params, x: Any, key: Key) -> jax.Array:
        inputs = _inputs.check_instance(name, x, batch)
        count = _inputs.batch_size(inputs)
        return _source.check_features(name, call(params, inputs, key), count, width)

    def distance(found: jax.Array, weights: jax.Array) -> jax.Array:
        total = weights.sum()
        mean = (weights[:, None] * found).sum(axis=0) / total
        centered = found - mean[None]
        outer = jnp.matmul((weights[:, None] * centered).T, centered, precision=_EXACT)
        covariance = outer / jnp.maximum(total - 1, 1.0)
        coral = jnp.square(covariance_src - covariance).sum() / (4 * width**2)
        return covariance_weight * coral + mean_weight / 2 * jnp.square(mean_src - mean).mean()

    def stateless(params: Params, x: Any, key: Key) -> jax.Array:
        found = current(params, x, key)
        if found.shape[0] < 2:
            raise ValueError(
                f"losses.{name} needs at least 2 feature vectors; got a batch of 1 and no queue. "
                "Use larger batches, or set queue."
            )
        return distance(found, jnp.ones(found.shape[0], jnp.float32))

    def init(params: Params) -> PyTree:
        return {
            "features": jnp.zeros((queue, width), jnp.float32),
            "count": jnp.zeros((), jnp.int32),
        }

    def value(params: Params, memory: PyTree, x: Any, key: Key) -> tuple[jax.Array, PyTree]:
        found = current(params, x, key)
        queued = jax.lax.stop_gradient(memory["features"])
        filled = (jnp.arange(queue) >= queue - memory["count"]).astype(jnp.float32)
        both = jnp.concatenate([queued, found])
        weights = jnp.concatenate([filled, jnp.ones(found.shape[0], jnp.float32)])
        memory = {
            "features": jax.lax.stop_gradient(both[-queue:]),
            "count": jnp.minimum(memory["count"] + found.shape[0], queue),
        }
        return distance(both, weights), memory

    def after(adapted_params: Params, memory: PyTree) -> PyTree:
        return memory

    return StatefulLoss(init, value, after) if queue else _inputs.over_batch(stateless, batch)

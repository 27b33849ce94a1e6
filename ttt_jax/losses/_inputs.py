"""What the loss factories share: checks of their input, calls of the model function, weights."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _checks, _contract, _trees
from ttt_jax.base import Key, Params

# exp of it is 0 in float32, and sums of many stay finite.
_LEAST = -1e30


def check_images(name: str, x: Any, batch: bool) -> jax.Array:
    """Returns ``x`` as images ``[N, H, W, C]``; refuses any rank but the one that is due.

    Convolutions accept extra leading axes silently and would compute a wrong loss.
    """
    shape = jnp.shape(x)
    due = 4 if batch else 3
    if len(shape) != due:
        raise ValueError(
            f"losses.{name} works on {'a batch [N, H, W, C]' if batch else 'one image [H, W, C]'}"
            f"; got shape {shape}. "
            + (
                "Pass the whole batch, or build the loss with batch=False."
                if batch
                else "Map over a batch with ttt_jax.batched, or build the loss with batch=True."
            )
        )
    if batch:
        refuse_empty(name, shape[0])
    return x if batch else x[None]


def refuse_empty(name: str, count: int) -> None:
    """Raises ``ValueError`` for a batch without instances, whose mean would be nan."""
    if count == 0:
        raise ValueError(
            f"losses.{name} averages over a batch and needs at least one instance; got 0. "
            "Leave empty batches out."
        )


def check_instance(name: str, x: Any, batch: bool) -> Any:
    """Returns ``x`` with a leading batch axis; refuses empty batches, and images by the batch."""
    if batch:
        count_of(name, x)
        return x
    if getattr(x, "ndim", 0) >= 4:
        raise ValueError(
            f"losses.{name} works on one instance; got an array of shape {x.shape}, a batch of "
            "images. Map over it with ttt_jax.batched, or build the loss with batch=True "
            "(put a video into a dict)."
        )
    return jax.tree.map(lambda leaf: leaf[None], x)


def count_of(name: str, x: Any) -> int:
    """The number of instances of a batch, on all leaves alike, and at least one."""
    count = _checks.leading_size(f"losses.{name}", x)
    refuse_empty(name, count)
    return count


def batch_size(x: Any) -> int:
    """The length of the leading axis of a batched pytree."""
    return _checks.leading_size("A loss over a batch", x)


def caller(
    name: str, apply: Callable[..., Any], stochastic: bool, argument: str = "apply"
) -> Callable[[Params, Any, Key], Any]:
    """``call(params, inputs, key)`` for a model function with or without a key."""
    _contract.require_model_function(f"losses.{name}", apply, argument, extra=int(stochastic))
    if stochastic:
        return apply
    return lambda params, inputs, key: apply(params, inputs)


_over_batch: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()


def over_batch(loss: Callable[..., Any], batch: bool = True) -> Any:
    """The same loss, known from then on to average over a batch."""
    if batch:
        _over_batch.add(loss)
    return loss


def is_over_batch(loss: Callable[..., Any]) -> bool:
    """Whether a loss is one that a factory of the library built over a batch."""
    return inspect.isfunction(loss) and loss in _over_batch


def check_logits(name: str, logits: Any, count: int, classes: int | None = None) -> jax.Array:
    """Returns logits in float32 after checking their leading axis and number of classes."""
    _contract.require_array(f"losses.{name}", logits)
    shape = jnp.shape(logits)
    wanted = f"[{count}, ..., {classes or 'classes'}]"
    if len(shape) < 2 or shape[0] != count or (classes is not None and shape[-1] != classes):
        raise ValueError(
            f"losses.{name} needs a model function that maps inputs[N, ...] to outputs of shape "
            f"{wanted}; got {shape} for N = {count}. Pass the model function itself, not "
            "unbatched(apply)."
        )
    return logits.astype(jnp.float32)


def log_probabilities(logits: jax.Array) -> jax.Array:
    """``log_softmax`` over the last axis, finite where a logit is -inf.

    Such a logit leaves a class out; ``p * log p`` and its gradient are then 0, not nan.
    """
    return jnp.maximum(jax.nn.log_softmax(logits, axis=-1), _LEAST)


def entropy(log_p: jax.Array) -> jax.Array:
    """Shannon entropy over the last axis, in nats, of :func:`log_probabilities`."""
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def per_instance(values: jax.Array) -> jax.Array:
    """Averages all axes but the first: ``[N, ...] -> [N]`` (pixels of a segmentation)."""
    return values.reshape(values.shape[0], -1).mean(axis=1)


def weighted_mean(weights: jax.Array, values: jax.Array) -> jax.Array:
    """``sum(w * v) / max(sum w, 1)`` with constant weights; exactly 0 where all are 0."""
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1.0)


def instance_keys(name: str, key: Key, count: int, batch: bool) -> Key:
    """One key per instance of a batch, ``[N]``; the key itself for one instance."""
    return _checks.split_to_map(f"losses.{name}", key, count) if batch else key[None]


def views_of(augment: Callable[[Any, Key], Any], x: Any, key: Key, num_views: int) -> Any:
    """``[V, ...]`` random views of one instance, one key each."""
    keys = _checks.split_to_map("A loss over random views", key, num_views)
    return jax.vmap(augment, in_axes=(None, 0))(x, keys)


def flatten_views(views: Any) -> Any:
    """``[N, V, ...] -> [N * V, ...]`` on every leaf."""
    return jax.tree.map(lambda leaf: leaf.reshape((-1,) + leaf.shape[2:]), views)


def is_count(value: Any) -> bool:
    """Whether a static argument is an integer of at least 1."""
    return _trees.is_integer(value, 1)

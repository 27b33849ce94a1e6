"""T3A: the classifier's rows, adjusted by the features of confident test instances."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, resets
from ttt_jax.base import Adapter, Key, Params, Reset, StepInfo, Stream
from ttt_jax.methods._batches import checked, with_batch_axis
from ttt_jax.online import online


class Supports(NamedTuple):
    """The support set of every class.

    Attributes:
      vectors: ``[C, K, D]`` features.
      entropy: ``[C, K]`` of their predictions, in nats; infinite where a slot is empty.
    """

    vectors: jax.Array
    entropy: jax.Array


@_arguments.checked(features=_arguments.model)
def t3a(
    features: Callable[[Params, Any], jax.Array],
    *,
    linear: Callable[[Params], tuple[jax.Array, jax.Array]],
    num_supports: int = 100,
    reset: Reset = resets.never(),
    predict: str = "after",
    batch: bool = True,
) -> Stream:
    """A stream that classifies by templates made of its own confident features (T3A).

    Each class has a support set, at first the rows of the linear classifier. A test feature z
    joins the set of the class that the source classifier gives it. Every set keeps the K members
    whose source predictions have the least entropy; the template of a class is the direction of
    the sum of its members' directions, and the output is ``z . template_c``. Nothing is
    differentiated.

    **Published:** K was chosen on validation data among 1, 5, 20, 50, 100 and all, batches of 32;
    100 is the largest of them that bounds the memory.

    **Fails** where the source is confident and wrong: such features stay in a set for good, and
    only the next confident ones push them out. Logits are not calibrated (ViT-B on ImageNet-C:
    56.9 % accuracy, source 55.5 %, with a calibration error of 26.8 against 10.5; README of
    mr-eggplant/FOA).

    **Cost** of an instance: one forward pass, and a sort of ``C (K + N)`` numbers.

    Args:
      features: model function ``(params, inputs[N, ...]) -> [N, D]``, what the classifier sees.
      linear: ``linear(params) -> (kernel [D, C], bias [C])`` of the last layer.
      num_supports: K, static.
      reset: when the support sets are pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"after"`` the instance joined, as published, or ``"before"``.
      batch: whether the instance is a batch ``[N, ...]``; with False, one instance.

    Returns:
      A :class:`~ttt_jax.Stream` with output ``[N, C]``, for one instance ``[C]``; its ``loss`` and
      ``grad_norm`` are 0.

    Raises:
      ValueError: ``num_supports`` < 1, an unknown ``predict``; when called: features that do not
        fit the classifier.

    References:
      Iwasawa and Matsuo, `Test-Time Classifier Adjustment Module
      <https://openreview.net/forum?id=e_yvNqkJKAW>`_, 2021, Section 3. The authors' code,
      github.com/matsuolab/T3A, keeps all supports on request; here a set has K slots.
    """
    features = checked("t3a", features, "features")
    _checks.check_count("methods.t3a: num_supports", num_supports)

    def vectors_of(params: Params, x: Any) -> jax.Array:
        kernel, _ = linear(params)
        vectors = features(params, with_batch_axis(x, batch)).astype(jnp.float32)
        if vectors.ndim != 2 or vectors.shape[1] != kernel.shape[0]:
            raise ValueError(
                "methods.t3a needs features [N, D] for a classifier kernel [D, C]; got "
                f"{vectors.shape} and {kernel.shape}. Take the input of the last layer."
            )
        return vectors

    def joined(params: Params, supports: Supports, vectors: jax.Array) -> Supports:
        kernel, bias = linear(params)
        log_p = jax.nn.log_softmax(vectors @ kernel + bias[None], axis=-1)
        entropy = -(jnp.exp(log_p) * log_p).sum(axis=-1)
        return _join(supports, vectors, entropy, log_p.argmax(axis=-1))

    def init(params: Params) -> Supports:
        kernel = linear(params)[0].astype(jnp.float32)
        width, classes = kernel.shape
        empty = Supports(
            jnp.zeros((classes, num_supports, width), jnp.float32),
            jnp.full((classes, num_supports), jnp.inf, jnp.float32),
        )
        return joined(params, empty, kernel.T)

    def step(params: Params, state: Supports, x: Any, key: Key) -> tuple[Supports, StepInfo]:
        vectors = vectors_of(params, x)
        zero = jnp.zeros((), jnp.float32)
        return joined(params, state, vectors), StepInfo(zero, zero, jnp.isfinite(vectors).all())

    def apply(model: tuple[Params, Supports], x: Any) -> jax.Array:
        params, supports = model
        templates = _unit(_unit(supports.vectors).sum(axis=1))
        logits = vectors_of(params, x) @ templates.T
        return logits if batch else logits[0]

    adapter = Adapter(init, step, lambda params, state: (params, state))
    return online(adapter, apply, reset=reset, predict=predict)


def _join(supports: Supports, vectors: jax.Array, entropy: jax.Array, label: jax.Array) -> Supports:
    """The K members of least entropy of every class among the old and the new ones."""
    classes, slots = supports.entropy.shape
    theirs = jnp.where(label[None] == jnp.arange(classes)[:, None], entropy[None], jnp.inf)
    pooled = jnp.concatenate([supports.entropy, theirs], axis=1)
    order = jnp.argsort(pooled, axis=1)[:, :slots]
    # The new vectors are one array for all classes; only the chosen ones are copied.
    old = jnp.take_along_axis(supports.vectors, jnp.minimum(order, slots - 1)[:, :, None], axis=1)
    new = vectors[jnp.maximum(order - slots, 0)]
    kept = jnp.take_along_axis(pooled, order, axis=1)
    chosen = jnp.where((order < slots)[:, :, None], old, new)
    return Supports(jnp.where(jnp.isfinite(kept)[:, :, None], chosen, 0.0), kept)


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis; zeros stay."""
    square = jnp.square(vectors).sum(axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))

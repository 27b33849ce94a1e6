"""DeYO: entropy of the instances whose prediction depends on the shape of the object."""

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
def deyo(
    classify: Callable[[Params, Any], jax.Array],
    *,
    patches: int = 4,
    threshold: float | jax.Array = 0.2,
    entropy_margin: float | jax.Array = 0.5,
    margin: float | jax.Array = 0.4,
    optimizer: optax.GradientTransformation = optax.sgd(2.5e-4, momentum=0.9),
    select: Selection = select.norm_affine(),
    num_steps: int = 1,
    reset: Reset = resets.never(),
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream over batches that learns from predictions which a shuffle of patches spoils (DeYO).

    ``d = p(x)_y - p(x')_y``, with y the most likely class of x and x' the image with its grid of
    patches shuffled, says how much of the prediction is the object's shape. Loss: the mean of
    ``(exp(E0 - H) + exp(d)) H`` over the instances with ``H < entropy_margin * ln C`` and ``d >
    threshold``; ``E0 = margin * ln C``, and the weights are constants. A batch without such an
    instance makes no step.

    **Published:** ImageNet-C with ResNet-50, batches of 64: the defaults, a grid of 4 x 4. Norms
    of all but the last stage adapt: ``select.exclude``. A ViT has step size 0.001.

    **Fails** where texture or background is what tells the classes apart: then d is small for the
    right predictions too, and nothing is learned. Shuffled images are a batch
    of their own, with batch statistics of their own.

    **Cost** of an instance: per step a forward and backward pass and a forward pass of the
    shuffled images; one forward pass for the prediction.

    Args:
      classify: model function ``(params, images[N, H, W, C]) -> logits[N, classes]``.
      patches: patches along each side, static; they must divide H and W.
      threshold: the least difference d. May be traced.
      entropy_margin: the largest entropy, as a share of ``ln C``. May be traced.
      margin: E0 as a share of ``ln C``. May be traced.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: inner steps per batch, static.
      reset: when the stream is pristine again, see :mod:`ttt_jax.resets`.
      predict: ``"before"`` or ``"after"`` the update.
      batch: whether the instance is a batch of images; with False, one image.
      serve: ``(params, x) -> output``, which predicts with the adapted parameters; ``None`` for
        ``classify``.

    Returns:
      A :class:`~ttt_jax.Stream`; ``info.aux["kept"]`` is bool ``[num_steps, N]``, the instances
      that counted.

    Raises:
      ValueError: ``patches`` < 2, ``num_steps`` or ``predict`` out of range; when called: images
        that the patches do not divide, or logits that are not ``[N, classes]``.

    References:
      Lee et al., `Entropy is not Enough for Test-Time Adaptation
      <https://arxiv.org/abs/2403.07366>`_, 2024, Eqs. 4-7. Against the authors' code,
      github.com/Jhyun17/DeYO: all images are shuffled, not only those of low entropy (which
      matters with batch statistics), and sizes that the patches do not divide are refused, where
      the code resizes.
    """
    classify = checked("deyo", classify)
    _checks.check_count("methods.deyo: patches", patches, 2)
    _checks.check_number("methods.deyo: threshold", threshold)
    _checks.check_number("methods.deyo: entropy_margin", entropy_margin, 0.0)
    _checks.check_number("methods.deyo: margin", margin, 0.0)

    def loss(params: Params, x: Any, key: Key) -> Any:
        images = with_batch_axis(x, batch)
        _check(images, patches)
        keys = _checks.split_to_map("methods.deyo", key, batch_size(images))
        shuffled = jax.vmap(lambda image, k: _shuffled(image, k, patches))(images, keys)
        logits = classify(params, images).astype(jnp.float32)
        if logits.ndim != 2:
            raise ValueError(
                "methods.deyo compares one prediction per image and needs logits [N, classes]; got "
                f"shape {logits.shape}. Average the other axes in the model function."
            )
        log_p = jax.nn.log_softmax(logits, axis=-1)
        entropy = -(jnp.exp(log_p) * log_p).sum(axis=-1)
        label = log_p.argmax(axis=-1, keepdims=True)
        spoiled = jax.nn.softmax(classify(params, shuffled).astype(jnp.float32), axis=-1)
        difference = jax.lax.stop_gradient(
            jnp.take_along_axis(jnp.exp(log_p) - spoiled, label, axis=-1)[:, 0]
        )
        most = jnp.log(float(logits.shape[-1]))
        kept = (entropy < entropy_margin * most) & (difference > threshold)
        weight = jax.lax.stop_gradient(jnp.exp(margin * most - entropy)) + jnp.exp(difference)
        total = (jnp.where(kept, weight, 0.0) * entropy).sum()
        return total / jnp.maximum(kept.sum(dtype=jnp.float32), 1), {"kept": kept}

    return online(
        gradient_adapter(loss, optimizer, select=select, has_aux=True),
        prediction(classify, serve, batch),
        num_steps=num_steps,
        reset=reset,
        predict=predict,
    )


def _check(images: Any, patches: int) -> None:
    shape = jnp.shape(images)
    if len(shape) != 4 or shape[1] % patches or shape[2] % patches:
        raise ValueError(
            f"methods.deyo shuffles {patches} x {patches} patches of images [N, H, W, C] whose "
            f"height and width they divide; got {shape}. Choose other patches, or resize."
        )


def _shuffled(image: jax.Array, key: Key, patches: int) -> jax.Array:
    """The image with its grid of ``patches x patches`` in random order."""
    height, width, channels = image.shape
    grid = (patches, height // patches, patches, width // patches, channels)
    tiles = image.reshape(grid).swapaxes(1, 2)
    mixed = jax.random.permutation(key, tiles.reshape(patches**2, *tiles.shape[2:]))
    return mixed.reshape(tiles.shape).swapaxes(1, 2).reshape(image.shape)

"""Rotation prediction, the auxiliary task of test-time training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments
from ttt_jax.base import AuxLoss, Key, Params
from ttt_jax.losses import _inputs


def rotate(image: jax.Array, quarter_turns: jax.Array) -> jax.Array:
    """Rotates ``[H, W, C]`` counter-clockwise by ``quarter_turns`` (0 to 3, may be traced).

    A rotation by 180 degrees reverses both axes, one by 90 transposes and reverses one; the
    choice is made by select, so that it maps over instances without a branch.
    """
    turned = jnp.where(quarter_turns >= 2, image[::-1, ::-1], image)
    quarter = jnp.swapaxes(turned, 0, 1)[::-1]
    return jnp.where(quarter_turns % 2 == 1, quarter, turned)


@_arguments.checked()
def rotation(
    apply: Callable[..., Any],
    *,
    copies: int | None = None,
    augment: Callable[[Any, Key], Any] | None = None,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Four-way rotation prediction: which right-angle rotation was applied?

    The loss is the mean cross-entropy over the views, in float32.

    Args:
      apply: model function of the rotation head, ``(params, images[N, H, W, C]) -> [N, 4]``.
      copies: ``None`` takes the four rotations of the image (augmented once); an int takes that
        many freshly augmented copies, each with a uniformly drawn rotation (the published
        test-time rule, 32 copies).
      augment: ``augment(image, key) -> image``, e.g. random crop and flip; ``None`` for none.
      batch: whether ``x`` is a batch ``[N, H, W, C]``; all views then go through one call.
      stochastic: whether ``apply`` takes a key as third argument.

    Returns:
      An ``AuxLoss`` over one image ``[H, W, C]`` (square), or over a batch.

    Raises:
      ValueError: ``copies`` < 1; when called: the wrong rank, an image that is not square, or a
        head without four outputs.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> apply = lambda params, images: images.reshape(images.shape[0], -1) @ params
      >>> loss = rotation(apply)
      >>> print(loss(jnp.zeros((36, 4)), jnp.ones((6, 6, 1)), jax.random.key(0)))
      1.3862944

    References:
      Sun et al., `Test-Time Training with Self-Supervision
      <https://arxiv.org/abs/1909.13231>`_, 2020; Gidaris et al., `Unsupervised Representation
      Learning by Predicting Image Rotations <https://arxiv.org/abs/1803.07728>`_, 2018.
    """
    if copies is not None and not _inputs.is_count(copies):
        raise ValueError(f"copies must be None or an integer of at least 1, got {copies!r}.")
    call = _inputs.caller("rotation", apply, stochastic)

    def views(image: jax.Array, key: Key) -> tuple[jax.Array, jax.Array]:
        augment_key, turn_key = jax.random.split(key)
        if copies is None:
            base = image if augment is None else augment(image, augment_key)
            turns = jnp.arange(4)
            return jax.vmap(rotate, in_axes=(None, 0))(base, turns), turns
        turns = jax.random.randint(turn_key, (copies,), 0, 4, jnp.int32)
        if augment is None:
            return jax.vmap(rotate, in_axes=(None, 0))(image, turns), turns
        copied = _inputs.views_of(augment, image, augment_key, copies)
        return jax.vmap(rotate)(copied, turns), turns

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        images = _inputs.check_images("rotation", x, batch)
        if images.shape[1] != images.shape[2]:
            raise ValueError(
                f"losses.rotation needs square images; got {images.shape[1]} x "
                f"{images.shape[2]} pixels. Crop or pad them first."
            )
        view_key, model_key = jax.random.split(key)
        if copies is not None or augment is not None:
            keys = _inputs.instance_keys("rotation", view_key, images.shape[0], batch)
        else:  # nothing is drawn
            keys = jax.random.split(view_key, images.shape[0]) if batch else view_key[None]
        turned, turns = jax.vmap(views)(images, keys)
        inputs, labels = _inputs.flatten_views((turned, turns))
        logits = call(params, inputs, model_key)
        logits = _inputs.check_logits("rotation", logits, inputs.shape[0], classes=4)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.take_along_axis(log_p, labels[:, None], axis=-1).mean()

    return _inputs.over_batch(loss, batch)

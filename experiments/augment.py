"""Random views of one image, in JAX: ``(image[H, W, C] in [0, 1], key) -> image``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Augment = Callable[[Any, jax.Array], Any]


def shift(padding: int) -> Augment:
    """Random crop of the edge-padded image: a shift by up to ``padding`` pixels.

    The edge is repeated rather than filled with black: on a brightened or low-contrast image a
    black rim would be the strongest edge there is.
    """

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="edge")
        offset = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)

    return augment


def flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors left and right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def every_view(padding: int, flipped: bool) -> Callable[[jax.Array], jax.Array]:
    """All the views that :func:`shift` and, if asked, :func:`flip` can draw.

    Returns:
      ``image[H, W, C] -> [V, H, W, C]`` with ``V = (2 * padding + 1)^2``, twice that if flipped.
    """
    offsets = range(2 * padding + 1)

    def views(image: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="edge")
        shifted = [padded[i : i + height, j : j + width] for i in offsets for j in offsets]
        mirrored = [view[:, ::-1] for view in shifted] if flipped else []
        return jnp.stack(shifted + mirrored)

    return views


def chain(*steps: Augment) -> Augment:
    """Applies several views in order, each with its own key."""

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        for step, step_key in zip(steps, jax.random.split(key, len(steps)), strict=True):
            image = step(image, step_key)
        return image

    return augment

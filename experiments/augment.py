"""Random views of one image, in JAX: ``(image[H, W, C] in [0, 1], key) -> image``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Augment = Callable[[Any, jax.Array], Any]


# What lies beyond the image: its edge repeated, or black, as in torchvision's RandomCrop.
_RIMS = {"edge": "edge", "black": "constant"}


def _padder(padding: int, rim: str) -> Callable[[jax.Array], jax.Array]:
    if rim not in _RIMS:
        raise ValueError(f"The rim of views must be one of {sorted(_RIMS)}; got {rim!r}.")
    widths = ((padding, padding), (padding, padding), (0, 0))
    return lambda image: jnp.pad(image, widths, mode=_RIMS[rim])


def shift(padding: int, rim: str = "edge") -> Augment:
    """Random crop of the padded image: a shift by up to ``padding`` pixels.

    By default the edge is repeated rather than filled with black: on a brightened or low-contrast
    image a black rim would be the strongest edge there is.

    Raises:
      ValueError: a ``rim`` that is not ``edge`` or ``black``.
    """
    pad = _padder(padding, rim)

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        padded = pad(image)
        offset = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)

    return augment


def flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors left and right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def resized_crop(least: float) -> Augment:
    """A random part of the image, stretched to its size (bilinear).

    The part has a share of the area drawn between ``least`` and 1, and sides in a ratio between
    3/4 and 4/3, uniform in its logarithm; a side that would be too long is the image's.
    """

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        area_key, ratio_key, place_key = jax.random.split(key, 3)
        area = jax.random.uniform(area_key, (), minval=least, maxval=1.0)
        limit = jnp.log(4 / 3)
        ratio = jnp.exp(jax.random.uniform(ratio_key, (), minval=-limit, maxval=limit))
        share = jnp.minimum(jnp.sqrt(area * jnp.stack([ratio, 1 / ratio])), 1.0)
        corner = jax.random.uniform(place_key, (2,)) * (1 - share)
        return stretched(image, corner, share)

    return augment


def stretched(image: jax.Array, corner: jax.Array, share: jax.Array) -> jax.Array:
    """The part of an image from ``corner``, both as shares of its height and width ``[2]``."""
    size = jnp.array(image.shape[:2], jnp.float32)
    scale = 1 / share
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), scale, -corner * size * scale, method="linear", antialias=True
    )


def color_jitter(strength: float, probability: float) -> Augment:
    """Random brightness, contrast and saturation, with some probability.

    Each factor is uniform in ``[1 - strength, 1 + strength]``. Gray images have no saturation.
    """

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        chance_key, factor_key = jax.random.split(key)
        factors = jax.random.uniform(factor_key, (3,), minval=1 - strength, maxval=1 + strength)
        applied = jax.random.bernoulli(chance_key, probability)
        return jnp.where(applied, adjusted(image, factors), image)

    return augment


def adjusted(image: jax.Array, factors: jax.Array) -> jax.Array:
    """Brightness, contrast and saturation by factors ``[3]``, in this order, in [0, 1].

    Contrast is the distance to the mean luma, saturation that to the pixel's luma.
    """
    brightness, contrast, saturation = factors
    image = jnp.clip(image * brightness, 0.0, 1.0)
    middle = luma(image).mean()
    image = jnp.clip(middle + contrast * (image - middle), 0.0, 1.0)
    gray = luma(image)
    return jnp.clip(gray + saturation * (image - gray), 0.0, 1.0)


def luma(image: jax.Array) -> jax.Array:
    """``[H, W, C] -> [H, W, 1]``, the weights of ITU-R BT.601; a gray image as it is."""
    if image.shape[-1] != 3:
        return image
    return (image @ jnp.array([0.299, 0.587, 0.114], image.dtype))[..., None]


def grayscale(probability: float) -> Augment:
    """Takes the colors away with some probability."""

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        gray = jnp.broadcast_to(luma(image), image.shape)
        return jnp.where(jax.random.bernoulli(key, probability), gray, image)

    return augment


def simclr() -> Augment:
    """The views of contrastive training on small images (Chen et al. 2020, appendix B.9).

    Crop and resize (a fifth of the area at least, as in TTT++), flip, color jitter of strength 0.5
    (0.4 for each factor, in 4 of 5 images) and gray in one of 5. Left out are blur, as there, and
    the shift of the hue.
    """
    return chain(resized_crop(0.2), flip, color_jitter(0.4, 0.8), grayscale(0.2))


def every_view(padding: int, flipped: bool, rim: str = "edge") -> Callable[[jax.Array], jax.Array]:
    """All the views that :func:`shift` and, if asked, :func:`flip` can draw.

    Returns:
      ``image[H, W, C] -> [V, H, W, C]`` with ``V = (2 * padding + 1)^2``, twice that if flipped.
    """
    offsets, pad = range(2 * padding + 1), _padder(padding, rim)

    def views(image: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        padded = pad(image)
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

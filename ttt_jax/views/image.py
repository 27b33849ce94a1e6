"""Random views of one image, in JAX: ``(image[H, W, C] in [0, 1], key) -> image``."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _arguments, _checks

Augment = Callable[[Any, jax.Array], Any]


# Draws have 32 bits whatever `jax_enable_x64` says, so that a view is the same under it.
_HALF = np.float32(0.5)
# NumPy's names for what lies beyond an image: its edge repeated, or zeros.
_PAD_MODES = ("constant", "edge")

__all__ = [
    "adjust_color",
    "chain",
    "color_jitter",
    "crop_flip",
    "every_view",
    "flip",
    "grayscale",
    "luma",
    "resized_crop",
    "shift",
    "simclr",
    "stretch",
]


@_arguments.checked()
def shift(padding: int, pad_mode: str = "edge") -> Augment:
    """Returns random crops of the padded image: shifts by up to ``padding`` pixels.

    By default the edge is repeated rather than filled with black: on a brightened or low-contrast
    image a black border would be the strongest edge there is.

    Args:
      padding: pixels on every side, static.
      pad_mode: ``"edge"`` repeats the edge, ``"constant"`` fills with zeros (torchvision).

    Raises:
      ValueError: a negative ``padding``, or an unknown ``pad_mode``.
    """
    pad = _padder(padding, pad_mode)

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        padded = pad(image)
        offset = jax.random.randint(key, (2,), 0, 2 * padding + 1, jnp.int32)
        return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)

    return augment


@_arguments.checked(image=_arguments.array(3))
def flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the image, mirrored left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key, _HALF), image[:, ::-1], image)


@_arguments.checked()
def resized_crop(min_area: float) -> Augment:
    """Returns random parts of the image, stretched to its size (bilinear).

    A part has a share of the area drawn between ``min_area`` and 1, and sides in a ratio between
    3/4 and 4/3, uniform in its logarithm; a side that would be too long is the image's.

    Raises:
      ValueError: ``min_area`` outside of (0, 1].
    """
    _checks.check_number("min_area", min_area, 0.0, 1.0, above=True)

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        area_key, ratio_key, corner_key = jax.random.split(key, 3)
        area = jax.random.uniform(area_key, (), jnp.float32, min_area, 1.0)
        limit = math.log(4 / 3)
        ratio = jnp.exp(jax.random.uniform(ratio_key, (), jnp.float32, -limit, limit))
        share = jnp.minimum(jnp.sqrt(area * jnp.stack([ratio, 1 / ratio])), 1.0)
        corner = jax.random.uniform(corner_key, (2,), jnp.float32) * (1 - share)
        return stretch(image, corner, share)

    return augment


@_arguments.checked(
    image=_arguments.array(3),
    corner=_arguments.array(1, finite=True),
    share=_arguments.array(1, finite=True),
)
def stretch(image: jax.Array, corner: jax.Array, share: jax.Array) -> jax.Array:
    """Returns the part of an image from ``corner`` on, stretched to the image's size.

    Args:
      image: ``[H, W, C]``.
      corner: ``[2]``, the part's first row and column as shares of height and width.
      share: ``[2]``, the part's sides as shares of height and width.
    """
    size = jnp.array(image.shape[:2], jnp.float32)
    scale = 1 / share
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), scale, -corner * size * scale, method="linear", antialias=True
    )


@_arguments.checked()
def color_jitter(strength: float, probability: float) -> Augment:
    """Returns random changes of brightness, contrast and saturation, made with some probability.

    Each factor is uniform in ``[1 - strength, 1 + strength]``. Gray images have no saturation.

    Raises:
      ValueError: ``strength`` or ``probability`` outside of [0, 1].
    """
    _checks.check_share("strength", strength)
    _checks.check_share("probability", probability)

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        chance_key, factor_key = jax.random.split(key)
        factors = jax.random.uniform(factor_key, (3,), jnp.float32, 1 - strength, 1 + strength)
        applied = jax.random.bernoulli(chance_key, jnp.asarray(probability, jnp.float32))
        return jnp.where(applied, adjust_color(image, factors), image)

    return augment


@_arguments.checked(image=_arguments.array(3), factors=_arguments.array(1))
def adjust_color(image: jax.Array, factors: jax.Array) -> jax.Array:
    """Returns the image after brightness, contrast and saturation by factors ``[3]``, in [0, 1].

    Contrast is the distance to the mean luma, saturation that to the pixel's luma.
    """
    brightness, contrast, saturation = factors
    image = jnp.clip(image * brightness, 0.0, 1.0)
    middle = luma(image).mean()
    image = jnp.clip(middle + contrast * (image - middle), 0.0, 1.0)
    gray = luma(image)
    return jnp.clip(gray + saturation * (image - gray), 0.0, 1.0)


@_arguments.checked()
def luma(image: jax.Array) -> jax.Array:
    """Returns the luma ``[H, W, 1]`` by the weights of ITU-R BT.601; a gray image as it is."""
    if image.shape[-1] != 3:
        return image
    return (image @ jnp.array([0.299, 0.587, 0.114], image.dtype))[..., None]


@_arguments.checked()
def grayscale(probability: float) -> Augment:
    """Returns views that lose their colors with some probability, in [0, 1]."""
    _checks.check_share("probability", probability)

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        gray = jnp.broadcast_to(luma(image), image.shape)
        return jnp.where(
            jax.random.bernoulli(key, jnp.asarray(probability, jnp.float32)), gray, image
        )

    return augment


def simclr() -> Augment:
    """Returns the views of contrastive training on small images (Chen et al. 2020, appendix B.9).

    Crop and resize (a fifth of the area at least, as in TTT++), flip, color jitter of strength 0.5
    (0.4 for each factor, in 4 of 5 images) and gray in one of 5. Left out are blur, as there, and
    the shift of the hue.
    """
    return chain(resized_crop(0.2), flip, color_jitter(0.4, 0.8), grayscale(0.2))


@_arguments.checked()
def crop_flip(padding: int, pad_mode: str = "constant") -> Augment:
    """Returns the published views of CIFAR: a crop of the padded image, then a flip.

    ``RandomCrop(32, padding=4)`` and ``RandomHorizontalFlip()`` of torchvision, in training and at
    test time alike (Sun et al. 2020; Zhang et al. 2022): ``crop_flip(4)``.

    Args:
      padding: pixels on every side, static.
      pad_mode: as in :func:`shift`; zeros are the published choice.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> augment = crop_flip(4)
      >>> augment(jnp.ones((32, 32, 3)), jax.random.key(0)).shape
      (32, 32, 3)
    """
    return chain(shift(padding, pad_mode), flip)


@_arguments.checked()
def every_view(
    padding: int, flipped: bool, pad_mode: str = "edge"
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function that makes all views :func:`shift` and, if asked, :func:`flip` can draw.

    Returns:
      ``image[H, W, C] -> [V, H, W, C]`` with ``V = (2 * padding + 1)^2``, twice that if flipped.
    """
    pad = _padder(padding, pad_mode)
    offsets = range(2 * padding + 1)

    def views(image: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        padded = pad(image)
        shifted = [padded[i : i + height, j : j + width] for i in offsets for j in offsets]
        mirrored = [view[:, ::-1] for view in shifted] if flipped else []
        return jnp.stack(shifted + mirrored)

    return views


@_arguments.checked()
def chain(*steps: Augment) -> Augment:
    """Returns the views that several steps make in order, each with a key of its own."""

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        for step, step_key in zip(steps, jax.random.split(key, len(steps)), strict=True):
            image = step(image, step_key)
        return image

    return augment


def _padder(padding: int, pad_mode: str) -> Callable[[jax.Array], jax.Array]:
    _checks.check_count("padding", padding, 0)
    if pad_mode not in _PAD_MODES:
        raise ValueError(f"pad_mode must be one of {list(_PAD_MODES)}; got {pad_mode!r}.")
    widths = ((padding, padding), (padding, padding), (0, 0))
    return lambda image: jnp.pad(image, widths, mode=pad_mode)

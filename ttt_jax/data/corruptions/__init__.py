"""The common-corruptions benchmark as seeded NumPy functions, for images of any size.

The 15 corruptions and 4 validation ones of Hendrycks and Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", ICLR 2019
(https://arxiv.org/abs/1903.12261); constants from github.com/hendrycks/robustness,
``ImageNet-C/create_c/make_cifar_c.py`` and ``make_imagenet_c.py``.

**Which constants.** Images whose shorter side is at most 64 pixels get the CIFAR-10-C set,
larger ones the ImageNet-C set. Lengths in pixels are multiplied by ``side / 32`` or
``side / 224`` (below 32 pixels blurs and streaks by ``sqrt(side / 32)``, so that they still
do something), so at 32 and at 224 pixels the definitions are exactly the published ones:

* up to rounding inside the tools the published scripts call (ImageMagick's motion blur and
  OpenCV's filters, interpolation and edge detector are written out here);
* except ``frost``, whose photographs cannot be shipped: see :func:`weather.frost`.

**Randomness** comes from ``seed`` alone, mixed with the corruption's name and severity, so a
corrupted example does not depend on its place in a batch, on other examples or on NumPy's
global generator. Pass ``(seed, example id)``.

Only NumPy, SciPy and Pillow are used.
"""

import difflib
import operator
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ttt_jax import _arguments
from ttt_jax.data.corruptions import blur, digital, noise, spatter, weather
from ttt_jax.data.corruptions.common import Corruption, quantize, scale_of

__all__ = ["CORRUPTIONS", "VALIDATION_CORRUPTIONS", "check_name", "corrupt", "corrupt_batch"]

_FUNCTIONS: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter.spatter,
    "saturate": digital.saturate,
}

CORRUPTIONS: tuple[str, ...] = tuple(_FUNCTIONS)[:15]
"""The 15 corruptions of the benchmark, in its order: the ones that are reported."""

VALIDATION_CORRUPTIONS: tuple[str, ...] = tuple(_FUNCTIONS)[15:]
"""The 4 held out for choosing hyper-parameters."""


def _seed(place: str, name: str, value: Any) -> Any:
    """An integer, or several."""
    if isinstance(value, int | np.integer) or value is True:
        return _arguments.integer(place, name, value)
    return [
        _arguments.integer(place, name, part) for part in _arguments.sequence()(place, name, value)
    ]


@_arguments.checked()
def check_name(name: str, severity: int) -> None:
    """Checks a corruption's name and severity.

    Raises:
      ValueError: the name is unknown (the nearest ones are named), or the severity is not
        an integer from 1 to 5.
    """
    if name not in _FUNCTIONS:
        near = difflib.get_close_matches(str(name), _FUNCTIONS, n=3, cutoff=0.4)
        known = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_FUNCTIONS)}."
        raise ValueError(f"name (or domain): there is no corruption called {name!r}; {known}")
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise ValueError(
            f"A severity is an integer from 1 (mild) to 5 (strong), not {severity!r}; for the "
            "clean image do not corrupt it."
        )


def _check_images(images: Any, rank: int) -> np.ndarray:
    images = np.asarray(images)
    form = "[H, W, C]" if rank == 3 else "[N, H, W, C]"
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(
            f"A corruption takes float images in [0, 1], not {images.dtype}; divide 8-bit "
            "pixels by 255."
        )
    if images.ndim != rank or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"A corruption takes images {form} with C = 1 or 3, not the shape {images.shape}."
        )
    if min(images.shape[-3:-1]) < 8:
        raise ValueError(
            f"A corruption needs at least 8 x 8 pixels, not {images.shape[-3]} x "
            f"{images.shape[-2]}; resize the image first."
        )
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        if not np.isfinite(images).all():
            raise ValueError("A corruption takes finite pixels; this image has NaN or infinity.")
        raise ValueError(
            f"A corruption takes pixels in [0, 1], not {images.min():.4g} to "
            f"{images.max():.4g}; undo the normalization first."
        )
    return images


def _entropy(seed: int | Sequence[int]) -> tuple[int, ...]:
    try:
        words = tuple(operator.index(word) for word in seed)  # type: ignore[union-attr]
    except TypeError:
        try:
            words = (operator.index(seed),)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"A seed is an int or a tuple of ints, not {seed!r}.") from None
    if min(words, default=-1) < 0:
        raise ValueError(f"A seed is one or more integers that are not negative, not {seed!r}.")
    return words


def _apply(image: np.ndarray, name: str, severity: int, words: tuple[int, ...]) -> np.ndarray:
    # Lengths first: words of several sizes must not run into each other.
    key = (len(words), *words, zlib.crc32(name.encode()), severity)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    scale = scale_of(*image.shape[:2])
    return quantize(_FUNCTIONS[name](image.astype(np.float64), severity, rng, scale))


@_arguments.checked(image=_arguments.array(3, host=True, finite=True), seed=_seed)
def corrupt(
    image: np.ndarray, name: str, severity: int, *, seed: int | Sequence[int]
) -> np.ndarray:
    """Corrupts one image.

    Args:
      image: float ``[H, W, C]`` in [0, 1], C = 1 or 3, at least 8 x 8 pixels.
      name: one of :data:`CORRUPTIONS` or :data:`VALIDATION_CORRUPTIONS`.
      severity: 1 to 5.
      seed: an int or a tuple of ints, none negative; usually ``(seed, example id)``.

    Returns:
      float32 ``[H, W, C]``, every value k / 255 with k from 0 to 255: 8 bits by truncation,
      like the published files.

    Raises:
      ValueError: unknown name, severity outside 1 to 5, wrong shape, pixels that are not
        finite or not in [0, 1], a negative seed.
      TypeError: integer pixels, or a seed that is no integer.
    """
    check_name(name, severity)
    return _apply(_check_images(image, 3), name, int(severity), _entropy(seed))


@_arguments.checked(
    images=_arguments.array(4, host=True, finite=True),
    seed=_seed,
    ids=_arguments.array(1, host=True, kinds="iu"),
)
def corrupt_batch(
    images: np.ndarray,
    name: str,
    severity: int,
    *,
    seed: int | Sequence[int],
    ids: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """Corrupts a batch: exactly ``corrupt(images[i], ..., seed=(seed, ids[i]))`` for each i.

    Args:
      images: float ``[N, H, W, C]`` in [0, 1].
      name: as for :func:`corrupt`.
      severity: as for :func:`corrupt`.
      seed: an int or a tuple of ints, none negative.
      ids: ``[N]`` integers, the examples' ids.

    Returns:
      float32 ``[N, H, W, C]``.

    Raises:
      ValueError: as :func:`corrupt`, or ``ids`` is not as long as ``images``.
      TypeError: as :func:`corrupt`.
    """
    check_name(name, severity)
    images = _check_images(images, 4)
    if len(ids) != len(images):
        raise ValueError(
            f"Every image needs one id, but there are {len(images)} images and {len(ids)} ids."
        )
    prefix = _entropy(seed)
    out = np.empty(images.shape, np.float32)
    for row, (image, example) in enumerate(zip(images, ids, strict=True)):
        out[row] = _apply(image, name, int(severity), (*prefix, *_entropy(int(example))))
    return out

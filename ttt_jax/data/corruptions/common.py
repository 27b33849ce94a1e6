"""What the corruption families share: which constants apply at a size, and image helpers.

Sizes. The benchmark publishes two sets of constants, one drawn for 32 pixels
(``make_cifar_c.py``) and one for 224 (``make_imagenet_c.py``, both in
github.com/hendrycks/robustness). ``Scale`` picks the set and says how far lengths stretch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from ttt_jax import _extras

T = TypeVar("T")

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of R, G, B in a gray value (ITU-R BT.601, what OpenCV and Pillow use)."""


class Scale(NamedTuple):
    """Which constants an image gets and how its lengths relate to the published ones.

    Attributes:
      small: True for the 32-pixel set, False for the 224-pixel set.
      ratio: shorter side over 32 or 224; lengths that are relative to the picture follow it.
      extent: pixels per published pixel for blurs and streaks. It equals ``ratio``, except
        below 32 pixels, where it is ``sqrt(ratio)``: strokes and edges stay one or two pixels
        wide however small the picture, and a blur of a quarter of a pixel would do nothing.
    """

    small: bool
    ratio: float
    extent: float

    @property
    def reference(self) -> int:
        """The side, in pixels, that the constants were published for."""
        return 32 if self.small else 224

    def pick(self, small: Sequence[T], large: Sequence[T], severity: int) -> T:
        """The constants of ``severity`` (1 to 5) from the set in force."""
        return (small if self.small else large)[severity - 1]


Corruption: TypeAlias = Callable[[np.ndarray, int, np.random.Generator, Scale], np.ndarray]
"""``(image float64 [H, W, C] in [0, 1], severity, generator, scale) -> image``, unclipped."""


def scale_of(height: int, width: int) -> Scale:
    """The scale of an image of ``height`` x ``width`` pixels."""
    size = min(height, width)
    small = size <= 64
    ratio = size / (32 if small else 224)
    return Scale(small, ratio, math.sqrt(ratio) if small and ratio < 1 else ratio)


def quantize(image: np.ndarray) -> np.ndarray:
    """Clips to [0, 1] and drops to 8 bits as the published scripts do: by truncation.

    Args:
      image: float ``[H, W, C]``.

    Returns:
      float32 ``[H, W, C]``, every value k / 255.
    """
    # The small term keeps k / 255 * 255 from falling to k - 1 by a rounding error.
    return np.floor(np.clip(image, 0, 1) * 255 + 1e-3).astype(np.float32) / np.float32(255)


def to_bytes(image: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, C]`` of an image in [0, 1], rounded to nearest."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def gray(image: np.ndarray) -> np.ndarray:
    """``[H, W, 1]`` luminance of an ``[H, W, C]`` image, C = 1 or 3."""
    return image if image.shape[-1] == 1 else (image @ LUMA)[..., None]


def tinted(mask: np.ndarray, color: Sequence[float], channels: int) -> np.ndarray:
    """``mask [H, W]`` times an RGB color, or times its luminance for one channel."""
    rgb = np.asarray(color, dtype=np.float64)
    tint = rgb if channels == 3 else (rgb @ LUMA)[None]
    return mask[..., None] * tint


def smooth(image: np.ndarray, sigma: float, truncate: float = 4.0, mode: str = "nearest"):
    """Gaussian filter over the two spatial axes; border and cut-off as in scikit-image.

    Args:
      image: ``[H, W]`` or ``[H, W, C]``.
      sigma: standard deviation in pixels; 0 returns the image.
      truncate: cut-off in standard deviations.
      mode: a border rule of ``scipy.ndimage``.

    Returns:
      float64, same shape.
    """
    ndimage = _extras.load("scipy.ndimage", "data")

    widths = (sigma, sigma) + (0,) * (image.ndim - 2)
    return ndimage.gaussian_filter(image, widths, mode=mode, truncate=truncate)


@functools.lru_cache(maxsize=64)
def zoom_matrices(size: int, factors: tuple[float, ...]) -> np.ndarray:
    """Central zoom of one axis as matrices, ``[len(factors), size, size]``, read-only.

    ``scipy.ndimage.zoom`` with ``order=1`` is linear and separable, so zooming the identity
    gives the very weights it would use, and many zooms become one batched product.
    """
    ndimage = _extras.load("scipy.ndimage", "data")

    out = np.empty((len(factors), size, size))
    for k, factor in enumerate(factors):
        kept = math.ceil(size / factor)
        start = (size - kept) // 2
        columns = np.eye(size)[start : start + kept]
        zoomed = ndimage.zoom(columns, (factor, 1), order=1)
        trim = (zoomed.shape[0] - size) // 2
        out[k] = zoomed[trim : trim + size]
    out.flags.writeable = False
    return out


def motion(image: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """Motion blur as ImageMagick defines it: a one-sided Gaussian along a line of pixels.

    The kernel has ``2 * ceil(radius) + 1`` taps ``exp(-i**2 / (2 * sigma**2))``; tap i reads
    the pixel nearest to i steps along the angle, and borders repeat (ImageMagick 7,
    ``MotionBlurImage``).

    Args:
      image: ``[H, W, C]``.
      radius: in pixels.
      sigma: in pixels, positive.
      degrees: direction.

    Returns:
      float64 ``[H, W, C]``.
    """
    taps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(taps**2) / (2.0 * sigma**2))
    weights /= weights.sum()
    # Taps below an eighth of a gray level in total cannot show in 8 bits.
    keep = np.cumsum(weights[::-1])[::-1] > 1 / 2048
    taps, weights = taps[keep], weights[keep]
    angle = math.radians(degrees)
    right = np.ceil(taps * math.cos(angle) - 0.5).astype(int)
    down = np.ceil(taps * math.sin(angle) - 0.5).astype(int)
    height, width = image.shape[:2]
    reach = int(max(np.abs(right).max(), np.abs(down).max(), 1))
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    out = np.zeros(image.shape)
    for weight, x, y in zip(weights / weights.sum(), right + reach, down + reach, strict=True):
        out += weight * padded[y : y + height, x : x + width]
    return out


def plasma(size: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A cloud-like height map: the diamond-square algorithm on a torus.

    Args:
      size: side in pixels, a power of two.
      decay: factor by which the random displacement's range shrinks from one level to the
        next finer one; larger is smoother.
      rng: source of randomness.

    Returns:
      float64 ``[size, size]`` with minimum 0 and maximum 1.
    """
    field = np.zeros((size, size))
    step, wobble = size, 100.0

    def jitter(total: np.ndarray) -> np.ndarray:
        # The published range is wobble squared: it multiplies a draw that already has it.
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        total = corners + np.roll(corners, -1, 0)
        field[half::step, half::step] = jitter(total + np.roll(total, -1, 1))
        middles = field[half::step, half::step]
        across = middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        field[::step, half::step] = jitter(across)
        along = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        field[half::step, ::step] = jitter(along)
        step, wobble = half, wobble / decay
    field -= field.min()
    return field / field.max()


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()

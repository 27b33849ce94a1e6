"""Blur: gaussian, defocus, frosted glass, motion and zoom."""

import functools
import math

import numpy as np

from ttt_jax import _extras
from ttt_jax.data.corruptions.common import Scale, motion, smooth, to_bytes, zoom_matrices


def gaussian_blur(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """A Gaussian filter; the constant is its standard deviation in published pixels."""
    sigma = scale.pick((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6), severity)
    return smooth(image, sigma * scale.extent)


def _disk(radius: float, alias: float, extent: float) -> np.ndarray:
    """The published kernel: a disk of pixels, then a Gaussian of 3 or 5 taps over it."""
    ndimage = _extras.load("scipy.ndimage", "data")

    # The published grid reaches at least 8 pixels; the Gaussian's border rule sees its edge.
    reach = 8 if radius <= 8 else math.ceil(radius)
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line[None, :] ** 2 <= radius**2).astype(np.float64)
    half = max(1, round(extent)) * (1 if radius <= 8 else 2)
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * alias**2))
    taps /= taps.sum()
    disk /= disk.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, taps, axis=axis, mode="mirror")
    # Not normalized again: where the disk touches the border, mirroring adds up to 1 % of
    # light, and the published images have it.
    return disk


def _shrunk(kernel: np.ndarray, extent: float) -> np.ndarray:
    """A kernel on pixels of size ``extent < 1`` gathered, by overlap, onto whole pixels."""
    reach = kernel.shape[0] // 2
    cells = np.arange(-reach, reach + 1)
    low = np.maximum((cells[None, :] - 0.5) * extent, cells[:, None] - 0.5)
    high = np.minimum((cells[None, :] + 0.5) * extent, cells[:, None] + 0.5)
    overlap = np.maximum(high - low, 0) / extent
    return overlap @ kernel @ overlap.T


@functools.lru_cache(maxsize=64)
def defocus_kernel(radius: float, alias: float, extent: float) -> np.ndarray:
    """The lens blur of ``defocus_blur``: odd-sided, sums to about 1, empty borders trimmed."""
    if extent < 1:
        kernel = _shrunk(_disk(radius, alias, 1.0), extent)
    else:
        kernel = _disk(radius * extent, alias * extent, extent)
    reach = kernel.shape[0] // 2
    rows = np.flatnonzero(kernel.max(1) > 1e-7)
    trim = min(rows[0], 2 * reach - rows[-1])
    return kernel[trim : 2 * reach + 1 - trim, trim : 2 * reach + 1 - trim]


def defocus_blur(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """A disk-shaped lens blur; constants are its radius and its anti-aliasing width."""
    ndimage = _extras.load("scipy.ndimage", "data")
    signal = _extras.load("scipy.signal", "data")

    radius, alias = scale.pick(
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        severity,
    )
    kernel = defocus_kernel(radius, alias, scale.extent)[..., None]
    if kernel.shape[0] <= 5:
        return ndimage.correlate(image, kernel, mode="mirror")
    pad = kernel.shape[0] // 2
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    return signal.oaconvolve(padded, kernel, mode="valid", axes=(0, 1))


def glass_blur(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Frosted glass: blur, let pixels take the place of near ones, blur again.

    The published loop means to swap two pixels, but assigns through views, so that the first
    of the two is overwritten and the second keeps its value. The published images show that,
    and so do these.
    """
    sigma, delta, rounds = scale.pick(
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        severity,
    )
    sigma, delta = sigma * scale.extent, max(1, round(delta * scale.extent))
    height, width, channels = image.shape
    rows, cols = np.arange(height - delta, delta, -1), np.arange(width - delta, delta, -1)
    targets = (rows[:, None] * width + cols[None, :]).ravel()
    # Later moves read what earlier ones left, so the loop runs over a list of positions:
    # the pixels themselves are gathered once at the end.
    source = list(range(height * width))
    for _ in range(rounds):
        shift = rng.integers(-delta, delta, size=(len(targets), 2))
        others = targets + shift[:, 1] * width + shift[:, 0]
        for here, there in zip(targets.tolist(), others.tolist(), strict=True):
            source[here] = source[there]
    # The two casts to 8 bits inside the published loop truncate as well.
    soft = np.floor(np.clip(smooth(image, sigma), 0, 1) * 255 + 1e-3) / 255
    moved = soft.reshape(-1, channels)[source].reshape(image.shape)
    return smooth(moved, sigma)


def motion_blur(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """A streak along a random direction within 45 degrees of horizontal.

    Constants are ImageMagick's radius and sigma, in published pixels.
    """
    radius, sigma = scale.pick(
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        severity,
    )
    angle = rng.uniform(-45, 45)
    return to_bytes(motion(image, radius * scale.extent, sigma * scale.extent, angle)) / 255


# Kept as the published expressions: the rounding of ``arange`` decides how many zooms there are.
_SMALL_ZOOMS = tuple(tuple(np.arange(1, stop, 0.01)) for stop in (1.06, 1.11, 1.16, 1.21, 1.26))
_LARGE_ZOOMS = tuple(
    tuple(np.arange(1, stop, step))
    for stop, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
)


def zoom_blur(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """The mean of the image and of its central zooms; zoom factors need no scaling."""
    factors = scale.pick(_SMALL_ZOOMS, _LARGE_ZOOMS, severity)
    down = zoom_matrices(image.shape[0], factors)
    right = zoom_matrices(image.shape[1], factors)
    total = image.copy()
    for channel in range(image.shape[2]):
        total[..., channel] += (down @ image[..., channel] @ right.transpose(0, 2, 1)).sum(0)
    return total / (len(factors) + 1)

"""Spatter: drops of water (severities 1 to 3) or of mud (4 and 5) on the lens.

The published script leans on OpenCV for an edge detector, a distance transform and a
histogram equalization; the few lines each of them needs here are written out below.
"""

import numpy as np

from ttt_jax import _extras
from ttt_jax.data.corruptions.common import Scale, smooth, tinted

_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
_MUD = (63 / 255, 42 / 255, 20 / 255)
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float64)


def canny(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Canny edges: Sobel gradients, non-maximum suppression, hysteresis.

    Args:
      image: ``[H, W]``, 0 to 255.
      low: gradient magnitude (sum of absolute components) from which a pixel may be an edge.
      high: magnitude from which it starts one.

    Returns:
      bool ``[H, W]``.
    """
    ndimage = _extras.load("scipy.ndimage", "data")

    height, width = image.shape
    right = ndimage.sobel(image, axis=1, mode="nearest")
    down = ndimage.sobel(image, axis=0, mode="nearest")
    size = np.abs(right) + np.abs(down)
    padded = np.pad(size, 1)

    def neighbor(y: int, x: int) -> np.ndarray:
        return padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    tangent = np.abs(down) / np.maximum(np.abs(right), 1e-12)
    flat, steep = tangent < np.tan(np.pi / 8), tangent > np.tan(3 * np.pi / 8)
    falling = right * down >= 0
    before = np.where(
        flat,
        neighbor(0, -1),
        np.where(steep, neighbor(-1, 0), np.where(falling, neighbor(-1, -1), neighbor(-1, 1))),
    )
    after = np.where(
        flat,
        neighbor(0, 1),
        np.where(steep, neighbor(1, 0), np.where(falling, neighbor(1, 1), neighbor(1, -1))),
    )
    ridge = (size > low) & (size > before) & (size >= after)
    groups, count = ndimage.label(ridge, structure=np.ones((3, 3)))
    strong = np.zeros(count + 1, dtype=bool)
    strong[np.unique(groups[ridge & (size > high)])] = True
    strong[0] = False
    return strong[groups]


def equalize(image: np.ndarray) -> np.ndarray:
    """Histogram equalization of a uint8 ``[H, W]`` image; one of a single value stays."""
    counts = np.bincount(image.ravel(), minlength=256)
    first = int(np.flatnonzero(counts)[0])
    rest = image.size - counts[first]
    if rest == 0:
        return image
    counts[: first + 1] = 0
    return np.rint(np.cumsum(counts) * (255.0 / rest)).astype(np.uint8)[image]


def _water(liquid: np.ndarray, amount: float) -> np.ndarray:
    """How much light each pixel of a layer of drops adds, ``[H, W]``."""
    ndimage = _extras.load("scipy.ndimage", "data")

    drops = np.floor(liquid * 255)
    edges = canny(drops, 50, 150)
    if edges.any():
        distance = np.minimum(ndimage.distance_transform_edt(~edges), 20)
    else:
        distance = np.full(drops.shape, 20.0)
    distance = np.floor(ndimage.uniform_filter(distance, 3, mode="mirror")).astype(np.uint8)
    relief = ndimage.correlate(equalize(distance).astype(np.float64), _EMBOSS, mode="mirror")
    relief = np.rint(ndimage.uniform_filter(np.clip(relief, 0, 255), 3, mode="mirror"))
    light = drops * relief
    return light / max(light.max(), 1e-12) * amount


def _resized(layer: np.ndarray, height: int, width: int) -> np.ndarray:
    pillow = _extras.load("PIL.Image", "data")

    if layer.shape == (height, width):
        return layer
    picture = pillow.fromarray(layer.astype(np.float32))
    return np.asarray(picture.resize((width, height), pillow.Resampling.BILINEAR), np.float64)


def spatter(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Drops on the lens; the share of the picture they cover grows with severity.

    Constants: mean, deviation and smoothing of the liquid layer, its threshold, and the
    light added by water or the softness of mud. A threshold on smoothed noise does not scale
    with the picture, so the layer is drawn at the published size and resized.
    """
    mean, deviation, sigma, threshold, amount, mud = scale.pick(
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        severity,
    )
    height, width, channels = image.shape
    canvas = (round(height / scale.ratio), round(width / scale.ratio))
    liquid = smooth(rng.normal(mean, deviation, size=canvas), sigma)
    if not mud:
        liquid = np.clip(np.where(liquid < threshold, 0, liquid), 0, 1)
        light = _resized(_water(liquid, amount), height, width)
        return image + tinted(light, _WATER, channels)
    cover = smooth((liquid > threshold).astype(np.float64), amount)
    cover = _resized(np.where(cover < 0.8, 0, cover), height, width)
    return image * (1 - cover[..., None]) + tinted(cover, _MUD, channels)

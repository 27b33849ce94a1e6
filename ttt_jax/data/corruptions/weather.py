"""Weather: snow, frost and fog; spatter has its own file."""

import functools

import numpy as np

from ttt_jax.data.corruptions.common import (
    Scale,
    gray,
    motion,
    plasma,
    power_of_two,
    smooth,
    tinted,
    to_bytes,
    zoom_matrices,
)


def snow(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Falling flakes, streaked by the wind, over a whitened picture.

    Constants: mean and deviation of the flake noise, flake size (a zoom), threshold, radius
    and sigma of the streak, and the share of the picture that is not whitened.
    """
    mean, deviation, zoom, threshold, radius, sigma, keep = scale.pick(
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        severity,
    )
    flakes = rng.normal(mean, deviation, size=image.shape[:2])
    factor = max(1.0, zoom * scale.extent)
    down, right = (zoom_matrices(side, (factor,))[0] for side in image.shape[:2])
    flakes = down @ flakes @ right.T
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = np.floor(flakes * 255)[..., None] / 255
    angle = rng.uniform(-135, -45)
    flakes = to_bytes(motion(flakes, radius * scale.extent, sigma * scale.extent, angle)) / 255
    whitened = np.maximum(image, gray(image) * 1.5 + 0.5)
    return keep * image + (1 - keep) * whitened + flakes + np.rot90(flakes, 2)


_FROST_TEXTURES = 5
_FROST_TINTS = (
    (0.90, 0.96, 1.00),
    (0.80, 0.90, 1.00),
    (0.97, 0.98, 1.00),
    (0.72, 0.86, 1.00),
    (0.88, 0.93, 0.97),
)


@functools.lru_cache(maxsize=32)
def ice(index: int, side: int, grain: float) -> np.ndarray:
    """One gray ice texture: ridged plasma under a felt of needle crystals, read-only.

    Args:
      index: which of the five textures.
      side: side in pixels.
      grain: length of a needle in pixels.

    Returns:
      float64 ``[side, side]`` in [0, 1] with mean about 0.5.
    """
    rng = np.random.Generator(np.random.Philox([20190328, index, side]))
    relief = plasma(power_of_two(side), 1.8, rng)[:side, :side]
    ridges = 1 - np.abs(2 * plasma(power_of_two(side), 2.2, rng)[:side, :side] - 1)
    needles = np.zeros((side, side))
    for angle in rng.uniform(0, 180, size=4):
        seeds = (rng.random((side, side)) < 0.04).astype(np.float64)[..., None]
        streaks = motion(seeds, grain, grain / 2, angle)[..., 0]
        needles = np.maximum(needles, streaks / streaks.max())
    # Crystals grow in patches: the relief decides where.
    patches = smooth(relief, grain / 4)
    texture = 0.25 * relief + 0.35 * ridges**2 + needles * (0.3 + patches)
    low, high = np.quantile(texture, (0.01, 0.99))
    texture = np.clip((texture - low) / (high - low), 0, 1)
    # A power that puts the median at one half, whatever the draw.
    texture **= np.log(0.5) / np.log(np.clip(np.median(texture), 0.05, 0.95))
    texture.flags.writeable = False
    return texture


def frost(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Ice over the picture, ``a * image + b * ice``, with the published a and b.

    The published files overlay random crops of five photographs of frosted windows, which
    cannot be shipped. **Here the ice is procedural**: five fixed textures of ridged noise and
    needle crystals with bluish tints, from which a random crop, flip and transpose is drawn.
    The blend and its severities are the published ones; the pixels of the overlay are not, so
    figures on this corruption are comparable among themselves, not with published ones.
    """
    keep, amount = scale.pick(
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        severity,
    )
    height, width, channels = image.shape
    longer = max(height, width)
    index = int(rng.integers(_FROST_TEXTURES))
    texture = ice(index, max(2 * longer, 64), max(2.0, 0.12 * scale.ratio * scale.reference))
    top, left = rng.integers(0, texture.shape[0] - longer + 1, size=2)
    crop = texture[top : top + longer, left : left + longer]
    flip_rows, flip_cols, transpose = rng.integers(0, 2, size=3)
    crop = crop[:: 1 - 2 * flip_rows, :: 1 - 2 * flip_cols]
    crop = (crop.T if transpose else crop)[:height, :width]
    return keep * image + amount * tinted(crop, _FROST_TINTS[index], channels)


def fog(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Adds a plasma cloud and renormalizes; constants are its weight and its roughness.

    The cloud is as large as the next power of two, so its patches keep their size relative
    to the picture.
    """
    weight, decay = scale.pick(
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        severity,
    )
    height, width = image.shape[:2]
    cloud = plasma(power_of_two(max(height, width)), decay, rng)[:height, :width, None]
    brightest = image.max()
    return (image + weight * cloud) * brightest / (brightest + weight)

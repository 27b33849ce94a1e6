"""Digital: brightness, contrast, saturation, elastic warp, pixelation and JPEG."""

import io

import numpy as np

from ttt_jax import _extras
from ttt_jax.data.corruptions.common import LUMA, Scale, smooth, to_bytes


def brightness(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Adds the constant to the value V of HSV (the largest channel), hue and S kept."""
    added = scale.pick((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5), severity)
    value = image.max(-1, keepdims=True)
    brighter = np.minimum(value + added, 1)
    # Black has no hue: it turns gray. Elsewhere all channels grow in proportion.
    return np.where(value > 0, image * (brighter / np.where(value > 0, value, 1)), brighter)


def contrast(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Pulls every channel towards its mean; the constant is the contrast that is left."""
    left = scale.pick((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), severity)
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * left + mean


def saturate(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Maps the saturation S of HSV to ``a * S + b``.

    A gray pixel counts as hue 0, so severities 4 and 5 tint it red, as published; a
    one-channel image gets the luminance of that result, and severities 1 to 3 leave it alone.
    """
    factor, offset = scale.pick(
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        severity,
    )
    rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    value = rgb.max(-1, keepdims=True)
    depth = value - rgb
    spread = depth.max(-1, keepdims=True)
    colored = spread > 0
    # Every channel is V * (1 - S * k) with k in [0, 1] a function of the hue alone.
    position = np.where(colored, depth / np.where(colored, spread, 1), np.array([0.0, 1.0, 1.0]))
    saturation = spread / np.where(value > 0, value, 1)
    out = value * (1 - np.clip(saturation * factor + offset, 0, 1) * position)
    return out if image.shape[-1] == 3 else (out @ LUMA)[..., None]


def _sample(image: np.ndarray, rows: np.ndarray, cols: np.ndarray, mode: str) -> np.ndarray:
    ndimage = _extras.load("scipy.ndimage", "data")

    out = np.empty((*rows.shape, image.shape[2]))
    for channel in range(image.shape[2]):
        ndimage.map_coordinates(
            image[..., channel], [rows, cols], order=1, mode=mode, output=out[..., channel]
        )
    return out


def elastic_transform(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """A random affine map, then a smooth random displacement of every pixel.

    Constants, as shares of the side: strength and smoothness of the displacement, range of
    the three affine anchor points. The published 224-pixel set counts 244 pixels a side.
    """
    strength, sigma, jitter = scale.pick(
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        severity,
    )
    height, width = image.shape[:2]
    side = scale.ratio * (32 if scale.small else 244)
    arm = min(height, width) // 3
    arms = np.array([[arm, arm], [arm, -arm], [-arm, -arm]], dtype=np.float64)
    anchors = np.array([width // 2, height // 2]) + arms  # (x, y)
    moved = anchors + rng.uniform(-jitter * side, jitter * side, size=anchors.shape)
    # The map from the warped picture back to this one, which is what sampling needs.
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), anchors)
    rows, cols = np.mgrid[:height, :width].astype(np.float64)
    warped = _sample(
        image,
        cols * back[0, 1] + rows * back[1, 1] + back[2, 1],
        cols * back[0, 0] + rows * back[1, 0] + back[2, 0],
        "mirror",
    )
    if strength == 0:
        return warped
    shift_x, shift_y = (
        strength * side * smooth(rng.uniform(-1, 1, rows.shape), sigma * side, 3.0, "reflect")
        for _ in range(2)
    )
    return _sample(warped, rows + shift_y, cols + shift_x, "reflect")


def _picture(image: np.ndarray):
    pillow = _extras.load("PIL.Image", "data")

    pixels = to_bytes(image)
    return pillow.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _pixels(picture, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(picture, dtype=np.float64).reshape(shape) / 255


def pixelate(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Shrinks the picture by the constant and grows it back, both with a box filter."""
    pillow = _extras.load("PIL.Image", "data")

    factor = scale.pick((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25), severity)
    height, width = image.shape[:2]
    box = pillow.Resampling.BOX
    coarse = _picture(image).resize((int(width * factor), int(height * factor)), box)
    return _pixels(coarse.resize((width, height), box), image.shape)


def jpeg_compression(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """A JPEG round trip; the constant is the quality. Blocks are 8 pixels at any size."""
    pillow = _extras.load("PIL.Image", "data")

    quality = scale.pick((80, 65, 58, 50, 40), (25, 18, 15, 10, 7), severity)
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    return _pixels(pillow.open(file), image.shape)

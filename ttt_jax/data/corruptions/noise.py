"""Noise: gaussian, shot, impulse and speckle. Each pixel value is hit by itself."""

import numpy as np

from ttt_jax.data.corruptions.common import Scale


def gaussian_noise(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Adds normal noise; the constant is its standard deviation."""
    sigma = scale.pick((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38), severity)
    return image + rng.normal(scale=sigma, size=image.shape)


def shot_noise(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Poisson noise; the constant is the photon count of a white pixel."""
    count = scale.pick((500, 250, 100, 75, 50), (60, 25, 12, 5, 3), severity)
    return rng.poisson(image * count) / count


def impulse_noise(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Salt and pepper, channel by channel; the constant is the share of values hit."""
    share = scale.pick((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27), severity)
    hit = rng.random(image.shape) < share
    salt = rng.random(image.shape) < 0.5
    return np.where(hit, salt.astype(image.dtype), image)


def speckle_noise(image: np.ndarray, severity: int, rng: np.random.Generator, scale: Scale):
    """Normal noise in proportion to the pixel value."""
    sigma = scale.pick((0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6), severity)
    return image + image * rng.normal(scale=sigma, size=image.shape)

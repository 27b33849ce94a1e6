"""The digits, written once for all tests of this folder, and small images."""

import numpy as np
import pytest

from ttt_jax import data


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="session")
def digits(tfds_dir):
    return data.load("tfds:digits", "test", data_dir=tfds_dir)


@pytest.fixture(scope="session")
def scene():
    """A function of the size: a colored scene with soft and hard edges, float64 ``[s, s, 3]``."""

    def make(size, channels=3):
        y, x = np.mgrid[:size, :size] / size
        red = 0.5 + 0.4 * np.sin(9 * x + 4 * y)
        green = np.where((x - 0.5) ** 2 + (y - 0.45) ** 2 < 0.09, 0.85, 0.25)
        blue = 0.2 + 0.6 * y
        return np.rint(np.stack([red, green, blue], -1)[..., :channels] * 255) / 255

    return make

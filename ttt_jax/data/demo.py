"""The blurred digits of the README, which ship with the package."""

import pathlib
from typing import NamedTuple

import numpy as np

_FILE = pathlib.Path(__file__).with_suffix(".npz")


class DemoDigits(NamedTuple):
    """Handwritten digits that a camera in motion has seen.

    Attributes:
      id: int64 ``[360]``, positions in the test split of ``tfds:digits``.
      image: float32 ``[360, 8, 8, 1]`` in [0, 1], under motion blur of severity 5.
      label: int32 ``[360]``.
      clean: the images before the blur.
    """

    id: np.ndarray
    image: np.ndarray
    label: np.ndarray
    clean: np.ndarray


def demo() -> DemoDigits:
    """The 360 test digits of scikit-learn's set under motion blur; no file is read but our own.

    The model of :func:`ttt_jax.models.demo` was trained on none of them, and no setting of the
    README's example was chosen on them.
    """
    with np.load(_FILE) as stored:
        image, clean = (stored[name].astype(np.float32) / 255 for name in ("image", "clean"))
        label = stored["label"].astype(np.int32)
    return DemoDigits(np.arange(len(label)), image, label, clean)

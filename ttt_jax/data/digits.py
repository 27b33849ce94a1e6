"""scikit-learn's handwritten digits as a TFDS set: the default set, no download.

1797 images of 8 x 8 pixels with 17 gray levels (the UCI "Optical Recognition of Handwritten
Digits" test set, Alpaydin and Kaynak 1998, shipped inside scikit-learn).
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from ttt_jax import _extras
from ttt_jax.data._folders import has_data

tfds: Any = _extras.load("tensorflow_datasets", "data")

NUM_TRAIN = 1437
NUM_TEST = 360
_SPLIT_SEED = 0


def split_indices() -> tuple[np.ndarray, np.ndarray]:
    """Which images of ``sklearn.datasets.load_digits()`` are in train and in test.

    A stratified draw, fixed for good: each class gives test a share of 360 / 1797 of its images
    (rounded so that they sum to 360), drawn and then mixed with NumPy's ``Philox`` generator
    under a fixed seed. The file's own order is by writer, and so is not used.

    Returns:
      int64 ``[1437]`` and ``[360]``, in the order in which they are stored.
    """
    datasets = _extras.load("sklearn.datasets", "data")

    labels = datasets.load_digits().target
    rng = np.random.Generator(np.random.Philox(_SPLIT_SEED))
    counts = np.bincount(labels)
    exact = counts * (NUM_TEST / len(labels))
    shares = np.floor(exact).astype(int)
    # Largest remainders take the places that rounding down left over.
    shares[np.argsort(shares - exact, kind="stable")[: NUM_TEST - shares.sum()]] += 1
    train, test = [], []
    for label, share in enumerate(shares):
        members = rng.permutation(np.flatnonzero(labels == label))
        test.append(members[:share])
        train.append(members[share:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder: ``image`` uint8 ``[8, 8, 1]`` (0 to 255) and ``label`` 0 to 9."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "1437 train and 360 test images."}  # noqa: RUF012

    def _info(self) -> Any:
        return self.dataset_info_from_configs(
            description="Handwritten digits, 8 x 8 pixels, from scikit-learn.",
            # A plain tensor: encoding features.Image from an array would need TensorFlow.
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        train, test = split_indices()
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, indices: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        datasets = _extras.load("sklearn.datasets", "data")

        bunch = datasets.load_digits()
        images = np.rint(bunch.images * 255 / 16).astype(np.uint8)[..., None]
        for position, index in enumerate(indices):
            yield position, {"image": images[index], "label": int(bunch.target[index])}


def prepare(data_dir: str | None = None) -> Any:
    """The builder of the prepared set; writes it first where it is missing.

    The set is written beside its place and moved there by one rename, so several processes may
    do this at once: one of them wins, and all read what it wrote.

    Args:
      data_dir: the TFDS data directory; None is TFDS's default.

    Returns:
      A builder whose data exist, in array_record format.

    Raises:
      OSError: the directory cannot be written.
    """
    builder = Digits(data_dir=data_dir, file_format="array_record")
    if has_data(builder):
        return builder
    final = os.fspath(builder.data_dir)
    parent = os.path.dirname(final)
    os.makedirs(parent, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix="preparing-", dir=parent)
    try:
        fresh = Digits(data_dir=scratch, file_format="array_record")
        # TFDS reports every step on stdout and stderr; a second's work needs no report.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            fresh.download_and_prepare()
        try:
            os.rename(fresh.data_dir, final)
        except OSError:
            if not has_data(builder):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Digits(data_dir=data_dir, file_format="array_record")

"""Sets in one ``.npz`` file: plain arrays, or JPEG files packed behind a shared header."""

import io
import itertools
import os
import zipfile
import zlib

import numpy as np

from ttt_jax import _extras


class ArrayReader:
    """Images held as one array, uint8 or float32 in [0, 1], ``[N, H, W, C]``."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: tuple[str, ...] | None,
        ids: np.ndarray,
        title: str | None = None,
    ):
        self._images, self._labels, self._ids = images, labels, ids
        self.class_names, self.title = class_names, title
        self.num_classes = len(class_names) if class_names else int(labels.max(initial=-1)) + 1
        self.image_shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, position: int) -> np.ndarray:
        """The stored image at ``position``."""
        return self._images[position]

    def labels(self) -> np.ndarray:
        """int32 ``[N]``."""
        return self._labels

    def ids(self) -> np.ndarray:
        """int64 ``[N]``."""
        return self._ids


def open_file(path: str) -> ArrayReader:
    """Reads and checks a file; see :func:`ttt_jax.data.load` for its arrays and errors."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file {path!r}; an npz set is named 'npz:PATH'.")
    try:
        # An open file of our own: np.load leaves its own one open when the archive is damaged.
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds one bare array; save it with np.savez")
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path!r} is not a readable npz file: {error}") from error

    packed = {"header", "data", "offsets", "labels"} <= arrays.keys()
    if not packed and not {"images", "labels"} <= arrays.keys():
        raise ValueError(
            f"{path!r} needs the arrays images and labels (or header, data, offsets and labels), "
            f"but holds {', '.join(arrays) or 'none'}."
        )
    images = _unpack(arrays, path) if packed else _check_images(arrays["images"], path)
    names = arrays.get("class_names")
    class_names = None if names is None else tuple(str(name) for name in names)
    labels = _check_labels(arrays["labels"], len(images), class_names, path)
    ids = _check_ids(arrays.get("ids"), len(images), path)
    title = str(arrays["title"]) if "title" in arrays else None
    return ArrayReader(images, labels, class_names, ids, title)


def classes(path: str) -> tuple[int, tuple[str, ...] | None]:
    """How many classes a file shows, and their names if it has them; no image is read.

    Raises:
      ValueError: it is no npz file with labels.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            labels = archive["labels"]
            names = archive["class_names"] if "class_names" in archive else None
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path!r} is not a readable npz file with labels: {error}") from error
    if names is not None:
        return len(names), tuple(str(name) for name in names)
    return int(labels.max(initial=-1)) + 1, None


def _check_images(images: np.ndarray, path: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"images must be [N, H, W, C] or [N, H, W], but {path!r} has the shape {images.shape}."
        )
    rows, columns, channels = images.shape[1:]
    if channels > 4 and (rows == 3 < columns or (rows == 1 and columns == channels)):
        raise ValueError(
            f"images must have their channels last, [N, H, W, C], but {path!r} has the shape "
            f"{images.shape}, which is [N, C, H, W]: store images.transpose(0, 2, 3, 1)."
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be uint8 or floating point; {path!r} has {images.dtype}.")
    images = images.astype(np.float32)
    finite = np.isfinite(images).all((1, 2, 3))
    if not finite.all():
        raise ValueError(
            f"Pixels must be finite, but image {int(np.argmin(finite))} of {path!r} has NaN or "
            f"infinity ({int((~finite).sum())} such images in all)."
        )
    if images.size and (images.min() < 0 or images.max() > 1):
        raise ValueError(
            f"Float pixels must lie in [0, 1], but those of {path!r} run from {images.min():.4g} "
            f"to {images.max():.4g}; store the images before normalization."
        )
    return images


def _unpack(arrays: dict[str, np.ndarray], path: str) -> np.ndarray:
    pillow = _extras.load("PIL.Image", "data")

    header, data = arrays["header"].tobytes(), arrays["data"].tobytes()
    offsets = arrays["offsets"].astype(np.int64)
    if offsets.ndim != 1 or not len(offsets) or (np.diff(offsets, prepend=0) < 0).any():
        raise ValueError(f"offsets must be one rising row [N + 1], but those of {path!r} are not.")
    if offsets[-1] != len(data):
        raise ValueError(
            f"offsets must end at the length of data, but in {path!r} they end at {offsets[-1]} "
            f"and data has {len(data)} bytes; the file is cut short."
        )
    images = []
    for row, (start, stop) in enumerate(itertools.pairwise(offsets)):
        try:
            with pillow.open(io.BytesIO(header + data[start:stop])) as picture:
                images.append(np.asarray(picture.convert("RGB")))
        except OSError as error:
            raise ValueError(f"Image {row} of {path!r} is not a readable JPEG: {error}") from error
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)


def _check_labels(
    labels: np.ndarray, count: int, names: tuple[str, ...] | None, path: str
) -> np.ndarray:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be one integer for each image, but {path!r} has {labels.dtype} of "
            f"shape {labels.shape}."
        )
    if len(labels) != count:
        raise ValueError(
            f"Every image needs one label, but {path!r} has {count} images and {len(labels)} "
            "labels."
        )
    limit = len(names) if names else np.iinfo(np.int32).max
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"Labels count from 0 up to the number of classes, but label {first} of {path!r} is "
            f"{labels[first]}" + (f" and there are {limit} class names." if names else ".")
        )
    return labels.astype(np.int32)


def _check_ids(ids: np.ndarray | None, count: int, path: str) -> np.ndarray:
    if ids is None:
        return np.arange(count, dtype=np.int64)
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"ids must be one integer for each image, but {path!r} has {count} images and ids "
            f"of shape {ids.shape} and type {ids.dtype}."
        )
    ids = ids.astype(np.int64)
    if (ids < 0).any() or len(np.unique(ids)) != count:
        raise ValueError(f"ids must be distinct and not negative, but those of {path!r} are not.")
    return ids

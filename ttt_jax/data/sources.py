"""Sources: sets of labelled images with random access and ids that stay with their sample."""

import copy
import operator
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ttt_jax import _arguments
from ttt_jax.data import splits


class Example(NamedTuple):
    """One example: its id, its image (float32 ``[H, W, C]`` in [0, 1]) and its label."""

    id: int
    image: np.ndarray
    label: int


class Batch(NamedTuple):
    """Examples stacked, in plain NumPy.

    Attributes:
      id: int64 ``[N]``.
      image: float32 ``[N, H, W, C]`` in [0, 1].
      label: int32 ``[N]``.
    """

    id: np.ndarray
    image: np.ndarray
    label: np.ndarray


class Reader(Protocol):
    """What a kind of set provides; positions count from the start of the un-sliced split."""

    num_classes: int
    class_names: tuple[str, ...] | None
    image_shape: tuple[int | None, ...]

    def __len__(self) -> int:
        """Number of examples of the un-sliced split."""

    def image(self, position: int) -> np.ndarray:
        """The stored image ``[H, W, C]``: uint8, or floating point in [0, 1]."""

    def labels(self) -> np.ndarray:
        """int32 ``[N]``, without decoding images where that can be avoided."""

    def ids(self) -> np.ndarray:
        """int64 ``[N]``, distinct and not negative."""


class Source:
    """A split of a set. ``len(source)`` examples; ``source[i]`` is an :class:`Example`.

    Make one with :func:`load`. A source can be pickled, so loader workers may hold it.

    Attributes:
      name: the name it was loaded by, such as ``"tfds:digits"``.
      title: what results call it: the file's own ``title``, or the name.
      split: the split string it was loaded by, such as ``"test[:50%]"``.
      num_classes: number of classes.
      class_names: their names in label order, or None where the set has none.
      image_shape: ``(H, W, C)``; None where images differ in that extent.
    """

    @_arguments.checked(reader=_arguments.having("a reader", "image", "labels", "ids"))
    def __init__(self, name: str, split: str, reader: Reader):
        self.name = name
        self.title: str = getattr(reader, "title", None) or name
        self.split = split
        self._reader = reader
        self._start, self._stop = splits.bounds(splits.parse(split), len(reader))
        self._ids = reader.ids()[self._start : self._stop]
        self._labels: np.ndarray | None = None
        self._fingerprint: str | None = None
        self.num_classes = reader.num_classes
        self.class_names = reader.class_names
        self.image_shape = reader.image_shape

    def __len__(self) -> int:
        return self._stop - self._start

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {self.split!r}, {len(self)} x {self.image_shape})"

    def _position(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(
                f"Example {index} of {self.name}/{self.split} does not exist; indices run from 0 "
                f"to {len(self) - 1}."
            )
        return self._start + index

    def __getitem__(self, index: int) -> Example:
        position = self._position(index)
        image = _as_float(self._reader.image(position))
        return Example(int(self._ids[index]), image, int(self.labels()[index]))

    def labels(self) -> np.ndarray:
        """int32 ``[len(self)]``; read once, without decoding the images."""
        if self._labels is None:
            self._labels = self._reader.labels()[self._start : self._stop]
        return self._labels

    @property
    def ids(self) -> np.ndarray:
        """Positions in the un-sliced split, or the file's own ids; int64 ``[len(self)]``."""
        return self._ids

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples at ``indices``, stacked in that order.

        Raises:
          IndexError: an index is negative or too large.
          ValueError: a mask in place of indices, no index, or the images differ in shape.
        """
        indices = _positions(indices)
        if indices.size == 0:
            raise ValueError("A batch needs at least one index, but none was given.")
        images = [_as_float(self._reader.image(self._position(i))) for i in indices]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(
                f"The images of {self.name}/{self.split} have different shapes "
                f"({', '.join(map(str, sorted(shapes)[:3]))}) and cannot be stacked; resize them "
                "when the set is prepared."
            )
        return Batch(self._ids[indices], np.stack(images), self.labels()[indices])

    def arrays(self) -> Batch:
        """The whole split in memory."""
        return self.take(np.arange(len(self)))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Source":
        """Some examples as a source of its own, in the order of ``indices``, with their ids.

        Raises:
          IndexError: an index is negative or too large.
          ValueError: a mask in place of indices, no index, or one that comes twice.
        """
        positions = np.array([self._position(i) for i in _positions(indices)], np.int64)
        if len(positions) == 0 or len(np.unique(positions)) != len(positions):
            raise ValueError(
                f"A subset needs distinct indices, at least one; got {len(positions)}, of which "
                f"{len(np.unique(positions))} are distinct."
            )
        chosen = copy.copy(self)
        chosen._reader = _Chosen(self._reader, positions)
        chosen._start, chosen._stop = 0, len(positions)
        chosen._ids = self._ids[positions - self._start]
        chosen._labels = chosen._fingerprint = None
        return chosen

    def in_memory(self) -> "Source":
        """The same source with every stored image decoded once and held in memory."""
        held = copy.copy(self)
        held._reader = _Held(self._reader, self._start, self._stop)
        return held

    @property
    def fingerprint(self) -> str:
        """The crc32 over ids, labels and stored pixels, eight hex digits; computed on demand."""
        if self._fingerprint is None:
            crc = zlib.crc32(np.ascontiguousarray(self._ids, "<i8").tobytes())
            crc = zlib.crc32(np.ascontiguousarray(self.labels(), "<i4").tobytes(), crc)
            for position in range(self._start, self._stop):
                image = self._reader.image(position)
                crc = zlib.crc32(repr((image.shape, image.dtype.str)).encode(), crc)
                crc = zlib.crc32(np.ascontiguousarray(image).tobytes(), crc)
            self._fingerprint = f"{crc:08x}"
        return self._fingerprint


class _Chosen:
    """A reader of some positions of another."""

    def __init__(self, reader: Reader, positions: np.ndarray):
        self._reader, self._positions = reader, positions
        self.num_classes = reader.num_classes
        self.class_names = reader.class_names
        self.image_shape = reader.image_shape

    def __len__(self) -> int:
        return len(self._positions)

    def image(self, position: int) -> np.ndarray:
        return self._reader.image(int(self._positions[position]))

    def labels(self) -> np.ndarray:
        return self._reader.labels()[self._positions]

    def ids(self) -> np.ndarray:
        return self._reader.ids()[self._positions]


class _Held:
    """A reader whose images from ``start`` to ``stop`` were decoded ahead."""

    def __init__(self, reader: Reader, start: int, stop: int):
        self._reader, self._start = reader, start
        self._images = [reader.image(position) for position in range(start, stop)]
        self.num_classes = reader.num_classes
        self.class_names = reader.class_names
        self.image_shape = reader.image_shape

    def __len__(self) -> int:
        return len(self._reader)

    def image(self, position: int) -> np.ndarray:
        return self._images[position - self._start]

    def labels(self) -> np.ndarray:
        return self._reader.labels()

    def ids(self) -> np.ndarray:
        return self._reader.ids()


def _positions(indices: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(indices)
    if array.size and array.dtype.kind not in "iu":
        mask = array.dtype == bool
        raise ValueError(
            f"Examples are chosen by integer indices; got {array.dtype} of shape {array.shape}"
            f"{'. For a mask pass np.flatnonzero(mask).' if mask else ': count from 0.'}"
        )
    return array


def _as_float(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    return image.astype(np.float32)


@_arguments.checked()
def load(name: str, split: str, *, data_dir: str | None = None) -> Source:
    """Opens one split of a set.

    Args:
      name: ``"tfds:digits"`` (scikit-learn's digits, written into ``data_dir`` on first use;
        no download); ``"tfds:NAME"``, ``"tfds:NAME/CONFIG"`` or ``"tfds:NAME/VERSION"``, any
        TFDS set that was prepared as array_record, read without TensorFlow; or
        ``"npz:PATH"``: ``images`` (uint8, or float in [0, 1]) ``[N, H, W, C]`` or
        ``[N, H, W]`` and ``labels [N]``, or JPEG files packed as ``header``, ``data``,
        ``offsets [N + 1]`` and ``labels``; optionally ``class_names``, ``ids`` and ``title``.
      split: ``"test"``, ``"test[100:200]"``, ``"train[10%:]"``, ... For an ``npz`` file,
        which holds one split, the part before the bracket is a label of your choice; name it
        ``train`` or ``test`` truthfully, since what may be learned from test data depends on it.
      data_dir: where TFDS sets live; None is TFDS's default (``TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``). Not used by ``npz``.

    Returns:
      The source. ``id`` is the position in the un-sliced split (or the file's own ``ids``).

    Raises:
      ValueError: unknown kind, set or split; an empty split; lengths, labels, ids or pixel
        values that are wrong; a prepared set in a format without random access.
      FileNotFoundError: the file is missing, or the set is not prepared (with the command
        that prepares it).
    """
    kind, _, rest = name.partition(":") if isinstance(name, str) else ("", "", "")
    base = splits.parse(split).base
    if kind == "npz" and rest:
        from ttt_jax.data import npz

        return Source(name, split, npz.open_file(rest))
    if kind == "tfds" and rest:
        from ttt_jax.data import records

        return Source(name, split, records.open_set(rest, base, data_dir))
    raise ValueError(
        f"The name of a set is 'tfds:NAME' or 'npz:PATH', not {name!r}; for example 'tfds:digits'."
    )

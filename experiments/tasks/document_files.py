"""Documents of folders and JSON-lines files, as token ids, in batches of similar lengths."""

import json
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.task import Examples

# Of the files of one folder, by a checksum of their names: eight tenths train.
ROLES = {"train": range(8), "validation": range(8, 9), "reported": range(9, 10)}


class Vocabulary(NamedTuple):
    """Text to token ids and back.

    Attributes:
      encode: of a text.
      decode: of ids ``[K]``.
      sizes: int ``[V]``, UTF-8 bytes of each token.
      bos: the id before the first token; None where there is none, and so no score of the first.
    """

    encode: Callable[[str], Any]
    decode: Callable[[Any], str]
    sizes: np.ndarray
    bos: int | None


def in_bytes() -> Vocabulary:
    """256 tokens, a byte each; 0, which no text has, begins a document."""
    return Vocabulary(
        encode=lambda text: np.frombuffer(text.encode(), np.uint8),
        decode=lambda ids: bytes(np.asarray(ids, np.uint8)).decode(errors="replace"),
        sizes=np.ones(256, np.int64),
        bos=0,
    )


class Source(NamedTuple):
    """Where documents of one role lie: a folder of text files, or a JSON-lines file (also .xz)."""

    path: pathlib.Path
    pattern: str
    role: str | None = None

    @property
    def name(self) -> str:
        """That of the folder or file, without its endings."""
        return self.path.name.partition(".")[0]

    def files(self) -> list[pathlib.Path]:
        """The files, those of the role alone where one folder has all roles.

        Raises:
          ValueError: there is none.
        """
        paths = [self.path] if self.path.is_file() else sorted(self.path.glob(self.pattern))
        kept = [path for path in paths if path.is_file() and self._of_role(path)]
        if kept:
            return kept
        raise ValueError(
            f"Documents{f' of the role {self.role!r}' if self.role else ''} need a JSON-lines file "
            f"or a folder with files {self.pattern!r}; got {str(self.path)!r} without any. Name "
            "another one, or a folder with at least a few dozen files."
        )

    def texts(self) -> Iterator[tuple[str, str]]:
        """The name and the text of each document.

        Raises:
          ValueError: a line that is no object with a ``text``.
        """
        for path in self.files():
            if not path.name.endswith((".jsonl", ".jsonl.xz")):
                yield path.name, path.read_bytes().decode("utf-8", "replace")
                continue
            with (lzma.open if path.suffix == ".xz" else open)(
                path, "rt", encoding="utf-8"
            ) as file:
                for number, line in enumerate(file, 1):
                    record = json.loads(line)
                    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                        shown = sorted(record) if isinstance(record, dict) else record
                        raise ValueError(
                            f"Each line of {path} must be an object with a text 'text'; line "
                            f"{number} has {shown}."
                        )
                    name = record.get("title") or record.get("path") or f"line {number}"
                    yield str(name), record["text"]

    def checksum(self) -> int:
        """Of all files, whatever their folder."""
        total = 0
        for path in self.files():
            total = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), total))
        return total

    def _of_role(self, path: pathlib.Path) -> bool:
        return self.role is None or zlib.crc32(path.name.encode()) % 10 in ROLES[self.role]


class Document(NamedTuple):
    """Ids of one document, with the name of where it is from."""

    name: str
    ids: np.ndarray


def read(
    source: Source, vocabulary: Vocabulary, *, least: int, most: int | None, longest: int | None
) -> list[Document]:
    """The documents of a source.

    Args:
      source: where they lie.
      vocabulary: turns text into ids.
      least: documents of fewer tokens are left out.
      most: the first so many; None for all.
      longest: tokens of a document, at most; None for whole ones.

    Raises:
      ValueError: none is long enough.
    """
    documents: list[Document] = []
    for name, text in source.texts():
        if len(documents) == most:
            break
        ids = np.asarray(vocabulary.encode(text), np.int32)
        if len(ids) >= max(least, 1):
            documents.append(Document(name, ids[:longest]))
    if not documents:
        raise ValueError(
            f"Documents need data.least = {least} tokens; {str(source.path)!r} has no text that is "
            "so long. Lower data.least."
        )
    return documents


def batches(
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    *,
    chunk: int,
    size: int,
    first: int = 0,
) -> list[Examples]:
    """Batches of documents of similar lengths, the shortest first.

    A batch has as many chunks as its longest document, rounded up to two significant bits beside
    the first: few shapes, each of which is a compiled program.

    Args:
      documents: of one stream.
      vocabulary: of their ids.
      chunk: L, tokens of a chunk.
      size: documents of a batch, at most; batches differ by one at most.
      first: the id of the first document.

    Returns:
      Examples with ``x = {"tokens": int32 [N, T, L], "mask": bool [N, T, L]}``, and ``y`` of
      ``bytes``, those of the scored tokens, and ``name``, ``[N]`` each.
    """
    order = sorted(range(len(documents)), key=lambda index: (len(documents[index].ids), index))
    parts = np.array_split(np.asarray(order), -(-len(order) // size))
    made = []
    for part in parts:
        longest = max(-(-len(documents[index].ids) // chunk) for index in part)
        tokens = np.zeros((len(part), _rounded(longest) * chunk), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, index in enumerate(part):
            ids = documents[index].ids
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        shape = (len(part), -1, chunk)
        x = {"tokens": tokens.reshape(shape), "mask": mask.reshape(shape)}
        names = np.array([documents[index].name for index in part])
        y = {"bytes": bytes_of_chunks(x, vocabulary).sum(-1), "name": names}
        made.append(Examples(first + part, x, y, {}))
    return made


def bytes_of_chunks(x: Any, vocabulary: Vocabulary) -> np.ndarray:
    """UTF-8 bytes of the scored tokens of each chunk, ``[N, T]``."""
    sizes = np.where(x["mask"], vocabulary.sizes[x["tokens"]], 0)
    if vocabulary.bos is None:
        sizes[:, 0, 0] = 0
    return sizes.sum(-1)


def _rounded(count: int) -> int:
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step

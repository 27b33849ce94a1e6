"""Books as token ids of a vocabulary that is learned from the training books, in one file.

``write`` needs ``tokenizers``; what reads the file needs NumPy alone.
"""

import json
import lzma
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import launch

FILES = {
    "train": "books_train_small40",
    "validation": "books_val8_heldout_authors",
    "test": "books_test20_heldout_authors",
}
NEEDLE = " The number of the house is "
DIGITS = "0123456789"


class Texts(NamedTuple):
    """Token ids.

    Attributes:
      books: by role, a list of uint16 arrays.
      titles: by role.
      pieces: the bytes of each token.
      needle: ids of :data:`NEEDLE`, and of a full stop.
      digits: ids of the ten digits.
    """

    books: dict[str, list[np.ndarray]]
    titles: dict[str, list[str]]
    pieces: list[bytes]
    needle: tuple[np.ndarray, np.ndarray]
    digits: np.ndarray

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.pieces[token] for token in ids).decode("utf-8", "replace")


def _rows(folder: pathlib.Path, role: str) -> Iterator[tuple[str, str]]:
    path = folder / f"{FILES[role]}.jsonl.xz"
    if not path.exists():
        raise launch.UserError(f"{path} is not there; --texts names the folder of the books.")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["title"], row["text"]


def bytes_of(piece: str) -> bytes:
    """The bytes of a byte-level piece, whose characters stand for one each (Radford, 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + place): byte for place, byte in enumerate(others)}
    return bytes(table[character] for character in piece)


def learned(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE in which every digit is a token of its own."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, before])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def write(path: str, folder: str, *, vocabulary: int, most: int) -> None:
    """Learns the vocabulary from the training books, and writes all books.

    Args:
      path: of the ``.npz`` file.
      folder: of the books.
      vocabulary: tokens.
      most: of a book that is not trained on, its first tokens.
    """
    source = pathlib.Path(folder)
    inner = learned([text for _, text in _rows(source, "train")], vocabulary)
    pieces = [bytes_of(inner.id_to_token(index)) for index in range(inner.get_vocab_size())]
    arrays: dict[str, Any] = {
        "pieces": np.frombuffer(b"".join(pieces), np.uint8),
        "sizes": np.array([len(piece) for piece in pieces]),
        "needle": np.array(inner.encode(NEEDLE).ids, np.uint16),
        "stop": np.array(inner.encode(".").ids, np.uint16),
        "digits": np.array([inner.token_to_id(digit) for digit in DIGITS], np.uint16),
    }
    for role in FILES:
        titles, books = [], []
        for title, text in _rows(source, role):
            titles.append(title)
            ids = np.array(inner.encode(text).ids, np.uint16)
            books.append(ids if role == "train" else ids[:most])
        arrays[f"{role}_titles"] = np.array(titles)
        arrays[f"{role}_lengths"] = np.array([len(book) for book in books])
        arrays[f"{role}_tokens"] = np.concatenate(books)
        print(f"{role}: {len(books)} books, {sum(map(len, books))} tokens", flush=True)
    launch.write_npz(pathlib.Path(path), arrays, compressed=True)


def read(path: str) -> Texts:
    """What :func:`write` wrote."""
    file = pathlib.Path(path)
    if not file.exists():
        raise launch.UserError(f"{file} is not there; write it with --prepare --texts=FOLDER.")
    arrays = launch.read_npz(file, "Write it again with --prepare.")
    ends = np.cumsum(arrays["sizes"])
    flat = arrays["pieces"].tobytes()
    pieces = [flat[end - size : end] for end, size in zip(ends, arrays["sizes"], strict=True)]
    books = {
        role: np.split(arrays[f"{role}_tokens"], np.cumsum(arrays[f"{role}_lengths"])[:-1])
        for role in FILES
    }
    titles = {role: arrays[f"{role}_titles"].tolist() for role in FILES}
    return Texts(books, titles, pieces, (arrays["needle"], arrays["stop"]), arrays["digits"])


def spans(books: Sequence[np.ndarray], length: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Int32 ``[N, length]``, at most so many of each book, spread over it; and the book of each."""
    rows, owners = [], []
    for owner, book in enumerate(books):
        count = min(len(book) // length, most)
        for place in range(count):
            # As far apart as can be; never over each other, as count spans fit.
            start = (len(book) - length) * place // max(count - 1, 1)
            rows.append(book[start : start + length])
            owners.append(owner)
    if not rows:
        raise launch.UserError(f"no book has {length} tokens; choose a smaller --length.")
    return np.stack(rows).astype(np.int32), np.array(owners)

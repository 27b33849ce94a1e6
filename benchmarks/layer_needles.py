"""A number that is hidden in a long text and asked for at its end."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import layer_texts

# Digits of a number.
COUNT = 5


class Needles(NamedTuple):
    """Texts in which a number is hidden and asked for at the end, and the same without it.

    Attributes:
      tokens: int32 ``[N, T]``, padded at the end.
      places: int ``[N, 5]``, of the digits at the end.
      digits: int ``[N, 5]``, from 0 to 9.
      length: int ``[N]``, tokens without padding.
      depth: float ``[N]``, where the number is hidden, as a share of the text; nan for nowhere.
    """

    tokens: np.ndarray
    places: np.ndarray
    digits: np.ndarray
    length: np.ndarray
    depth: np.ndarray


def needles(
    texts: layer_texts.Texts,
    books: np.ndarray,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
) -> Needles:
    """A number in each of the texts, at each depth and nowhere, cut to each length.

    Args:
      texts: for the sentence and the digits.
      books: int ``[B, T]``, texts to hide it in; T is the longest of the lengths.
      lengths: of a text with its question.
      depths: shares of the text.
      seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    sentence, stop = texts.needle
    numbers = rng.integers(0, 10, (len(books), COUNT))
    rows: list[tuple[np.ndarray, int, int, float]] = []
    for length in lengths:
        for owner, book in enumerate(books):
            number = texts.digits[numbers[owner]]
            hidden = np.concatenate([sentence, number, stop])
            question = np.concatenate([sentence, number])
            for depth in (*depths, np.nan):
                inside = hidden if depth == depth else hidden[:0]
                text = book[: length - len(inside) - len(question)]
                at = 0 if depth != depth else int(depth * len(text))
                row = np.concatenate([text[:at], inside, text[at:], question])
                rows.append((row, owner, length, depth))
    tokens = np.zeros((len(rows), books.shape[1]), np.int32)
    for place, (row, *_) in enumerate(rows):
        tokens[place, : len(row)] = row
    length = np.array([row[2] for row in rows])
    return Needles(
        tokens,
        length[:, None] - COUNT + np.arange(COUNT)[None],
        numbers[[row[1] for row in rows]],
        length,
        np.array([row[3] for row in rows]),
    )


def rows_of(given: Needles, nats: np.ndarray, guesses: np.ndarray) -> list[dict[str, Any]]:
    """By length and depth: nats a digit, without the number in the text, and the share guessed.

    Args:
      given: what was read.
      nats: ``[N, T]``, of each token.
      guesses: int ``[N, T]``, the most probable of the ten digits at each token.
    """
    rows, index = [], np.arange(len(given.length))[:, None]
    scores, right = nats[index, given.places], guesses[index, given.places] == given.digits
    for length in np.unique(given.length):
        here = given.length == length
        nowhere = here & np.isnan(given.depth)
        for depth in np.unique(given.depth[~np.isnan(given.depth)]):
            chosen = here & (given.depth == depth)
            rows.append(
                {
                    "length": int(length),
                    "depth": float(depth),
                    "nats": float(scores[chosen].mean()),
                    "nats_without": float(scores[nowhere].mean()),
                    "right": float(right[chosen].mean()),
                    "right_without": float(right[nowhere].mean()),
                }
            )
    return rows

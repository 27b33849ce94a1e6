"""Prompts in tokens: ``Q: question``, ``A: answer``, an empty line; the same in every row.

Question and answer are turned into tokens apart, so that an answer has the same tokens wherever it
stands. The empty line belongs to the answer: it is how the model says that it has ended.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import launch
from ttt_jax.data import few_shot
from ttt_jax.data.few_shot import Example, FewShotTask


class Writer:
    """Turns examples into tokens.

    Args:
      tokenizer: with ``encode``, ``decode``, ``bos`` and ``eos``, as in
        :mod:`ttt_jax.data.tokenizers`.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # The same demonstrations come in many orders.
        self._known: dict[str, list[int]] = {}
        self.begin: list[int] = [] if tokenizer.bos is None else [tokenizer.bos]

    def question(self, text: str) -> list[int]:
        """The tokens of a question, up to where its answer begins."""
        return self._tokens(f"Q: {text}\nA:")

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer and of its end."""
        return self._tokens(f" {text}\n\n")

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = list(self._tokenizer.encode(text))
        return self._known[text]

    def ends_alike(self, answer: Sequence[int], written: Sequence[int]) -> bool:
        """Whether the tokens that a model chooses are those of an answer, up to its line's end.

        Args:
          answer: of :func:`answer`.
          written: the most probable token at each of its places, given those of the answer before:
            up to the first one that differs, what greedy decoding writes.
        """
        for wanted, chosen in zip(answer, written, strict=True):
            (text, ends, _), (own, ended, _) = self._split(wanted), self._split(chosen)
            if ends:
                return bool(ended) and own == text
            if wanted != chosen:
                return False
        return False

    def _split(self, token: int) -> tuple[str, str, str]:
        """A token's text before the end of the line, and that end; the end of a text is one."""
        text = "\n" if token == self._tokenizer.eos else self._tokenizer.decode([token])
        return text.partition("\n")


class Row(NamedTuple):
    """A sequence to learn from.

    Attributes:
      tokens: of the sequence.
      places: of the tokens whose next one is learned.
      targets: those next tokens.
      dropped: how many demonstrations were left out for want of room.
    """

    tokens: list[int]
    places: list[int]
    targets: list[int]
    dropped: int


def prefix(writer: Writer, shown: Sequence[Example], context: int) -> tuple[list[int], int]:
    """The tokens of demonstrations, the first left out until there is room, and how many were."""
    parts = [writer.question(each.input) + writer.answer(each.output) for each in shown]
    kept = _fitting([len(part) for part in parts], context - len(writer.begin))
    return writer.begin + [token for part in parts[kept:] for token in part], kept


def row(writer: Writer, shown: Sequence[Example], first: int, context: int) -> Row:
    """A sequence of examples whose answers from the ``first`` one on are learned.

    Args:
      writer: of tokens.
      shown: the examples in order; the first are left out until the sequence has room.
      first: of the examples that are left; at least the last one is learned.
      context: tokens at most.

    Raises:
      UserError: the last example alone is longer.
    """
    parts = [(writer.question(each.input), writer.answer(each.output)) for each in shown]
    kept = _fitting([len(q) + len(a) for q, a in parts], context - len(writer.begin))
    if kept == len(parts):
        raise launch.UserError(
            f"--context must have room for every demonstration; got {context}, and one has "
            f"{sum(map(len, parts[-1]))} tokens."
        )
    made = Row(list(writer.begin), [], [], kept)
    learned_from = min(first, len(parts) - kept - 1)
    for place, (question, answer) in enumerate(parts[kept:]):
        begin = len(made.tokens) + len(question)
        made.tokens.extend(question + answer)
        if place >= learned_from:
            made.places.extend(range(begin - 1, begin - 1 + len(answer)))
            made.targets.extend(answer)
    return made


def _fitting(lengths: Sequence[int], room: int) -> int:
    """How many parts in front have to go so that the others have room."""
    total = sum(lengths)
    for place, length in enumerate(lengths):
        if total <= room:
            return place
        total -= length
    return len(lengths)


def in_context(
    writer: Writer, task: FewShotTask, count: int, context: int, rng: np.random.Generator
) -> list[Row]:
    """Leave-one-out sequences: each demonstration is the last one in turn, the others shuffled.

    Answers are learned from the second demonstration on, as Akyürek et al., 2025, do
    (github.com/ekinakyurek/marc).
    """
    held_out = few_shot.leave_one_out(task)
    rows = []
    for place in range(count):
        (drawn,) = few_shot.orders(held_out[place % len(held_out)], 1, rng)
        rows.append(row(writer, [*drawn.demonstrations, *drawn.queries], 1, context))
    return rows


def direct(
    writer: Writer, task: FewShotTask, count: int, context: int, rng: np.random.Generator
) -> list[Row]:
    """Demonstrations alone, each a sequence, in random orders one after the other."""
    shown = task.demonstrations
    places = np.concatenate([rng.permutation(len(shown)) for _ in range(-(-count // len(shown)))])
    return [row(writer, [shown[place]], 0, context) for place in places[:count]]


def stacked(rows: Sequence[Row], length: int, answers: int, count: int) -> dict[str, np.ndarray]:
    """Arrays of rows, padded behind and filled up to ``count`` with rows without a target.

    Returns:
      int32 ``tokens`` ``[count, length]``; ``places`` and ``targets`` ``[count, answers]`` and
      their bool ``mask``.
    """
    arrays = {
        "tokens": np.zeros((count, length), np.int32),
        "places": np.zeros((count, answers), np.int32),
        "targets": np.zeros((count, answers), np.int32),
        "mask": np.zeros((count, answers), bool),
    }
    for place, each in enumerate(rows):
        size = len(each.places)
        arrays["tokens"][place, : len(each.tokens)] = each.tokens
        arrays["places"][place, :size] = each.places
        arrays["targets"][place, :size] = each.targets
        arrays["mask"][place, :size] = True
    return arrays

"""Answers to queries: the most probable allowed one, or the one that greedy decoding writes.

The demonstrations of a task are read once, then its queries side by side behind them, then every
allowed answer behind every query. Where an answer is written freely the true one is read: greedy
decoding writes it if and only if each of its tokens is the most probable one behind those before.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bbh import questions, sequences
from benchmarks.bbh.programs import Program
from ttt_jax import models
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.losses.tokens import token_nats

# The least tokens of a program's questions and of its answers; others are powers of four as large.
_QUESTION, _ANSWER = 64, 16


def bucket(length: int, least: int) -> int:
    """The smallest of ``least``, ``4 least``, ``16 least``, ... that has room."""
    size = least
    while size < length:
        size *= 4
    return size


class Asked(NamedTuple):
    """A query in tokens.

    Attributes:
      question: without its last token, with which the answers are read.
      last: that token.
      answers: the tokens of each allowed answer; of the true one alone where it is free.
      right: the place of the true answer, -1 where it is not allowed.
      free: whether the answer is written freely.
    """

    question: list[int]
    last: int
    answers: list[list[int]]
    right: int
    free: bool


def asked(writer: sequences.Writer, task: FewShotTask, query: Example) -> Asked:
    """A query of a task."""
    *question, last = writer.question(query.input)
    if questions.rule(task) == "greedy":
        return Asked(question, last, [writer.answer(query.output)], 0, True)
    # A question that lists no options, among others that do, has no right answer.
    allowed = questions.choices(task, query.input) or ("",)
    right = allowed.index(query.output) if query.output in allowed else -1
    return Asked(question, last, [writer.answer(each) for each in allowed], right, False)


class Scorer:
    """Scores queries; its programs serve all tasks and all ways.

    Args:
      module: the decoder, with low-rank factors.
      writer: of tokens.
      prefix: tokens of demonstrations at most.
      longest: tokens of a question at most.
      batch: Q, queries side by side.
    """

    def __init__(
        self,
        module: models.Decoder,
        writer: sequences.Writer,
        *,
        prefix: int,
        longest: int,
        batch: int,
    ):
        self.writer, self.batch = writer, batch
        # Sizes of whole tiles, which the kernels of a cache ask for.
        self.prefix = prefix + -prefix % _QUESTION
        slots = self.prefix + bucket(longest, _QUESTION)
        reader = models.reader(module)

        def read(params: Any, shown: Any, asked: Any) -> Any:
            memory = reader.init(1, slots, self.prefix)
            _, memory = reader.read(params, memory, shown)
            memory = jax.tree.map(lambda leaf: _repeated(leaf, batch), memory)
            return reader.read(params, memory, asked)[1]

        def answer(params: Any, memory: Any, inputs: Any, targets: Any) -> Any:
            assert reader.parts is not None
            logits, _ = reader.parts.ahead(params, memory, inputs)
            nats = jnp.where(targets >= 0, token_nats(logits, jnp.maximum(targets, 0)), 0.0)
            return nats.sum(-1), jnp.argmax(logits, -1).astype(jnp.int32)

        self.read, self.answer = Program(read), Program(answer)

    def right(self, params: Any, queries: Sequence[Asked], shown: Sequence[int]) -> np.ndarray:
        """Whether each query is answered right, bool ``[queries]``.

        Args:
          params: of the decoder.
          queries: of one task.
          shown: the tokens that all of them are read behind; may be none.
        """
        answered = np.zeros(len(queries), bool)
        order = sorted(range(len(queries)), key=lambda place: len(queries[place].question))
        waiting = []
        before = _padded([shown], self.prefix, [0])
        for at in range(0, len(order), self.batch):
            places = order[at : at + self.batch]
            part = [queries[place] for place in places]
            filled = part + [part[-1]] * (self.batch - len(part))
            memory = self.read(params, before, self._questions(filled, len(shown)))
            most = max(len(each.answers) for each in part)
            size = bucket(max(len(a) for each in part for a in each.answers), _ANSWER)
            firsts = [len(shown) + len(each.question) for each in filled]
            made = []
            for number in range(most):
                inputs, targets = _answers(filled, number, size, firsts)
                made.append(self.answer(params, memory, inputs, targets))
            waiting.append((places, made))
        for places, made in jax.device_get(waiting):
            for column, place in enumerate(places):
                each = queries[place]
                nats = [nats[column] for nats, _ in made[: len(each.answers)]]
                answered[place] = self._is_right(each, nats, made[0][1][column])
        return answered

    def _questions(self, part: Sequence[Asked], first: int) -> dict[str, np.ndarray]:
        longest = max(len(each.question) for each in part)
        return _padded(
            [each.question for each in part], bucket(longest, _QUESTION), [first] * len(part)
        )

    def _is_right(self, each: Asked, nats: Sequence[float], written: np.ndarray) -> bool:
        if each.free:
            (answer,) = each.answers
            return self.writer.ends_alike(answer, written[: len(answer)].tolist())
        # A NaN is no answer.
        return bool(np.isfinite(nats).all()) and int(np.argmin(nats)) == each.right


def _repeated(leaf: jax.Array, count: int) -> jax.Array:
    """A cache's leaf of one sequence for so many; keys and values have layers in front."""
    return jnp.repeat(leaf, count, axis=0 if leaf.ndim == 2 else 1)


def _padded(rows: Sequence[Sequence[int]], size: int, firsts: Sequence[int]) -> dict[str, Any]:
    """Tokens and positions ``[rows, size]``, from each row's first position on; -1 is padding."""
    tokens = np.zeros((len(rows), size), np.int32)
    positions = np.full((len(rows), size), -1, np.int32)
    for place, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        tokens[place, : len(row)] = row
        positions[place, : len(row)] = first + np.arange(len(row))
    return {"tokens": tokens, "positions": positions}


def _answers(
    part: Sequence[Asked], number: int, size: int, firsts: Sequence[int]
) -> tuple[dict[str, Any], np.ndarray]:
    """The allowed answers of one number, each behind the last token of its question.

    A query with fewer reads its last one again, which nobody looks at.
    """
    chosen = [each.answers[min(number, len(each.answers) - 1)] for each in part]
    read = [[each.last, *answer[:-1]] for each, answer in zip(part, chosen, strict=True)]
    targets = np.full((len(part), size), -1, np.int32)
    for place, answer in enumerate(chosen):
        targets[place, : len(answer)] = answer
    return _padded(read, size, firsts), targets

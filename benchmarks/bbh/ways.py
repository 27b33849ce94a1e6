"""The ways to answer: what is learned in each, and what it answers."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bbh import learning, questions, scoring, sequences, table
from benchmarks.bbh.programs import timed
from ttt_jax import votes
from ttt_jax.data.few_shot import Example, FewShotTask

# Learned tokens of a sequence at most are rounded up to a multiple of it.
_ANSWERS = 64
_NO_TIME = {"seconds": 0.0, "compile_seconds": 0.0}


class Way(NamedTuple):
    """What is learned, and whether the demonstrations are in the prompt."""

    learned: str | None
    shown: bool


WAYS = {
    "in_context": Way(None, True),
    "zero_shot": Way(None, False),
    "adapted": Way("in_context", True),
    "adapted_bare": Way("in_context", False),
    "direct": Way("direct", False),
    "shared": Way("shared", True),
    "guarded": Way("in_context", True),
}


class Bench:
    """The model, the tasks in tokens, and what was learned so far.

    Args:
      base: the decoder with factors.
      tasks: with demonstrations and queries.
      settings: of the program.
    """

    def __init__(self, base: learning.Base, tasks: Sequence[FewShotTask], settings: Any):
        self.base, self.tasks, self.settings = base, tasks, settings
        self.writer = writer = sequences.Writer(base.tokenizer)
        made = [sequences.prefix(writer, t.demonstrations, settings.context) for t in tasks]
        self.prefixes, self.dropped = [tokens for tokens, _ in made], [count for _, count in made]
        self.asked = [[scoring.asked(writer, task, q) for q in task.queries] for task in tasks]
        self.scorer = scoring.Scorer(
            base.module.clone(unroll=1, remat=False),
            writer,
            prefix=max(map(len, self.prefixes)),
            longest=max(len(each.question) for part in self.asked for each in part),
            batch=settings.batch,
        )
        self.rows = {
            "in_context": self._rows(tasks, sequences.in_context),
            "direct": self._rows(tasks, sequences.direct),
        }
        # A step of the shared adapter has a sequence of every task, and there are as many
        # sequences in all as the private ones have together.
        several = zip(*self.rows["in_context"], strict=True)
        self.rows["shared"] = [[row for step in several for row in step]]
        longest = max(len(row.places) for part in self.rows["in_context"] for row in part)
        answers = longest + -longest % _ANSWERS
        lengths, many = (settings.context // 2, settings.context), len(tasks)
        at_once = min(settings.tasks_at_once, many)
        self.private = learning.Learner(
            base, lengths, learning.Shape(at_once, settings.rows, answers, settings.every)
        )
        self.shared = learning.Learner(
            base, lengths, learning.Shape(1, many, answers, settings.every * settings.rows)
        )
        self._learned: dict[tuple[str, float], learning.Learned] = {}

    def _rows(
        self, tasks: Sequence[FewShotTask], build: Callable[..., list[sequences.Row]]
    ) -> list[list[sequences.Row]]:
        """Sequences of every task, for all steps."""
        settings = self.settings
        count = max(settings.steps) * settings.rows
        rows = []
        for task in tasks:
            rng = np.random.default_rng((settings.seed, 1, zlib.crc32(task.name.encode())))
            rows.append(build(self.writer, task, count, settings.context, rng))
        return rows

    def about(self) -> dict[str, Any]:
        """What the record says of each task."""
        made = {}
        for place, task in enumerate(self.tasks):
            asked = self.asked[place]
            made[task.name] = {
                "rule": questions.rule(task),
                "queries": len(task.queries),
                "demonstrations": len(task.demonstrations),
                "left_out_of_prompt": self.dropped[place],
                "left_out_of_sequences": max(row.dropped for row in self.rows["in_context"][place]),
                "prompt_tokens": len(self.prefixes[place]),
                "most_choices": max(0 if each.free else len(each.answers) for each in asked),
                # Answers of the data that their questions do not list.
                "unanswerable": sum(each.right < 0 for each in asked),
                "chance": questions.chance(task),
                "constant": questions.constant(task),
            }
        return made

    def learned(self, kind: str, rate: float) -> tuple[learning.Learned, dict[str, float]]:
        """Adapters of a kind and step size, and the seconds that they took now."""
        if held := self._learned.get((kind, rate)):
            return held, _NO_TIME
        learner = self.shared if kind == "shared" else self.private
        own = rate * self.settings.shared_factor if kind == "shared" else rate
        made, seconds = timed(
            lambda: learner.learn(self.rows[kind], own), [learner.begin, learner.advance]
        )
        self._learned[kind, rate] = made
        return made, seconds

    def stops(self, rate: float) -> tuple[list[int], dict[str, float]]:
        """How many steps two folds choose for each task, and the seconds that it took."""
        learner = self.private

        def curves() -> list[np.ndarray]:
            parts = [[questions.halves(task)[fold] for task in self.tasks] for fold in range(2)]
            return [
                learner.learn(
                    self._rows([task for task, _ in part], sequences.in_context),
                    rate,
                    [self._held_out(*each) for each in part],
                ).held_out
                for part in parts
            ]

        made, seconds = timed(curves, [learner.begin, learner.advance, learner.score])
        mean = np.mean(made, 0)
        taken = self.settings.every * votes.prefer(mean[:, 1:], mean[:, 0])
        return taken.tolist(), seconds

    def _held_out(self, task: FewShotTask, held_out: Sequence[Example]) -> list[sequences.Row]:
        """Demonstrations of the other half behind those of one, as many as a step has rows."""
        shown = task.demonstrations
        return [
            sequences.row(self.writer, [*shown, each], len(shown), self.settings.context)
            for each in held_out[: self.settings.rows]
        ]

    def row(self, name: str, rate: float | None, steps: int | None) -> dict[str, Any]:
        """Asks all tasks in a way.

        Args:
          name: of the way.
          rate: step size of what it learns, or None.
          steps: how many, or None; where folds choose, at most.
        """
        way, many = WAYS[name], len(self.tasks)
        made: dict[str, Any] = {"way": name}
        chosen: list[Any] = [None] * many
        if way.learned is not None and rate is not None and steps is not None:
            learned, seconds = self.learned(way.learned, rate)
            taken = [steps] * many
            if name == "guarded":
                taken, spent = self.stops(rate)
                seconds = {part: seconds[part] + spent[part] for part in seconds}
                made["taken"] = {t.name: n for t, n in zip(self.tasks, taken, strict=True)}
            owners = [0] * many if way.learned == "shared" else range(many)
            for place, (owner, count) in enumerate(zip(owners, taken, strict=True)):
                if count:
                    chosen[place] = learned.fast[owner][count // self.settings.every - 1]
            made |= {"rate": rate, "steps": steps, "learning": seconds}
            # Of the answers' tokens, in the first step and in the last one of all.
            made["nats"] = [float(nats) for nats in learned.losses.mean(0)[[0, -1]]]
        right, made["scoring"] = timed(
            lambda: self._right(chosen, way.shown), [self.scorer.read, self.scorer.answer]
        )
        made["bits"] = {t.name: table.bits(r) for t, r in zip(self.tasks, right, strict=True)}
        made["accuracy"] = {task: table.accuracy(each) for task, each in made["bits"].items()}
        return made

    def _right(self, chosen: Sequence[Any], shown: bool) -> list[np.ndarray]:
        pristine = self.base.params
        frozen, right = learning.SELECTED.split(pristine)[1], []
        for fast, queries, tokens in zip(chosen, self.asked, self.prefixes, strict=True):
            params = pristine if fast is None else learning.SELECTED.merge(fast, frozen)
            before = tokens if shown else self.writer.begin
            right.append(self.scorer.right(params, queries, before))
        return right

"""Adapters of many tasks at once: low-rank factors that learn from demonstrations.

The weights of the decoder are shared and never change; the factors, their moments and their counts
have a leading axis over the tasks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from benchmarks.bbh import sequences
from benchmarks.bbh.programs import Program, logits_at
from ttt_jax import models, select
from ttt_jax.losses.tokens import masked_mean, token_nats

LINEAR = (".*attention/.*", ".*mlp/.*")
SELECTED = select.lora()


class Base(NamedTuple):
    """A decoder with low-rank factors that do nothing yet, and its tokenizer."""

    module: models.Decoder
    params: Any
    tokenizer: Any


class Shape(NamedTuple):
    """What one compiled program takes.

    Attributes:
      tasks: N, side by side.
      rows: R, sequences of a step and task.
      answers: A, learned tokens of a sequence at most.
      every: E, steps of a call.
    """

    tasks: int
    rows: int
    answers: int
    every: int


def factors(
    module: models.Decoder, params: Any, tokenizer: Any, *, rank: int, alpha: float, seed: int
) -> Base:
    """The decoder with low-rank factors in all linear layers."""
    example = jnp.zeros((1, 2), jnp.int32)
    key = jax.random.key(seed)
    wide, params = models.low_rank(
        module, params, key, example, rank=rank, alpha=alpha, paths=LINEAR
    )
    return Base(wide, params, tokenizer)


def answer_loss(module: models.Decoder) -> Callable[[Any, Any, Any], jax.Array]:
    """Mean nats of the answers' tokens of rows, see :func:`sequences.stacked`."""

    def loss(params: Any, x: Any, key: Any) -> jax.Array:
        logits = logits_at(module, params, x["tokens"], x["places"])
        return masked_mean(token_nats(logits, x["targets"]), x["mask"])

    return loss


class Learner:
    """Trains adapters; its programs serve all groups of tasks, and all step sizes.

    Args:
      base: the decoder; rows of a batch are as long as ``lengths`` allow.
      lengths: tokens of a row, ascending; a group of tasks has the smallest that it fits.
      shape: of the programs.
    """

    def __init__(self, base: Base, lengths: Sequence[int], shape: Shape):
        self.base, self.lengths, self.shape = base, tuple(lengths), shape
        loss = answer_loss(base.module)

        def adapter(rate: Any) -> ttt.Adapter:
            return ttt.gradient_adapter(loss, optax.adam(rate), select=SELECTED)

        def begin(params: Any) -> Any:
            count = shape.tasks
            state = adapter(0.0).init(params)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *jnp.shape(a))), state)

        def advance(params: Any, states: Any, rate: Any, x: Any) -> Any:
            key = jax.random.key(0)  # the loss draws nothing

            def task(state: Any, rows: Any) -> Any:
                def step(state: Any, row: Any) -> Any:
                    moved, info = adapter(rate).step(params, state, row, key)
                    # A step that diverged is none; the other tasks do not notice.
                    kept = jax.tree.map(lambda a, b: jnp.where(info.finite, a, b), moved, state)
                    return kept, info.loss

                return jax.lax.scan(step, state, rows)

            return jax.vmap(task)(states, x)

        def score(params: Any, fast: Any, x: Any) -> Any:
            frozen = SELECTED.split(params)[1]
            each = jax.vmap(lambda f, rows: loss(SELECTED.merge(f, frozen), rows, None))
            return each(fast, x)

        self.begin, self.advance, self.score = Program(begin), Program(advance), Program(score)

    def groups(self, rows: Sequence[Sequence[sequences.Row]]) -> list[tuple[list[int], int]]:
        """Tasks of similar length, N at most, and the length of their rows.

        Args:
          rows: of every task.
        """
        longest = [max(len(row.tokens) for row in each) for each in rows]
        order = sorted(range(len(rows)), key=lambda task: longest[task])
        parts = [order[at : at + self.shape.tasks] for at in range(0, len(order), self.shape.tasks)]
        return [(part, next(n for n in self.lengths if n >= longest[part[-1]])) for part in parts]

    def arrays(
        self, rows: Sequence[Sequence[sequences.Row]], group: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        """Rows of a group as ``[N, S, R, ...]``; a last one that is not full repeats a task."""
        count = self.shape.rows
        filled = [*group, *[group[-1]] * (self.shape.tasks - len(group))]
        tasks = []
        for task in filled:
            steps = [
                sequences.stacked(rows[task][at : at + count], length, self.shape.answers, count)
                for at in range(0, len(rows[task]), count)
            ]
            tasks.append({name: np.stack([step[name] for step in steps]) for name in steps[0]})
        return {name: np.stack([task[name] for task in tasks]) for name in tasks[0]}

    def learn(
        self,
        rows: Sequence[Sequence[sequences.Row]],
        rate: float,
        held_out: Sequence[Sequence[sequences.Row]] | None = None,
    ) -> "Learned":
        """Adapters of all tasks after every E steps.

        Args:
          rows: of every task, S times R of them.
          rate: step size of Adam.
          held_out: rows of every task, R at most, that are scored after every E steps.
        """
        params = self.base.params
        fast: list[Any] = [None] * len(rows)
        curves: list[Any] = [None] * len(rows)
        losses: list[Any] = [None] * len(rows)
        for group, length in self.groups(rows):
            x, every = self.arrays(rows, group, length), self.shape.every
            scored = held_out and jax.tree.map(
                lambda leaf: leaf[:, 0], self.arrays(held_out, group, length)
            )
            states = self.begin(params)
            kept, curve, steps = [], [], []
            if scored:
                curve.append(self.score(params, states.fast, scored))
            for at in range(0, x["tokens"].shape[1], every):
                part = {name: jnp.asarray(leaf[:, at : at + every]) for name, leaf in x.items()}
                states, nats = self.advance(params, states, jnp.float32(rate), part)
                kept.append(states.fast)
                steps.append(nats)
                if scored:
                    curve.append(self.score(params, states.fast, scored))
            curve, steps = jax.device_get((curve, steps))
            for place, task in enumerate(group):
                fast[task] = [_one(each, place) for each in kept]
                losses[task] = np.concatenate([nats[place] for nats in steps])
                curves[task] = [nats[place] for nats in curve]
        return Learned(fast, np.array(losses), np.array(curves))


def _one(tree: Any, place: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[place], tree)


class Learned(NamedTuple):
    """What adapters became.

    Attributes:
      fast: by task and number of calls, the factors.
      losses: ``[tasks, S]``, nats per token of an answer before each step.
      held_out: ``[tasks, 1 + S / E]``, of the rows that were held out, before the first step and
        after every E; ``[tasks, 0]`` where none were.
    """

    fast: list[list[Any]]
    losses: np.ndarray
    held_out: np.ndarray

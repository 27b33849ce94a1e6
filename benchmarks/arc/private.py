"""A private low-rank copy per task on top of a decoder, many at once, with a guard against harm.

Each task's copy, low-rank factors and the task's vectors, learns from its own demonstrations under
drawn views. One demonstration is held out
first: its loss after every few steps, beside the source's, says how many steps are taken, none
where they harm. The copy that answers learns from all demonstrations for so many steps. The guard
is fair where the decoder never saw the task: one that was trained on all demonstrations knows the
one that is held out, and then favors no step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from benchmarks.arc import answers, sources
from ttt_jax import losses, models, select, votes
from ttt_jax.data import grid_sequences
from ttt_jax.data.few_shot import FewShotTask
from ttt_jax.views import grid

# The task's own vectors, too: a decoder that never saw a task has drawn ones for it.
SELECTED = select.union(select.lora(), select.paths(r"params/task", r"params/task_view"))
TARGETS = (".*query", ".*key", ".*value", ".*out", ".*gate", ".*up", ".*down")


class Settings(NamedTuple):
    """What a copy is and how it learns.

    Attributes:
      rank: of the factors.
      alpha: the product of the factors is multiplied by ``alpha / rank``.
      rate: step size of Adam.
      num_steps: S, at most.
      every: steps between two looks at the held-out demonstration; divides S.
      length: tokens of a step's row, per task.
      most: sequences of a row.
      tasks_at_once: N.
      held_out_views: views under which the held-out demonstration is scored, or as many of them as
        have room in a row.
    """

    rank: int = 16
    alpha: float = 16.0
    rate: float = 1e-3
    num_steps: int = 60
    every: int = 10
    length: int = 2048
    most: int = 16
    tasks_at_once: int = 32
    held_out_views: int = 8


class Copies(NamedTuple):
    """A decoder with low-rank leaves that are zero in effect, and how it is adapted."""

    net: Any
    params: Any
    adapter: ttt.Adapter


def copies_of(net: models.GridDecoder, params: Any, settings: Settings, seed: int) -> Copies:
    """The decoder with the leaves of a copy."""
    example = grid_sequences.empty(1, settings.length, settings.most)._asdict()
    wide, params = models.low_rank(
        net,
        params,
        jax.random.key(seed),
        example,
        rank=settings.rank,
        alpha=settings.alpha,
        paths=list(TARGETS),
    )
    loss = losses.packed_sequences(wide.apply)
    adapter = ttt.gradient_adapter(loss, optax.adam(settings.rate), select=SELECTED)
    return Copies(wide, params, adapter)


def row_of(
    task: FewShotTask, number: int, settings: Settings, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A row of a task's demonstrations under drawn views, ``[1, T]``."""

    def drawn() -> Any:
        while True:
            pair = task.demonstrations[int(rng.integers(len(task.demonstrations)))]
            yield sources.encoded(pair, sources.draw_view(rng), number)

    packed, _ = next(grid_sequences.pack(drawn(), 1, settings.length, settings.most, patience=4))
    return packed._asdict()


def fits(task: FewShotTask, settings: Settings) -> bool:
    """Whether every demonstration has room in a row."""
    sizes = (grid_sequences.length_of(*pair) for pair in task.demonstrations)
    return max(sizes) <= settings.length


def _held_out(
    task: FewShotTask, number: int, settings: Settings, rng: np.random.Generator
) -> tuple[FewShotTask, dict[str, np.ndarray]]:
    """The task without its last demonstration, and that one under several views."""
    *shown, last = task.demonstrations
    rest = task._replace(demonstrations=tuple(shown or [last]))
    views = grid.draw(rng, settings.held_out_views)
    items = (sources.encoded(last, view, number) for view in views)
    packed, _ = next(grid_sequences.pack(items, 1, settings.length, settings.most, patience=1))
    return rest, packed._asdict()


def _stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def learn(
    copies: Copies, batches: Any, stops: Any, held_out: Any, settings: Settings
) -> tuple[Any, jax.Array]:
    """Trains N copies side by side.

    Args:
      copies: what is adapted.
      batches: rows of the steps, leaves ``[S, N, 1, T]``.
      stops: int ``[N]``, how many steps each copy takes.
      held_out: rows ``[N, 1, T]`` that are scored after every few steps.
      settings: of the copies.

    Returns:
      The adapted leaves ``[N, ...]``, and the held-out nats per token ``[N, 1 + S / every]``.
    """
    adapter, params = copies.adapter, copies.params
    loss = losses.packed_sequences(copies.net.apply, power=0.0)
    key = jax.random.key(0)  # the loss draws nothing

    def task(rows: Any, stop: Any, held_out: Any) -> Any:
        state = adapter.init(params)

        def step(carry: Any, x: Any) -> Any:
            place, row = x
            moved, info = adapter.step(params, carry, row, key)
            taken = (place < stop) & info.finite
            return jax.tree.map(lambda new, old: jnp.where(taken, new, old), moved, carry), None

        def block(carry: Any, x: Any) -> Any:
            carry, _ = jax.lax.scan(step, carry, x)
            return carry, loss(adapter.merge(params, carry), held_out, key)

        count = settings.num_steps
        split = jax.tree.map(
            lambda leaf: leaf.reshape(-1, settings.every, *leaf.shape[1:]),
            (jnp.arange(count), rows),
        )
        first = loss(adapter.merge(params, state), held_out, key)
        state, later = jax.lax.scan(block, state, split)
        return state.fast, jnp.concatenate([first[None], later])

    return jax.vmap(task, (1, 0, 0))(batches, stops, held_out)


def steps_of(curves: np.ndarray, settings: Settings, margin: float = 0.0) -> np.ndarray:
    """How many steps each copy takes, from the held-out nats ``[N, 1 + S / every]``."""
    return settings.every * votes.prefer(curves[:, 1:], curves[:, 0], margin=margin)


def answer(
    copies: Copies,
    tasks: Sequence[FewShotTask],
    *,
    settings: Settings,
    num_views: int,
    slots: int,
    seed: int,
    guarded: bool = True,
    log: Callable[[str], None] = print,
) -> tuple[dict[int, list[list[votes.Vote]]], dict[int, int]]:
    """Votes of each task's own copy, by the number of the task, and the steps that were taken.

    Args:
      copies: what is adapted.
      tasks: all of them; one whose demonstrations have no room in a row is left out.
      settings: of the copies.
      num_views: V, of every query.
      slots: of the cache.
      seed: of the views.
      guarded: whether held-out demonstrations decide the steps; else all are taken.
      log: takes a line per group of tasks.
    """
    run = jax.jit(lambda *given: learn(copies, *given, settings))
    complete = jax.jit(lambda fast, inputs: _completed(copies, fast, inputs, slots))
    numbers = [number for number, task in enumerate(tasks) if fits(task, settings)]
    cast: dict[int, list[list[votes.Vote]]] = {}
    taken: dict[int, int] = {}
    for begin in range(0, len(numbers), settings.tasks_at_once):
        group = numbers[begin : begin + settings.tasks_at_once]
        # The last group is filled up, so that one program serves all.
        filled = group + [group[-1]] * (settings.tasks_at_once - len(group))
        rngs = [np.random.default_rng((seed, number)) for number in filled]
        parts = [
            _held_out(tasks[number], number, settings, rng)
            for number, rng in zip(filled, rngs, strict=True)
        ]
        held_out = _stacked([row for _, row in parts])
        stops = np.full(len(filled), settings.num_steps)
        if guarded:
            shown = [task for task, _ in parts]
            _, curves = run(_rows(shown, filled, settings, rngs), stops, held_out)
            stops = steps_of(np.asarray(curves), settings)
        every = _rows([tasks[number] for number in filled], filled, settings, rngs)
        fast, _ = run(every, stops, held_out)
        for place, query_votes in _decoded(complete, fast, tasks, group, num_views, slots, seed):
            cast.setdefault(place, []).append(query_votes)
        taken |= {number: int(stop) for number, stop in zip(group, stops, strict=False)}
        log(f"tasks {begin} to {begin + len(group) - 1}: steps {stops[: len(group)].tolist()}")
    return cast, taken


def _rows(tasks: Any, numbers: Any, settings: Settings, rngs: Any) -> dict[str, np.ndarray]:
    """Rows of all steps, leaves ``[S, N, 1, T]``."""
    steps = [
        _stacked([row_of(*each[:2], settings, each[2]) for each in zip(tasks, numbers, rngs)])  # noqa: B905
        for _ in range(settings.num_steps)
    ]
    return _stacked(steps)


def _completed(copies: Copies, fast: Any, inputs: Any, slots: int) -> jax.Array:
    """Tokens ``[N, V, T]`` of the views of one query of each task."""
    frozen = SELECTED.split(copies.params)[1]

    def task(fast: Any, inputs: Any) -> jax.Array:
        params = SELECTED.merge(fast, frozen)
        made = models.complete_grids(copies.net, params, inputs, slots=slots, num_tokens=slots)
        return made.tokens

    return jax.vmap(task)(fast, inputs)


def _decoded(
    complete: Any, fast: Any, tasks: Any, group: Any, num_views: int, slots: int, seed: int
) -> Any:
    """For every query of a group, the number of its task and its votes."""
    most = max(len(tasks[number].queries) for number in group)
    count = jax.tree.leaves(fast)[0].shape[0]
    for place in range(most):
        items, asked = [], []
        for row in range(count):
            number = group[min(row, len(group) - 1)]
            queries = tasks[number].queries
            rng = np.random.default_rng((seed, 7, number, place))
            bare = queries[min(place, len(queries) - 1)]._replace(output=None)
            views = grid.draw(rng, num_views)
            items.append([sources.encoded(bare, view, number) for view in views])
            asked.append((number, views, row < len(group) and place < len(queries)))
        inputs = _stacked([answers.prefixes(part, num_views, slots) for part in items])
        tokens = np.asarray(complete(fast, inputs))
        for (number, views, wanted), rows in zip(asked, tokens, strict=True):
            if wanted:
                yield number, [answers.vote_of(*pair) for pair in zip(rows, views, strict=True)]

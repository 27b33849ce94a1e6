"""A private low-rank copy per task on top of a decoder, many at once, with a guard against harm.

Each task's copy, low-rank factors and the task's vectors, learns from its own demonstrations under
drawn views (:func:`ttt_jax.methods.few_shot_adapter`). The guard holds a demonstration out first,
and takes the number of steps after which it is predicted best, none where they harm. It is fair
where the decoder never saw the task: one that was trained on all demonstrations knows the one that
is held out, and then favors no step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from benchmarks.arc import answers
from ttt_jax import losses, methods, models, select, votes
from ttt_jax.data import grid_sequences
from ttt_jax.data.few_shot import FewShotTask
from ttt_jax.models.low_rank import narrow_factors
from ttt_jax.views import grid_arrays

# The task's own vectors, too: a decoder that never saw a task has drawn ones for it. A copy has the
# rows of its task alone, as number 0, and not the tables of all.
VECTORS = select.paths(r"params/task", r"params/task_view")
SELECTED = select.union(select.lora(), VECTORS)
TARGETS = (".*query", ".*key", ".*value", ".*out", ".*gate", ".*up", ".*down")


class Settings(NamedTuple):
    """What a copy is and how it learns.

    Attributes:
      rank: of the factors.
      alpha: the product of the factors is multiplied by ``alpha / rank``.
      rate: step size of Adam for the factors.
      vector_factor: the step size for the task's vectors is ``rate`` times this; tables of a
        decoder are trained with larger steps than its matrices, too.
      num_steps: S, at most.
      every: steps between two looks at the held-out demonstration; divides S.
      held_out: demonstrations that the guard holds out in turn; 0 for no guard.
      drawn: rows of a task's demonstrations, one of which each step learns from.
      length: tokens of a row.
      most: sequences of a row.
      tasks_at_once: N.
    """

    rank: int = 16
    alpha: float = 16.0
    rate: float = 1e-3
    vector_factor: float = 10.0
    num_steps: int = 60
    every: int = 10
    held_out: int = 1
    drawn: int = 24
    length: int = 2048
    most: int = 16
    tasks_at_once: int = 32


class Copies(NamedTuple):
    """A decoder with low-rank leaves, and what each task's copy has in place of some of them.

    Attributes:
      net: the decoder, with tables of one task.
      params: pristine, the low-rank leaves zero in effect, the vectors those of any task.
      fast: the leaves of the copies, ``[tasks, ...]``.
      places: by number of the task, the row of ``fast``.
      steps: by number of the task, how many steps were taken.
    """

    net: models.GridDecoder
    params: Any
    fast: Any
    places: dict[int, int]
    steps: dict[int, int]


def fits(task: FewShotTask, settings: Settings) -> bool:
    """Whether every demonstration has room in a row."""
    return grid_arrays.sizes([task]).pair <= settings.length


class Learner(NamedTuple):
    """What learns copies; its program is compiled once for all groups and step sizes.

    Attributes:
      net: the decoder, with tables of one task.
      params: pristine, as of :class:`Copies`.
      tables: the vectors of all tasks.
      run: ``(params, (vectors, x), keys, rate) -> (fast, Info)`` of N tasks.
      settings: of the copies.
      seed: of rows, factors and steps.
    """

    net: models.GridDecoder
    params: Any
    tables: Any
    run: Callable[..., Any]
    settings: Settings
    seed: int


def prepared(net: models.GridDecoder, params: Any, settings: Settings, seed: int) -> Learner:
    """A learner of copies of a decoder with its parameters."""
    example = grid_sequences.empty(1, settings.length, settings.most)._asdict()
    tables, shared = VECTORS.split(params)
    about = {"rank": settings.rank, "alpha": settings.alpha, "paths": list(TARGETS)}
    own = VECTORS.merge(jax.tree.map(lambda leaf: leaf[:1], tables), shared)
    net, params = models.low_rank(net.clone(tasks=1), own, jax.random.key(seed), example, **about)

    @jax.jit
    def run(params: Any, x: Any, keys: Any, rate: Any) -> Any:
        learning = methods.few_shot_adapter(
            lambda params, batch: net.apply(narrow_factors(params, net.dtype), batch),
            optimizer=optimizer_of(rate, settings.vector_factor),
            select=SELECTED,
            num_steps=settings.num_steps,
            rows=1,
            held_out=settings.held_out,
            every=settings.every,
        )
        return ttt.batched(ttt.adapted(learning, select=VECTORS))(params, x, keys)

    return Learner(net, params, tables, run, settings, seed)


def optimizer_of(rate: Any, vector_factor: float) -> optax.GradientTransformation:
    """Adam, with larger steps for the task's vectors."""

    def kinds(params: Any) -> Any:
        def kind(path: Any, leaf: Any) -> str:
            return "vectors" if "task" in jax.tree_util.keystr(path) else "factors"

        return jax.tree_util.tree_map_with_path(kind, params)

    each = {"factors": optax.adam(rate), "vectors": optax.adam(vector_factor * rate)}
    return optax.multi_transform(each, kinds)


def _group(
    learner: Learner, tasks: Sequence[FewShotTask], numbers: Sequence[int], rate: float
) -> tuple[Any, Any]:
    """Copies of at most N tasks, and how they were learned."""
    settings, seed = learner.settings, learner.seed
    # The last group is filled up, so that one program serves all.
    filled = [*numbers] + [numbers[-1]] * (settings.tasks_at_once - len(numbers))
    x = _stacked([_demonstrations(tasks[n], (seed, n), settings) for n in filled])
    rows = [leaf[np.array(filled)][:, None] for leaf in jax.tree.leaves(learner.tables)]
    # The decoder of the copies has more leaves, which the vectors leave out.
    vectors = jax.tree.unflatten(jax.tree.structure(VECTORS.split(learner.params)[0]), rows)
    keys = ttt.sample_keys(jax.random.key(seed), np.array(filled))
    inputs = vectors, {"demonstrations": x}
    return learner.run(learner.params, inputs, keys, np.float32(rate))  # type: ignore[no-any-return]


def learn(
    learner: Learner,
    tasks: Sequence[FewShotTask],
    rate: float | None = None,
    log: Callable[[str], None] = print,
) -> Copies:
    """Copies of all tasks whose demonstrations have room in a row, N side by side.

    Args:
      learner: what learns.
      tasks: all of them; the number of a task is its place.
      rate: step size; that of the settings where None.
      log: takes a line per group of tasks.
    """
    settings = learner.settings
    rate = settings.rate if rate is None else rate
    numbers = [number for number, task in enumerate(tasks) if fits(task, settings)]
    parts, steps = [], {}
    for begin in range(0, len(numbers), settings.tasks_at_once):
        group = numbers[begin : begin + settings.tasks_at_once]
        fast, info = _group(learner, tasks, group, rate)
        parts.append(fast)
        taken = np.full(settings.tasks_at_once, settings.num_steps)
        if settings.held_out:
            taken = np.asarray(info.aux["taken"]).sum(1)
        steps |= dict(zip(group, taken.tolist(), strict=False))
        log(f"tasks {begin} to {begin + len(group) - 1}: steps {[steps[n] for n in group]}")
    # What fills the last group has no number.
    fast = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    places = {number: place for place, number in enumerate(numbers)}
    return Copies(learner.net, learner.params, fast, places, steps)


def held_out_nats(
    learner: Learner, tasks: Sequence[FewShotTask], rates: Sequence[float]
) -> list[list[float]]:
    """By step size, the mean nats per label of demonstrations held out, at every look of the guard.

    Of the first N tasks with room; no query is read, so that a step size may be chosen by it.

    Args:
      learner: with a guard.
      tasks: all of them.
      rates: step sizes.
    """
    numbers = [number for number, task in enumerate(tasks) if fits(task, learner.settings)]
    numbers = numbers[: learner.settings.tasks_at_once]
    made = []
    for rate in rates:
        _, info = _group(learner, tasks, numbers, rate)
        curves = np.asarray(info.aux["held_out"])[: len(numbers)]
        made.append(curves.mean(0).tolist())
    return made


def _demonstrations(
    task: FewShotTask, seed: tuple[int, int], settings: Settings
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = {"rows": settings.drawn, "length": settings.length, "most": settings.most}
    return grid_arrays.demonstrations(task, rng, **size)


def _stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def answer(
    copies: Copies,
    queries: Sequence[answers.Query],
    *,
    num_views: int,
    cache_tokens: int,
    seed: int,
    log: Callable[[str], None] = print,
) -> list[list[votes.Vote]]:
    """A vote per view of every query, each by its task's copy, outputs of like length together.

    Args:
      copies: among them one for the task of every query.
      queries: what is asked.
      num_views: V.
      cache_tokens: slots of all sequences that are decoded at once.
      seed: of the views.
      log: takes a line per call.
    """
    made: list[Any] = [None] * len(queries)
    jobs: list[list[Any]] = [[] for _ in queries]
    for job in answers.jobs(queries, num_views, seed):
        jobs[job.item.tag[0]].append(job)
    due = [max(job.due for job in each) for each in jobs]
    most = [(max(job.most for job in each), n) for n, each in enumerate(jobs)]
    buckets = answers.bucketed(range(len(queries)), due.__getitem__)
    counts = {slots: max(1, cache_tokens // (slots * num_views)) for slots in buckets}

    def operands(part: Sequence[int], slots: int) -> tuple[Any, Any]:
        filled = [*part, *[part[-1]] * (counts[slots] - len(part))]
        inputs = _stacked([answers.prefixes(jobs[n], num_views, slots) for n in filled])
        inputs["task"][:] = 0
        return _own(copies, queries, filled), inputs

    frozen = SELECTED.split(copies.params)[1]
    programs = answers.compiled(
        {
            slots: lambda slots=slots, bucket=bucket: _completion(copies.net, slots).lower(
                frozen, *operands(bucket[:1], slots)
            )
            for slots, bucket in buckets.items()
        }
    )
    for slots, bucket in buckets.items():
        # The longest output of a call decides how many steps it has.
        bucket.sort(key=most.__getitem__)
        for begin in range(0, len(bucket), counts[slots]):
            part = bucket[begin : begin + counts[slots]]
            tokens = np.asarray(programs[slots](frozen, *operands(part, slots)))
            log(f"{len(part)} queries of at most {slots} tokens, outputs of {most[part[-1]][0]}")
            for place, rows in zip(part, tokens, strict=False):
                made[place] = [
                    answers.vote_of(row, job.item.tag[2])
                    for row, job in zip(rows, jobs[place], strict=True)
                ]
    return made


def _own(copies: Copies, queries: Sequence[answers.Query], places: Sequence[int]) -> Any:
    rows = np.array([copies.places[queries[place].task] for place in places])
    return jax.tree.map(lambda leaf: leaf[rows], copies.fast)


def _completion(net: models.GridDecoder, slots: int) -> Any:
    """Tokens ``[N, V, T]`` of the views of one query of each of N copies, jitted."""
    # A loop over layers is compiled sooner, and hardly slower token by token.
    net = net.clone(unroll=1)

    @jax.jit
    def run(frozen: Any, fast: Any, inputs: Any) -> Any:
        def query(fast: Any, inputs: Any) -> jax.Array:
            params = narrow_factors(SELECTED.merge(fast, frozen), net.dtype)
            made = models.complete_grids(
                net, params, inputs, slots=slots, num_tokens=slots, axis_name="copies"
            )
            return made.tokens

        return jax.vmap(query, axis_name="copies")(fast, inputs)

    return run


def score(
    copies: Copies,
    queries: Sequence[answers.Query],
    given: Sequence[answers.Answers],
    *,
    settings: Settings,
    num_views: int,
    keep: int,
    seed: int,
    at_once: int = 16,
) -> list[answers.Answers]:
    """The answers with the log-probabilities of their candidates under their task's copy.

    Args:
      copies: among them one for the task of every query.
      queries: what was asked.
      given: the answers to each query.
      settings: of the copies.
      num_views: that score.
      keep: candidates of a query that are scored.
      seed: of the views.
      at_once: rows.
    """
    net, frozen = copies.net, SELECTED.split(copies.params)[1]

    @jax.jit
    def nats(frozen: Any, fast: Any, batch: Any) -> jax.Array:
        def row(fast: Any, batch: Any) -> jax.Array:
            params = narrow_factors(SELECTED.merge(fast, frozen), net.dtype)
            logits = net.apply(params, batch)
            return losses.sequence_sums(logits, batch).nats

        return jax.vmap(row)(fast, batch)

    def rows() -> Iterator[tuple[int, Any, Any]]:
        views = answers.scoring_views(num_views, seed)
        for number, pair in enumerate(zip(queries, given, strict=True)):
            items = answers.scored(number, *pair, views, settings.length, keep)
            for batch, tags in grid_sequences.pack(items, 1, settings.length, settings.most):
                yield number, batch._replace(task=np.zeros_like(batch.task))._asdict(), tags

    made = answers.unscored(given, num_views, keep)
    every = list(rows())
    for begin in range(0, len(every), at_once):
        part = every[begin : begin + at_once]
        filled = part + [part[-1]] * (at_once - len(part))
        fast = _own(copies, queries, [number for number, *_ in filled])
        values = np.asarray(nats(frozen, fast, _stacked([batch for _, batch, _ in filled])))
        for (_, _, tags), row in zip(part, values, strict=False):
            for _, slot, (number, candidate, place) in tags:
                made[number][candidate, place] = -row[0, slot]
    return [each._replace(log_probs=scores) for each, scores in zip(given, made, strict=True)]

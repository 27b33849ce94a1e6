"""Answers of the decoder under many views, the candidates they make, and what is chosen."""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arc import sources
from ttt_jax import losses, models, votes
from ttt_jax.data import grid_sequences
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.views import grid, grid_arrays

T = TypeVar("T")

BUCKETS = (256, 512, 896, 1408, 1920)
"""Slots of the caches that outputs are decoded with."""
_SLACK, _MORE, _MOST = 12, 1.1, 1.5


class Query(NamedTuple):
    """An input whose output is asked for.

    Attributes:
      task: number of its task.
      place: of the query in its task.
      example: input and, for the score alone, output.
      longest: tokens that its output has at most, as the demonstrations suggest.
    """

    task: int
    place: int
    example: Example
    longest: int


class Answers(NamedTuple):
    """What the views of a query answered.

    Attributes:
      votes: a vote per view, in the frame of the task.
      candidates: distinct answers, the most frequent first.
      counts: how often each was given.
      log_probs: ``[candidates scored, views]`` under fresh views; empty before the scoring.
    """

    votes: list[votes.Vote]
    candidates: tuple[Any, ...]
    counts: tuple[int, ...]
    log_probs: np.ndarray


def queries_of(tasks: Sequence[FewShotTask]) -> list[Query]:
    """All queries, with the size of output that their task's demonstrations lead to."""
    made = []
    for number, task in enumerate(tasks):
        for place, example in enumerate(task.queries):
            longest = grid_arrays.answer_length(task._replace(queries=(example,)))
            made.append(Query(number, place, example, longest))
    return made


def decode(
    net: models.GridDecoder,
    params: Any,
    queries: Sequence[Query],
    *,
    num_views: int,
    cache_tokens: int,
    seed: int,
    log: Callable[[str], None],
) -> list[list[votes.Vote]]:
    """A vote per view of every query, decoded together with queries of like length.

    Args:
      net: the decoder.
      params: of it.
      queries: what is asked.
      num_views: V; the first eight have the eight symmetries.
      cache_tokens: slots of all sequences that are decoded at once.
      seed: of the views.
      log: takes a line per bucket.
    """
    made: list[list[Any]] = [[None] * num_views for _ in queries]
    buckets = bucketed(list(jobs(queries, num_views, seed)), lambda job: job.due)
    counts = {slots: max(1, cache_tokens // slots) for slots in buckets}
    programs = compiled(
        {
            slots: functools.partial(
                _completion(net, slots).lower, params, prefixes((), count, slots)
            )
            for slots, count in counts.items()
        }
    )
    for slots, bucket in buckets.items():
        # The longest output of a call decides how many steps it has.
        bucket.sort(key=lambda job: (job.most, job.size))
        for begin in range(0, len(bucket), counts[slots]):
            part = bucket[begin : begin + counts[slots]]
            inputs = prefixes(part, counts[slots], slots)
            tokens = np.asarray(programs[slots](params, inputs).tokens)
            for job, row in zip(part, tokens, strict=False):
                number, place, view = job.item.tag
                made[number][place] = vote_of(row, view)
        log(f"decoded {len(bucket)} sequences of at most {slots} tokens")
    return made


def bucketed(items: Sequence[T], due: Callable[[T], int]) -> dict[int, list[T]]:
    """Items by the smallest bucket that has the slots that are due."""
    made: dict[int, list[T]] = {}
    for least, slots in zip((0, *BUCKETS), BUCKETS, strict=False):
        if bucket := [item for item in items if least < due(item) <= slots]:
            made[slots] = bucket
    return made


def compiled(lower: Mapping[int, Callable[[], Any]]) -> dict[int, Any]:
    """Programs by their bucket, compiled side by side, from what lowers them."""
    with futures.ThreadPoolExecutor() as pool:
        every = pool.map(lambda each: each().compile(), lower.values())
        return dict(zip(lower, every, strict=True))


class Job(NamedTuple):
    """A query under a view.

    Attributes:
      due: slots that its input and output need, as far as the demonstrations tell.
      size: tokens of the input.
      most: tokens of the output after which it is cut: more than the demonstrations lead to.
      item: its sequence; the tag is the place of the query, that of the view, and the view.
    """

    due: int
    size: int
    most: int
    item: sources.Item


def jobs(queries: Sequence[Query], num_views: int, seed: int) -> Iterator[Job]:
    """Every query under every view, query by query."""
    rng = np.random.default_rng((seed, 7))
    for number, query in enumerate(queries):
        bare = query.example._replace(output=None)
        for place, view in enumerate(grid.draw(rng, num_views)):
            item = grid_arrays.item(view, bare, number=query.task, tag=(number, place, view))
            size = len(item.sequence.token)
            due = min(size + int(_MORE * query.longest) + _SLACK, BUCKETS[-1])
            yield Job(due, size, int(_MOST * query.longest) + _SLACK, item)


def vote_of(tokens: np.ndarray, view: grid.GridView) -> votes.Vote:
    """What predicted tokens spell, in the frame of the task."""
    answer = grid_sequences.decode(tokens)
    return votes.Vote(None if answer is None else grid.apply(grid.inverse(view), answer), view)


def _completion(net: models.GridDecoder, slots: int) -> Any:
    """Outputs of a batch of inputs, jitted."""

    @jax.jit
    def run(params: Any, inputs: Any) -> Any:
        return models.complete_grids(net, params, inputs, slots=slots, num_tokens=slots)

    return run


def prefixes(part: Sequence[Job], count: int, slots: int) -> dict[str, np.ndarray]:
    """Inputs of a batch; rows that are left over have length 0."""
    inputs = {
        name: np.zeros((count, slots), np.int8) for name in ("token", "row", "column", "part")
    }
    inputs |= {name: np.zeros(count, np.int32) for name in ("length", "task", "view", "most")}
    for row, job in enumerate(part):
        item, size = job.item, job.size
        for name in ("token", "row", "column", "part"):
            inputs[name][row, :size] = getattr(item.sequence, name)
        inputs["length"][row], inputs["task"][row] = size, item.task
        inputs["view"][row], inputs["most"][row] = item.view, job.most
    return inputs


def candidates(all_votes: Sequence[Sequence[votes.Vote]]) -> list[Answers]:
    """Distinct answers by votes."""
    made = []
    for cast in all_votes:
        ranking = votes.majority(cast, attempts=len(cast))
        empty = np.zeros((0, 0))
        made.append(Answers(list(cast), ranking.answers, ranking.counts, empty))
    return made


def score(
    net: models.GridDecoder,
    members: Sequence[Any],
    queries: Sequence[Query],
    answers: Sequence[Answers],
    *,
    rows: sources.Rows,
    num_views: int,
    keep: int,
    seed: int,
) -> list[Answers]:
    """The answers with the log-probabilities of their most voted candidates under fresh views.

    Args:
      net: the decoder.
      members: parameters of it, of every decoder whose word counts; the log-probabilities of a
        candidate under the views of the first one, then of the next.
      queries: what was asked.
      answers: to each of them.
      rows: sizes of a batch.
      num_views: that score.
      keep: candidates of a query that are scored.
      seed: of the views.
    """
    views = scoring_views(num_views, seed)

    def everything() -> Iterator[sources.Item]:
        for number, pair in enumerate(zip(queries, answers, strict=True)):
            yield from scored(number, *pair, views, rows.length, keep)

    @jax.jit
    def nats(params: Any, batch: Any) -> jax.Array:
        return losses.sequence_sums(net.apply(params, batch), batch).nats

    made = unscored(answers, len(members) * num_views, keep)

    def take(values: Sequence[jax.Array], tags: Any) -> None:
        for member, each in enumerate(map(np.asarray, values)):
            for row, slot, (number, candidate, place) in tags:
                made[number][candidate, member * num_views + place] = -each[row, slot]

    # A batch is made while the device is at the one before.
    pending: collections.deque[Any] = collections.deque()
    for batch, tags in grid_sequences.pack(everything(), *rows):
        given = {name: jnp.asarray(leaf) for name, leaf in batch._asdict().items()}
        pending.append(([nats(params, given) for params in members], tags))
        if len(pending) > 1:
            take(*pending.popleft())
    for left in pending:
        take(*left)
    return [given._replace(log_probs=scores) for given, scores in zip(answers, made, strict=True)]


def scoring_views(count: int, seed: int) -> list[grid.GridView]:
    """Views that score, others than those that were decoded."""
    return grid.draw(np.random.default_rng((seed, 11)), count)


def scored(
    number: int,
    query: Query,
    given: Answers,
    views: Sequence[grid.GridView],
    length: int,
    keep: int,
) -> Iterator[sources.Item]:
    """The most voted candidates of a query under every view, where they have room.

    The tag of an item is the number, the place of the candidate, and that of the view.
    """
    for candidate, output in enumerate(given.candidates[:keep]):
        pair = Example(query.example.input, output)
        if grid_arrays.sizes([FewShotTask("", (pair,), ())]).pair <= length:
            for place, view in enumerate(views):
                tag = (number, candidate, place)
                yield grid_arrays.item(view, pair, number=query.task, tag=tag)


def unscored(answers: Sequence[Answers], num_views: int, keep: int) -> list[np.ndarray]:
    """``[candidates, views]`` of each query, -inf until they are scored."""
    return [np.full((min(keep, len(each.candidates)), num_views), -np.inf) for each in answers]


RULES = ("votes", "experts", "oracle")
"""How two answers are chosen: most votes, product of experts, the truth if a view had it."""


def ranked(given: Answers, rule: str, right: Sequence[bool]) -> list[int]:
    """Candidates in the order of a rule."""
    count = len(given.candidates)
    if rule == "oracle":
        return sorted(range(count), key=lambda place: not right[place])
    if rule == "experts" and len(given.log_probs):
        best = votes.product_of_experts(given.log_probs).tolist()
        return [*best, *range(len(best), count)]
    return list(range(count))


def solved(
    queries: Sequence[Query], answers: Sequence[Answers], attempts: int = 2
) -> dict[str, dict[int, bool]]:
    """By rule and task, whether every query has a right answer among the first attempts."""
    table: dict[str, dict[int, bool]] = {rule: {} for rule in RULES}
    for query, given in zip(queries, answers, strict=True):
        right = correct(query, given)
        for rule, tasks in table.items():
            first = ranked(given, rule, right)[:attempts]
            hit = any(right[place] for place in first)
            tasks[query.task] = tasks.get(query.task, True) and hit
    return table


def correct(query: Query, given: Answers) -> list[bool]:
    """Of each candidate, whether it is the output."""
    return [np.array_equal(answer, query.example.output) for answer in given.candidates]


def row_of(query: Query, given: Answers, names: Sequence[str]) -> dict[str, Any]:
    """What the file keeps of a query: enough to choose anew."""
    scores = given.log_probs.tolist()
    return {
        "task": names[query.task],
        "query": query.place,
        "votes": list(given.counts),
        "missing": sum(vote.answer is None for vote in given.votes),
        "right": correct(query, given),
        # A candidate that had no room to be scored has none, and JSON no infinity.
        "log_probs": [[round(v, 3) if np.isfinite(v) else None for v in c] for c in scores],
    }

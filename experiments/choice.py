"""``selection.json``: which candidate of each method validation chose, and all that were tried."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import journal, launch, provenance
from experiments.settings import Candidate
from ttt_jax import tuning
from ttt_jax.task import Task


def read(path: pathlib.Path) -> dict[str, Any]:
    """``selection.json``.

    Raises:
      UserError: it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(record["chosen"], dict) or not isinstance(record["tried"], list):
            raise TypeError("chosen is no object, or tried no list")
    except (ValueError, KeyError, TypeError) as error:
        raise launch.UserError(f"{path} is damaged ({error!r}); remove it.") from error
    return record


def choose(
    path: pathlib.Path,
    candidates: Mapping[str, Sequence[Candidate]],
    task: Task,
    runs: Any,
    shard: journal.Shard = journal.WHOLE,
) -> dict[str, Candidate]:
    """The chosen candidate per method; reads ``selection.json`` if the folder has one.

    The file is written after every candidate, and those that it has are not measured again. A shard
    begins with candidates of its own, then measures what no process is at work on, and waits for
    what another one measures.

    Args:
      path: ``selection.json``: ``{"note", "chosen": {method: settings}, "tried": [...]}``.
      candidates: of each method.
      task: whose ``chooses`` decides.
      runs: the model of a seed, an :class:`experiments.seed_run.SeedRun`.
      shard: of the process.

    Raises:
      UserError: a damaged file, or one that another model chose.
    """
    book = _Book(path, task, runs)
    record = book.read()
    _require_model(path, record, runs, candidates)
    for number, (label, grid) in enumerate(candidates.items()):
        if label in record["chosen"]:
            continue
        several = grid if len(grid) > 1 else ()
        _measure(book, several, runs, shard, f".lock.{number}")
        with book.changing() as record:
            entries = [_entry(record, candidate) for candidate in several]
            trials = [_trial(task, entry) for entry in entries if entry is not None]
            best = _plain(grid[tuning.best(trials) if trials else 0])
            record["chosen"].setdefault(label, best)
    return {
        label: next(one for one in grid if _plain(one) == record["chosen"][label])
        for label, grid in candidates.items()
    }


class _Book:
    """``selection.json``, to which several processes may add."""

    def __init__(self, path: pathlib.Path, task: Task, runs: Any):
        self.path = path
        self._new = {
            "note": _note(task, runs.streams),
            "seed": runs.seed,
            "checkpoint": runs.fingerprint,
        }

    def read(self) -> dict[str, Any]:
        if self.path.exists():
            return read(self.path)
        return {**self._new, "chosen": {}, "tried": []}

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """The record, written once it is changed."""
        with launch.locked(self.path.parent, ".lock.selection", wait=True):
            record = self.read()
            yield record
            launch.write_json(self.path, record)


def _measure(
    book: _Book, grid: Sequence[Candidate], runs: Any, shard: journal.Shard, lock: str
) -> None:
    """Sees to it that every candidate of a method has an entry that is no earlier failure."""
    record = book.read()
    entries = [_entry(record, candidate) for candidate in grid]
    failures = [entry for entry in entries if entry is not None and "message" in entry]
    order = sorted(enumerate(grid), key=lambda pair: not shard.takes(pair[0]))
    for wait in (False, True):
        for number, candidate in order:
            taken = launch.locked(book.path.parent, f"{lock}.{number}", wait=wait)
            with contextlib.suppress(launch.BusyError), taken:
                entry = _entry(book.read(), candidate)
                if entry is not None and entry not in failures:
                    continue
                if entry is not None:
                    failures.remove(entry)
                new = {"method": candidate.label, "params": candidate.settings}
                new |= runs.score(candidate)
                with book.changing() as record:
                    record["tried"] = [held for held in record["tried"] if held != entry]
                    record["tried"].append(new)


def _note(task: Task, streams: Sequence[str]) -> str:
    ties = "".join(f", then the lowest mean {name}" for name in task.ties)
    return (
        "Every setting with more than one candidate was chosen by the lowest mean "
        f"{task.chooses}{ties}, over the validation streams ({', '.join(streams)}), with the model "
        "of the first seed. In this run the reported split and streams chose nothing; how the "
        "candidates were set is said in the config."
    )


def _plain(candidate: Candidate) -> dict[str, Any]:
    return json.loads(json.dumps(candidate.settings))


def _entry(record: dict[str, Any], candidate: Candidate) -> dict[str, Any] | None:
    """What the file says of a candidate."""
    for entry in record["tried"]:
        settings = json.loads(json.dumps(entry["params"]))
        if entry["method"] == candidate.label and settings == _plain(candidate):
            return entry
    return None


def _trial(task: Task, entry: dict[str, Any]) -> tuning.Trial:
    names = (task.chooses, *task.ties)
    scores = {name: entry[name] for name in names if name in entry}
    return tuning.Trial(scores, entry.get("message", ""))


def _require_model(
    path: pathlib.Path,
    record: dict[str, Any],
    runs: Any,
    candidates: Mapping[str, Sequence[Candidate]],
) -> None:
    """One model chooses for all methods and seeds of a folder.

    Raises:
      UserError: the seed of the file has another model now, or what is still to be chosen would be
        with the model of another seed.
    """
    seed, chosen_with = record.get("seed"), record.get("checkpoint")
    if seed == runs.seed:
        model = {"checkpoint": chosen_with}, {"checkpoint": runs.fingerprint}
        differing = provenance.differences(*model)
        provenance.require_same(differing, path, "remove the file and the rows")
    several = [label for label, grid in candidates.items() if len(grid) > 1]
    open_choices = [label for label in several if label not in record["chosen"]]
    if seed != runs.seed and open_choices:
        raise launch.UserError(
            f"{path} was chosen with the model of seed {seed}, and {', '.join(open_choices)} has "
            f"several candidates and no choice yet; run --config.seeds='({seed},)' first, which "
            "chooses for all seeds."
        )

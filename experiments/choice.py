"""``selection.json``: which candidate of each method validation chose, and all that were tried."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import launch, provenance, team as team_lib
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
    team: team_lib.Team,
) -> dict[str, Candidate]:
    """The chosen candidate per method; reads ``selection.json`` if the folder has one.

    The file is written after every candidate, and those that it has are not measured again.

    Args:
      path: ``selection.json``: ``{"note", "chosen": {method: settings}, "tried": [...]}``.
      candidates: of each method.
      task: whose ``chooses`` decides.
      runs: the model of a seed, an :class:`experiments.seed_run.SeedRun`.
      team: the processes that share the run.

    Raises:
      UserError: a damaged file, or one that another model chose.
    """
    record: dict[str, Any] = {
        "note": _note(task, runs.streams),
        "seed": runs.seed,
        "checkpoint": runs.fingerprint,
        "chosen": {},
        "tried": [],
    }
    if team.index == 0 and path.exists():
        record = read(path)
        _require_model(path, record, runs, candidates)
    record = team_lib.agreed(team, record)

    def save() -> None:
        if team.index == 0:
            launch.write_json(path, record)

    for label, grid in candidates.items():
        if label in record["chosen"]:
            continue
        # What failed is tried again.
        record["tried"] = [
            entry for entry in record["tried"] if entry["method"] != label or "message" not in entry
        ]
        several = grid if len(grid) > 1 else ()
        todo = [one for one in several if _entry(record, one) is None]
        # Each process measures one; one that is measured is not measured again.
        for start in range(0, len(todo), team.count):
            part = todo[start : start + team.count]
            scores = runs.score(part[team.index]) if team.index < len(part) else None
            reports = team.collect(json.dumps(scores).encode())
            for candidate, report in zip(part, reports or (), strict=False):
                entry = {"method": label, "params": candidate.settings}
                record["tried"].append(entry | json.loads(report))
            save()
        entries = [_entry(record, candidate) for candidate in several]
        trials = [_trial(task, entry) for entry in entries if entry is not None]
        position = tuning.best(trials) if trials else 0
        record["chosen"][label] = _plain(grid[team_lib.agreed(team, position)])
        save()
    return {
        label: next(one for one in grid if _plain(one) == record["chosen"][label])
        for label, grid in candidates.items()
    }


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

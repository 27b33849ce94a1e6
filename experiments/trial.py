"""Units of a sweep in a process of their own: trains a model, or adapts it, trial by trial.

``experiments.sweep`` starts it, with the ids of one model or of some trials that share data and
compiled programs. What an earlier process of a unit finished is kept.
"""

import json
import pathlib
import sys
import traceback
from collections.abc import Sequence

from absl import flags

from experiments import adapt, launch, problem as problem_lib, train
from experiments.sweeping import plan, progress, state as state_lib
from experiments.sweeping.unit import Unit

# An earlier process of the unit may live on, such as on a node that a scheduler lost sight of. It
# is waited for, and what it finished is not done again.
_PATIENCE_S = 3600


def run(config: str, folder: str, ids: Sequence[str], retries: int) -> int:
    """Runs units one after the other and writes their states; returns 1 if one failed.

    Args:
      config: path of the config file.
      folder: that of the sweep, which holds its plan.
      ids: of the units.
      retries: how often a unit that failed may be tried again.

    Raises:
      UserError: an id that the plan has not.
    """
    workdir = pathlib.Path(folder)
    units = {unit.id: unit for unit in progress.load(workdir)}
    launch.chosen("unit", ids, units)
    found = {plan.digest(variant): variant for variant in plan.variants(config)}
    shared: dict[str, adapt.Shared] = {}
    worst = 0

    def shorter(unit: Unit) -> int:
        return -plan.most_steps(found[unit.digest]) if unit.digest in found else 0

    # Longest first: the others of a family are then there already.
    for unit in sorted((units[name] for name in ids), key=shorter):
        place = unit.folder(workdir)
        attempt = launch.open_workdir(str(place / "attempt"))
        with launch.locked(attempt, patience_s=_PATIENCE_S):
            before = state_lib.read(place)
            if before.state == "done":
                continue
            begun = state_lib.begun(before)
            state_lib.write(place, begun)
            work = shared.setdefault(unit.pack, adapt.Shared())
            outcome, message = _attempt(unit, workdir, found.get(unit.digest), work)
            state_lib.write(place, state_lib.ended(begun, outcome, message, retries))
            if outcome == "blocked":
                return 1
            worst = max(worst, int(outcome != "done"))
    return worst


def _attempt(
    unit: plan.Unit, workdir: pathlib.Path, variant: plan.Variant | None, shared: adapt.Shared
) -> tuple[str, str]:
    """Does the work of a unit; returns the outcome and what went wrong."""
    if variant is None:
        return "blocked", (
            "the config file or the code has changed since the sweep began; run the sweep again: "
            "what is still valid is kept."
        )
    place = unit.folder(workdir)
    try:
        if unit.needs is None:
            # A model may be that of other trials than when its training began; its id says that
            # all it depends on is the same.
            (place / "run.json").unlink(missing_ok=True)
            train.run(variant.config, str(place))
            return "done", ""
        model = workdir / "models" / unit.needs
        status = adapt.run(
            variant.config,
            str(place),
            checkpoint_path=str(problem_lib.checkpoint_path(model, variant.seed)),
            part=variant.part,
            shared=shared,
        )
        return ("failed", _failed_rows(place / "results.jsonl")) if status else ("done", "")
    except launch.WriteError as error:
        return "blocked", f"{error}"[:500]
    except Exception as error:  # the other trials of this process go on
        if launch.no_room(error):
            return "blocked", (
                f"the disk of {workdir} is full or read-only. What was written before is intact; "
                "free space or choose another --workdir, then run the same command again. "
                f"({f'{error}'[:300]})"
            )
        return _failure(error)


def _failure(error: Exception) -> tuple[str, str]:
    if isinstance(error, launch.UserError | ValueError | OSError):
        print(f"error: {error}", file=sys.stderr)
        return "failed", f"{error}"[:500]
    traceback.print_exception(error)
    return "failed", f"{type(error).__name__}: {error}"[:500]


def _failed_rows(path: pathlib.Path) -> str:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    failed = [row for row in rows if row["status"] != "ok"]
    first = failed[0]
    return f"{len(failed)} rows failed; {first['method']} on {first['domain']}: {first['message']}"


def command(
    python: str, config: str, workdir: str, ids: Sequence[str], retries: int
) -> tuple[str, ...]:
    """The command line that runs units."""
    values = {"config": config, "workdir": workdir, "ids": ",".join(ids), "retries": retries}
    given = (f"--{name}={value}" for name, value in values.items())
    return (python, "-m", "experiments.trial", *given)


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    try:
        return run(*(holder.value for holder in _FLAGS))
    except launch.BusyError as error:
        print(f"error: {error}", file=sys.stderr)
        return launch.TRY_AGAIN


if __name__ == "__main__":
    _FLAGS = (
        flags.DEFINE_string("config", None, "The config file.", required=True),
        flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True),
        flags.DEFINE_list("ids", None, "Units to run, in turn.", required=True),
        flags.DEFINE_integer("retries", 0, "Of a unit that fails.", 0),
    )
    launch.run(main)

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

from experiments import adapt, launch, pristine, train, writers
from experiments.sweeping import plan, progress, state as state_lib
from experiments.sweeping.unit import Unit

# An earlier process of the unit may live on, such as on a node that a scheduler lost sight of. It
# is waited for, and what it finished is not done again.
_PATIENCE_S = 3600


def run(
    config: str, folder: str, ids: Sequence[str], retries: int, trackers: Sequence[str] = ()
) -> int:
    """Runs units one after the other and writes their states; returns 1 if one failed.

    Args:
      config: path of the config file.
      folder: that of the sweep, which holds its plan.
      ids: of the units.
      retries: how often a unit that failed may be tried again.
      trackers: where scalars go beside the folders of the units.

    Raises:
      UserError: an id that the plan has not.
    """
    workdir = pathlib.Path(folder)
    units = {unit.id: unit for unit in progress.load(workdir)}
    launch.chosen("unit", ids, units)
    found = {plan.digest(variant): variant for variant in plan.variants(config)}
    worst = 0
    for unit in (units[name] for name in ids):
        place = unit.folder(workdir)
        attempt = launch.open_workdir(str(place / "attempt"))
        with launch.locked(attempt, patience_s=_PATIENCE_S):
            before = state_lib.read(place)
            if before.state == "done":
                continue
            begun = state_lib.begun(before)
            state_lib.write(place, begun)
            variant = found.get(unit.digest)
            outcome, message = _attempt(unit, workdir, variant, trackers)
            state_lib.write(place, state_lib.ended(begun, outcome, message, retries))
            # What a device went through may make every later call of this process fail.
            if outcome == "blocked" or "JaxRuntimeError" in message:
                return 1
            worst = max(worst, int(outcome != "done"))
    return worst


def _attempt(
    unit: Unit,
    workdir: pathlib.Path,
    variant: plan.Variant | None,
    trackers: Sequence[str],
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
            train.run(variant.config, str(place), trackers=trackers)
            return "done", ""
        model = workdir / "models" / unit.needs
        status = adapt.run(
            variant.config,
            str(place),
            checkpoint_path=str(pristine.path_of(model, variant.seed)),
            trackers=trackers,
            part=variant.part,
        )
        return ("failed", _failed_rows(place / "results.jsonl")) if status else ("done", "")
    except launch.WriteError as error:
        return "blocked", f"{error}"[:500]
    except Exception as error:  # the other trials of this process go on
        if launch.no_room(error):
            return "blocked", (
                "a disk is full or read-only. What was written before is intact; free space or "
                "choose another place, then run the same command again. "
                f"({f'{error}'[:500]})"
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
    return f"{len(failed)} rows failed; {first['method']} on {first['stream']}: {first['message']}"


def command(
    python: str,
    config: str,
    workdir: str,
    ids: Sequence[str],
    retries: int,
    trackers: Sequence[str],
) -> tuple[str, ...]:
    """The command line that runs units."""
    values = {"config": config, "workdir": workdir, "ids": ",".join(ids), "retries": retries}
    if trackers:
        values["trackers"] = ",".join(trackers)
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
        writers.define_flag(),
    )
    launch.run(main)

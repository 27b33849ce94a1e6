"""Units of a sweep: trains a model, or adapts it, in a process that ``experiments.sweep`` starts.

It reads the id of a unit per line, and answers each with ``[outcome, message]`` on a line; all else
that is printed goes to the errors. Units that run in turn share their data and compiled programs.
What an earlier process of a unit finished is kept.
"""

import json
import os
import pathlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import adapt, launch, pristine, train, writers
from experiments.sweeping import plan, progress
from experiments.sweeping.unit import Unit


class Trials:
    """The units of a sweep, as its config file and its code are now.

    Args:
      config: path of the config file.
      folder: that of the sweep, which holds its plan.
      trackers: where scalars go beside the folders of the units.
      overrides: of the config for all trials, as JSON by dotted key.
    """

    def __init__(
        self,
        config: str,
        folder: str,
        trackers: Sequence[str] = (),
        overrides: str = "{}",
    ):
        self._workdir = pathlib.Path(folder)
        self._trackers = trackers
        self._units = {unit.id: unit for unit in progress.load(self._workdir)}
        variants = plan.variants(config, json.loads(overrides))
        self._variants = {plan.digest(variant): variant for variant in variants}

    def attempt(self, name: str) -> tuple[str, str]:
        """Does the work of a unit; returns the outcome and what went wrong."""
        unit = self._units[name]
        if unit.digest not in self._variants:
            return "blocked", (
                "the config file or the code has changed since the sweep began; run the sweep "
                "again: what is still valid is kept."
            )
        variant = self._variants[unit.digest]
        # Sets too large for memory take too long to be read once more for every unit.
        if variant.config.data.get("in_memory", True):
            if unit.id not in {present.id for present in plan.units([variant])}:
                return "blocked", (
                    "the images or labels have changed since the sweep began; bring back the old "
                    "data, or run the sweep again, which makes all that depends on them anew."
                )
        try:
            return self._run(unit, variant)
        except launch.BusyError as error:
            return "interrupted", f"{error}"[:500]
        except launch.WriteError as error:
            return "blocked", f"{error}"[:500]
        except Exception as error:  # the other trials go on
            if launch.no_room(error):
                return "blocked", launch.sentence(error)[:700]
            if isinstance(error, launch.MENDABLE):
                print(f"error: {error}", file=sys.stderr)
                return "failed", f"{error}"[:500]
            traceback.print_exception(error)
            return "failed", f"{type(error).__name__}: {error}"[:500]

    def _run(self, unit: Unit, variant: plan.Variant) -> tuple[str, str]:
        place = unit.folder(self._workdir)
        if unit.needs is None:
            # A model may be that of other trials than when its training began; its id says that
            # all it depends on is the same.
            (place / "run.json").unlink(missing_ok=True)
            train.run(variant.config, str(place), trackers=self._trackers)
            return "done", ""
        model = self._workdir / "models" / unit.needs
        status = adapt.run(
            variant.config,
            str(place),
            checkpoint_path=str(pristine.path_of(model, variant.seed)),
            trackers=self._trackers,
            part=variant.part,
        )
        return ("failed", _failed_rows(place / "results.jsonl")) if status else ("done", "")


def _failed_rows(path: pathlib.Path) -> str:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    failed = [row for row in rows if row["status"] != "ok"]
    first = failed[0]
    return f"{len(failed)} rows failed; {first['method']} on {first['stream']}: {first['message']}"


def command(
    config: str, folder: str, trackers: Sequence[str], overrides: Mapping[str, Any]
) -> tuple[str, ...]:
    """The command line that runs units."""
    values = {"config": config, "workdir": folder, "trackers": ",".join(trackers)}
    values["overrides"] = json.dumps(dict(overrides))
    given = (f"--{name}={value}" for name, value in values.items())
    return (sys.executable, "-m", "experiments.trial", *given)


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    trials = Trials(*(holder.value for holder in _FLAGS))
    for line in sys.stdin:
        answers.write(json.dumps(trials.attempt(line.strip())) + "\n")


if __name__ == "__main__":
    _FLAGS = (
        flags.DEFINE_string("config", None, "The config file.", required=True),
        flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True),
        writers.define_flag(),
        flags.DEFINE_string("overrides", "{}", "Of the config for all trials, as JSON."),
    )
    launch.run(main)

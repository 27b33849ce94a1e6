"""How far a sweep is: read from its folder, by any process."""

import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from experiments import launch
from experiments.sweeping import state as state_lib
from experiments.sweeping.unit import Unit

PLAN = "plan.json"
_LISTED, _BAR = 8, 30


class Progress(NamedTuple):
    """Of a sweep.

    Attributes:
      states: that of every unit, in order.
      counts: trials per state.
      seconds_left: an estimate, from the trials that are done; None where there is no ground.
    """

    states: list[state_lib.State]
    counts: dict[str, int]
    seconds_left: float | None


def save(workdir: pathlib.Path, units: Sequence[Unit]) -> None:
    """Writes what the sweep is going to do, for :func:`load`."""
    text = json.dumps([unit._asdict() for unit in units], indent=1)
    launch.write_atomically(workdir / PLAN, text + "\n")


def load(workdir: pathlib.Path) -> list[Unit]:
    """The units of the sweep of a folder.

    Raises:
      UserError: there is no sweep, or its plan is damaged.
    """
    path = workdir / PLAN
    try:
        return [Unit(**unit) for unit in json.loads(path.read_text())]
    except FileNotFoundError as error:
        raise launch.UserError(f"there is no sweep in {workdir}: it has no {PLAN}.") from error
    except (ValueError, TypeError) as error:
        raise launch.UserError(f"{path} is damaged ({error}); run the sweep again.") from error


def measure(workdir: pathlib.Path, units: Sequence[Unit]) -> Progress:
    """Reads the states of all units."""
    return summarized(units, [state_lib.read(unit.folder(workdir)) for unit in units])


def summarized(units: Sequence[Unit], states: Sequence[state_lib.State]) -> Progress:
    """The progress that the states of all units, in their order, amount to."""
    pairs = list(zip(units, states, strict=True))
    lost = {unit.id for unit, state in pairs if state.state == "failed"}
    # A trial whose model failed will not run.
    trials = [
        state._replace(state="failed") if unit.needs in lost else state
        for unit, state in pairs
        if unit.kind == "trial"
    ]
    counts = {name: sum(s.state == name for s in trials) for name in state_lib.STATES}
    return Progress(list(states), counts, _left(trials, counts))


def _left(trials: Sequence[state_lib.State], counts: dict[str, int]) -> float | None:
    spent = [s.finished - s.started for s in trials if s.state == "done"]
    if not spent or not counts["running"]:
        return None
    each, now = statistics.mean(spent), time.time()
    running = [max(0.0, each - (now - s.started)) for s in trials if s.state == "running"]
    return (sum(running) + each * counts["waiting"]) / counts["running"]


def table(units: Sequence[Unit], progress: Progress, columns: int | None = None) -> str:
    """A bar, counts, time left; then what has run longest and what failed, a line each.

    Args:
      units: of the sweep.
      progress: of the same units.
      columns: cut lines to that width, so that a terminal does not wrap them.
    """
    counts = progress.counts
    total = sum(counts.values())
    line = ", ".join(f"{counts[name]} {name}" for name in ("done", "running", "waiting", "failed"))
    if progress.seconds_left is not None:
        line += f"; about {_duration(progress.seconds_left)} left"
    filled = _BAR * (counts["done"] + counts["failed"]) // max(1, total)
    lines = [f"[{'#' * filled}{'.' * (_BAR - filled)}] {total} trials: {line}"]
    now, pairs = time.time(), list(zip(units, progress.states, strict=True))
    running = [(state.started, unit) for unit, state in pairs if state.state == "running"]
    running.sort(key=lambda pair: pair[0])
    lines += _listed(
        [f"  running {_duration(now - t):>6}  {unit.id}  {unit.label}" for t, unit in running],
        "run",
    )
    lines += _listed(
        [
            f"  failed   {unit.id}  {unit.label}: {state.message}"
            for unit, state in pairs
            if state.state == "failed"
        ],
        "failed",
    )
    return "\n".join(line[:columns] for line in lines)


def _listed(lines: list[str], what: str) -> list[str]:
    more = len(lines) - _LISTED
    return lines[:_LISTED] + ([f"  and {more} more that {what}"] if more > 0 else [])


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"

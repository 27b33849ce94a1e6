"""How far a sweep is: read from its folder, by any process."""

import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import tqdm

from experiments import launch
from experiments.sweeping import state as state_lib
from experiments.sweeping.state import FINAL, State
from experiments.sweeping.unit import Unit

PLAN = "plan.json"
_LISTED, _BAR = 8, 30


class Progress(NamedTuple):
    """Of a sweep.

    Attributes:
      states: that of every unit, in order.
      counts: trials per state; one whose model failed counts as failed.
      wanted: how many units could be at work side by side now; none once all has ended.
      seconds_left: an estimate, from the trials that are done; None where there is no ground.
    """

    states: list[State]
    counts: dict[str, int]
    wanted: int
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


def measure(
    workdir: pathlib.Path, units: Sequence[Unit], earlier: Progress | None = None
) -> Progress:
    """Reads the states of all units, but for those that had ended in an earlier measurement."""
    known = earlier.states if earlier else [State()] * len(units)
    states = [
        state if state.state in FINAL else state_lib.read(unit.folder(workdir))
        for unit, state in zip(units, known, strict=True)
    ]
    return summarized(units, states)


def summarized(units: Sequence[Unit], states: Sequence[State]) -> Progress:
    """The progress that the states of all units, in their order, amount to."""
    models = {unit.id: state.state for unit, state in zip(units, states, strict=True)}
    wanted, trials = 0, []
    for unit, state in zip(units, states, strict=True):
        model = models.get(unit.needs or "", "done")
        wanted += model == "done" and state.state not in FINAL
        if unit.kind == "trial":
            trials.append(state._replace(state="failed") if model == "failed" else state)
    counts = {name: sum(s.state == name for s in trials) for name in state_lib.STATES}
    return Progress(list(states), counts, wanted, _left(trials, counts))


def _left(trials: Sequence[State], counts: dict[str, int]) -> float | None:
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
    line += f", {counts['unknown']} unknown" if counts["unknown"] else ""
    if progress.seconds_left is not None:
        line += f"; about {tqdm.tqdm.format_interval(progress.seconds_left)} left"
    filled = _BAR * (counts["done"] + counts["failed"]) // max(1, total)
    lines = [f"[{'#' * filled}{'.' * (_BAR - filled)}] {total} trials: {line}"]
    pairs = list(zip(units, progress.states, strict=True))
    running = sorted((state.started, u) for u, state in pairs if state.state == "running")
    failed = [(state.message, unit) for unit, state in pairs if state.state == "failed"]
    for since, unit in running[:_LISTED]:
        lasted = tqdm.tqdm.format_interval(time.time() - since)
        lines.append(f"  running  {unit.id}  {unit.label}: {lasted}")
    lines += [f"  and {len(running) - _LISTED} more that run"] * (len(running) > _LISTED)
    lines += [f"  failed   {unit.id}  {unit.label}: {said}" for said, unit in failed[:_LISTED]]
    lines += [f"  and {len(failed) - _LISTED} more that failed"] * (len(failed) > _LISTED)
    unknown = [(u.id, s.message) for u, s in pairs if s.state == "unknown"]
    lines += [f"  unknown  {name}: {said}" for name, said in unknown[:_LISTED]]
    return "\n".join(line[:columns] for line in lines)


def faults(workdir: pathlib.Path, units: Sequence[Unit], progress: Progress) -> list[str]:
    """Why units failed: each different message once, with how many and the log of the first."""
    found: dict[str, list[Unit]] = {}
    for unit, state in zip(units, progress.states, strict=True):
        if state.state == "failed":
            found.setdefault(state.message, []).append(unit)
    return [
        f"failed ({len(failed)}): {message} (log: {failed[0].folder(workdir) / 'log.txt'})\n"
        for message, failed in found.items()
    ]

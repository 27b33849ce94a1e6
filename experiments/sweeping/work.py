"""Who does which unit of a sweep: whoever finds it waiting, and nobody at work on it.

Any number of processes, on any number of machines, take units from a folder. A unit is taken under
a lock, which dies with its holder, so that what is running without one was killed.
"""

import pathlib
import threading
from collections.abc import Iterable

from experiments import launch
from experiments.sweeping import progress, state as state_lib
from experiments.sweeping.process import Job, Process
from experiments.sweeping.unit import Unit


def run(job: Job, stop: threading.Event) -> bool:
    """Does units that one process can run in turn; returns whether there was one.

    Only trials of the same pack share a process. A model has one of its own.

    Args:
      job: what takes them.
      stop: set to end it; the unit that it is at work on is interrupted.

    Raises:
      UserError: a unit met something that no other attempt would mend, or a state cannot be
        written.
    """
    workdir, limits, process = pathlib.Path(job.workdir), job.limits, Process(job)
    done: list[Unit] = []
    trained: dict[str | None, bool] = {None: True}
    try:
        for unit in progress.load(workdir):
            if stop.is_set() or len(done) == limits.pack or (done and not done[0].pack):
                break
            if done and unit.pack != done[0].pack:
                continue
            if unit.needs is None:
                trained[unit.id] = state_lib.read(unit.folder(workdir)).state == "done"
            if trained[unit.needs] and _take(unit.folder(workdir), limits.retries, process, stop):
                done.append(unit)
    finally:
        process.end()
    return bool(done)


def _take(folder: pathlib.Path, retries: int, process: Process, stop: threading.Event) -> bool:
    """Does the unit of a folder, if it waits for that."""
    if state_lib.read(folder).state in ("done", "failed"):
        return False
    attempt = folder / "attempt"
    with launch.writing(attempt):
        attempt.mkdir(parents=True, exist_ok=True)
    try:
        with launch.locked(attempt):
            state = state_lib.read(folder)
            if state.state == "running":
                state = state_lib.ended(state, "interrupted", "its job was killed", retries)
                state_lib.write(folder, state)
            if state.state == "unknown":
                state = state_lib.State()
            if state.state == "waiting":
                state = state_lib.begun(state)
                state_lib.write(folder, state)
                outcome, message = process.attempt(folder, stop)
                state = state_lib.ended(state, outcome, message, retries)
                state_lib.write(folder, state)
            elif state.state != "blocked":
                return False
    except launch.BusyError:
        return False
    if state.state == "blocked":
        raise launch.UserError(state.message)
    return True


def reopen(folders: Iterable[pathlib.Path], *, retry_failed: bool) -> None:
    """Has units wait that did not end in an earlier run: what stood in their way may be gone.

    Args:
      folders: of the units.
      retry_failed: those that failed for good, too, as if they never had.
    """
    for folder in folders:
        before = state_lib.read(folder)
        if before.state == "done" or (before.state == "failed" and not retry_failed):
            continue
        state = state_lib.State(failures=0 if before.state == "failed" else before.failures)
        if state != before:
            state_lib.write(folder, state)

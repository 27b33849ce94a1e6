"""How far a unit of a sweep is: one small file beside its results, replaced as a whole."""

import json
import pathlib
import time
from typing import NamedTuple

from experiments import launch

STATES = ("waiting", "running", "done", "failed", "blocked", "unknown")
FINAL = ("done", "failed")
# Of one unit, in one run of the sweep: something kills it, such as the system for its memory.
_MOST_INTERRUPTIONS = 20


class State(NamedTuple):
    """Of one unit.

    Attributes:
      state: one of :data:`STATES`; a unit is blocked by what no other attempt would mend, such as a
        full disk, and the sweep ends; one whose file is damaged is unknown.
      failures: attempts that ended in an error.
      interruptions: attempts of this run of the sweep that were killed, or told to stop.
      message: of the last error.
      started: when the last attempt began, seconds since 1970.
      finished: when it ended.
    """

    state: str = "waiting"
    failures: int = 0
    interruptions: int = 0
    message: str = ""
    started: float = 0.0
    finished: float = 0.0


def read(folder: pathlib.Path) -> State:
    """The state of the unit of a folder: waiting if it never ran, unknown if its file is damaged.

    What is unknown is done again; what its files have is kept.
    """
    path = folder / "state.json"
    try:
        state = State(**json.loads(path.read_text()))
        if state.state not in STATES:
            raise ValueError(f"there is no state {state.state!r}")
    except FileNotFoundError:
        return State()
    except (ValueError, TypeError) as error:
        message = f"{path} is damaged ({error}); the sweep does it again, and keeps its rows."
        return State("unknown", message=message)
    return state


def write(folder: pathlib.Path, state: State) -> None:
    """Replaces the state of a folder, which is made if missing."""
    with launch.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    launch.write_atomically(folder / "state.json", json.dumps(state._asdict()) + "\n")


def begun(state: State) -> State:
    """The state of a unit whose next attempt begins."""
    return state._replace(state="running", started=time.time(), finished=0.0)


def ended(state: State, outcome: str, message: str, retries: int) -> State:
    """The state after an attempt.

    Args:
      state: before.
      outcome: ``"done"``, ``"failed"``, ``"interrupted"`` or ``"blocked"``.
      message: of the error.
      retries: how often a unit that failed is tried again; an interrupted one is 20 times.
    """
    state = state._replace(state=outcome, finished=time.time(), message=message)
    if outcome == "failed":
        state = state._replace(failures=state.failures + 1)
        return state._replace(state="waiting") if state.failures <= retries else state
    if outcome == "interrupted":
        killed = state.interruptions + 1
        state = state._replace(state="waiting", interruptions=killed)
        if killed > _MOST_INTERRUPTIONS:
            message = f"killed {killed} times: {message}"
            return state._replace(state="failed", message=message)
    return state

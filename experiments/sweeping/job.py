"""A process that runs units of a sweep: the limits on it, and the states it could not write.

This runs inside a job of the executor, on the machine that does the work. The process dies with
the job, and the job with the sweep if that runs on the same machine.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import psutil

from experiments import launch
from experiments.sweeping import state as state_lib

_POLL_S = 0.2
# For a process that was told to stop: it needs no time, since what it finished is on disk.
_GRACE_S = 5.0
_TETHER = str(pathlib.Path(__file__).with_name("tether.py"))


class Job(NamedTuple):
    """What an executor is given.

    Attributes:
      command: starts the process, which writes the states of its units.
      folders: of the units that the process runs.
      environment: further variables of the process.
      cores: the cores it may use; empty for all.
      owner: the sweep's process and when it began, where that is on the same machine: without it
        the job ends. None elsewhere.
      retries: how often a unit that failed is tried again.
      time_limit_s: seconds of one attempt of one unit.
      memory_limit_gb: gigabytes of resident memory of the process and its children; 0 for no limit.
    """

    command: Sequence[str]
    folders: Sequence[str]
    environment: Mapping[str, str]
    cores: Sequence[int]
    owner: tuple[int, float] | None
    retries: int
    time_limit_s: float
    memory_limit_gb: float


class _Stopped(Exception):
    """The job was told to stop."""


def owner() -> tuple[int, float]:
    """This process, as :class:`Job` names it."""
    return os.getpid(), psutil.Process().create_time()


def _alive(process: tuple[int, float]) -> bool:
    try:
        found = psutil.Process(process[0])
        # One that was killed stays, as a zombie, until its parent looks.
        return found.create_time() == process[1] and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run(job: Job) -> str:
    """Runs units; returns how their process ended: ``"done"``, ``"failed"``, ``"interrupted"``."""
    folders = [pathlib.Path(folder) for folder in job.folders]
    before = [state_lib.read(folder) for folder in folders]
    if all(state.state == "done" for state in before):  # such as by a scheduler that requeues
        return "done"
    started = time.time()
    outcome, message = _attempt(job, folders)
    after = [state_lib.read(folder) for folder in folders]
    charged = [n for n, state in enumerate(after) if state.state == "running"]
    if after == before:
        # It did not come as far as a unit: the first one stands for what is wrong with it.
        charged = [next(n for n, state in enumerate(after) if state.state != "done")]
        after[charged[0]] = state_lib.begun(after[charged[0]])._replace(started=started)
    if charged and outcome == "done":
        outcome, message = "failed", "its process ended without a word"
    for n in charged:
        state_lib.write(folders[n], state_lib.ended(after[n], outcome, message, job.retries))
    return outcome


def _attempt(job: Job, folders: Sequence[pathlib.Path]) -> tuple[str, str]:
    if job.owner is not None and not _alive(job.owner):
        return "interrupted", "the sweep ended"
    cores = ",".join(map(str, job.cores))
    tethered = [sys.executable, _TETHER, str(os.getpid()), cores, *job.command]

    def stop(*_: object) -> None:
        raise _Stopped

    handlers = {kind: signal.signal(kind, stop) for kind in (signal.SIGTERM, signal.SIGINT)}
    folders[0].mkdir(parents=True, exist_ok=True)
    log = folders[0] / "log.txt"
    process = None
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                tethered,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Unbuffered: the last line of the log must be what was said last.
                env={**os.environ, "PYTHONUNBUFFERED": "1", **job.environment},
            )
        return _watch(job, folders, process, log)
    except _Stopped:
        return "interrupted", "told to stop"
    finally:
        if process is not None:
            _end(process)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def _watch(
    job: Job,
    folders: Sequence[pathlib.Path],
    process: subprocess.Popen[bytes],
    log: pathlib.Path,
) -> tuple[str, str]:
    started, above = time.time(), os.getppid()
    while process.poll() is None:
        time.sleep(_POLL_S)
        if os.getppid() != above or (job.owner is not None and not _alive(job.owner)):
            return "interrupted", "the sweep ended"
        states = [state_lib.read(folder) for folder in folders]
        begun = [state.started for state in states if state.state == "running"]
        # Until it comes to a unit, what counts is its own start, and then that of its last unit.
        ended = [state.finished for state in states]
        if time.time() - max([started, *begun, *ended]) > job.time_limit_s:
            return "failed", f"took longer than its limit of {job.time_limit_s / 60:g} minutes"
        if job.memory_limit_gb and (used := _resident(process.pid)) > job.memory_limit_gb * 1e9:
            return "failed", (
                f"used {used / 1e9:.2f} GB, more than its limit of {job.memory_limit_gb:g} GB"
            )
    if process.returncode == 0:
        return "done", ""
    if process.returncode == launch.TRY_AGAIN:
        return "interrupted", _last_line(log) or "asked to be started again"
    if process.returncode in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
        return "interrupted", f"killed by {signal.Signals(-process.returncode).name}"
    return "failed", _last_line(log) or f"exit status {process.returncode}"


def _resident(pid: int) -> int:
    """Bytes of resident memory of a process and its children."""
    try:
        main = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (main, *main.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children, gently first."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def _last_line(log: pathlib.Path) -> str:
    """The last line of a log that says something, at most 500 characters."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:500] if said else ""

"""The process that does the work of a sweep, within limits.

It does nothing else: it is told the id of a unit per line, and answers each with a line of JSON,
``[outcome, message]``. It is started anew after an error, or when it has died, and it dies with the
one that holds it.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import psutil

from experiments import launch

_POLL_S = 0.2
_TETHER = str(pathlib.Path(__file__).with_name("tether.py"))


class Limits(NamedTuple):
    """On one unit.

    Attributes:
      retries: how often one that failed is tried again.
      time_s: seconds of one attempt.
      memory_gb: resident memory of a process and its children; 0 for no limit.
      pack: how many trials one process runs in turn, at most.
    """

    retries: int = 1
    time_s: float = 86400.0
    memory_gb: float = 0.0
    pack: int = 16


class Job(NamedTuple):
    """What takes units.

    Attributes:
      workdir: the folder of the sweep, which holds its plan.
      command: starts the process that does the work.
      environment: further variables of the process.
      limits: on every unit.
      cores: that the process may use; empty for all.
    """

    workdir: str
    command: Sequence[str]
    environment: Mapping[str, str]
    limits: Limits = Limits()
    cores: Sequence[int] = ()


class Process:
    """The process of a job, which starts when it is needed."""

    def __init__(self, job: Job):
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self, folder: pathlib.Path) -> subprocess.Popen[bytes]:
        self._log = folder / "log.txt"
        cores = ",".join(map(str, self._job.cores))
        with launch.writing(self._log), self._log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, _TETHER, str(os.getpid()), cores, *self._job.command],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                # Unbuffered: the last line of the log must be what was said last.
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self._job.environment},
                start_new_session=True,
            )

    def attempt(self, folder: pathlib.Path, stop: threading.Event) -> tuple[str, str]:
        """Has the unit of a folder done.

        Args:
          folder: of the unit, called by its id.
          stop: set to end it.

        Returns:
          The outcome, as :func:`experiments.sweeping.state.ended` takes it, and what went wrong.
        """
        process = self._process = self._process or self._start(folder)
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died
            process.stdin.write(f"{folder.name}\n".encode())  # type: ignore[union-attr]
        outcome, message = self._answer(process, started, stop)
        if outcome != "done":
            # What a device went through may make every later call of the process fail.
            self.end()
        return outcome, message

    def _answer(
        self, process: subprocess.Popen[bytes], started: float, stop: threading.Event
    ) -> tuple[str, str]:
        limits = self._job.limits
        while not select.select([process.stdout], [], [], _POLL_S)[0]:
            if stop.is_set():
                return "interrupted", "told to stop"
            if time.monotonic() - started > limits.time_s:
                return "failed", f"took longer than its limit of {limits.time_s / 60:g} minutes"
            if limits.memory_gb and (used := _resident(process.pid) / 1e9) > limits.memory_gb:
                most = limits.memory_gb
                return "failed", f"used {used:.2f} GB, more than its limit of {most:g} GB"
        if answer := process.stdout.readline():  # type: ignore[union-attr]
            outcome, message = json.loads(answer)
            return outcome, message
        status, said = process.wait(), _last_line(self._log)
        if status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            return "interrupted", f"killed by {signal.Signals(-status).name}"
        return "failed", said or f"its process ended with exit status {status}"

    def end(self) -> None:
        """Kills the process and its children: what they finished is on disk."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def _resident(pid: int) -> int:
    """Bytes of resident memory of a process and its children."""
    try:
        main = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (main, *main.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def _last_line(log: pathlib.Path) -> str:
    """The last line of a log that says something, at most 500 characters."""
    said = log.read_bytes().rstrip()[-4000:].decode("utf-8", "replace").splitlines()
    return said[-1].strip()[:500] if said else ""

"""Several processes that share one run: who this one is, and what it tells the others.

Each process runs the same program over its own share of the work, on its own devices; no compiled
code reaches over processes. The first one decides, gathers and writes. See :mod:`experiments.link`
for how they talk.
"""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, NoReturn, Protocol

import jax

from experiments import launch, link

_TETHER = pathlib.Path(__file__).parent / "sweeping" / "tether.py"


class Team(Protocol):
    """The processes of a run; this one is ``index`` of ``count``."""

    index: int
    count: int

    def collect(self, data: bytes) -> list[bytes] | None:
        """What all processes gave, in their order, on the first one; None on the others."""

    def broadcast(self, data: bytes) -> bytes:
        """What the first process gave, on all."""


class _Alone:
    index, count = 0, 1

    def collect(self, data: bytes) -> list[bytes] | None:
        return [data]

    def broadcast(self, data: bytes) -> bytes:
        return data


ALONE: Team = _Alone()


def agreed(team: Team, value: Any) -> Any:
    """The first process's value, which JSON can hold, on all processes."""
    return value if team.count == 1 else json.loads(team.broadcast(json.dumps(value).encode()))


class Rendezvous(NamedTuple):
    """Where the processes meet; ``jax.distributed`` finds out what is None.

    Attributes:
      coordinator: ``HOST:PORT`` of the first process.
      count: of the processes.
      index: of this one.
      patience_s: how long to wait for the others at the start.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    patience_s: int = 300

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
          UserError: some of the three without the others, or a number out of range.
        """
        given = (self.coordinator, self.count, self.index)
        if None in given:
            if any(value is not None for value in given):
                raise launch.UserError(
                    "--coordinator, --num_processes and --process_id go together; got "
                    f"{self.coordinator!r}, {self.count!r} and {self.index!r}. Give all three, or "
                    "none under Slurm, where JAX finds them."
                )
            return
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not port.isdigit():
            raise launch.UserError(f"--coordinator must be HOST:PORT; got {self.coordinator!r}.")
        if not 0 <= int(self.index or 0) < int(self.count or 0):
            raise launch.UserError(
                "--process_id must lie between 0 and --num_processes - 1; got "
                f"{self.index} of {self.count}."
            )


class _Linked:
    """A team behind a link, with a thread that ends this process when the link ends."""

    def __init__(self, process: "subprocess.Popen[bytes]", said: IO[bytes], index: int, count: int):
        self._process, self._said, self.index, self.count = process, said, index, count
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._leaving = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def collect(self, data: bytes) -> list[bytes] | None:
        self._tell(link.Frame(link.COLLECT, data))
        return None if self.index else [self._answers.get() for _ in range(self.count)]

    def broadcast(self, data: bytes) -> bytes:
        self._tell(link.Frame(link.BROADCAST, b"" if self.index else data))
        return self._answers.get()

    def leave(self, frame: link.Frame) -> None:
        """Ends the link; what happens to the others is no matter from now on."""
        self._leaving.set()
        self._tell(frame)
        # However long the others take to come: a link that ended early would end them too.
        self._process.wait()

    def _tell(self, frame: link.Frame) -> None:
        # Where the pipe is broken the listener ends this process, with the reason.
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            link.write(self._process.stdin, frame)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        while (frame := link.read(self._process.stdout)) is not None:
            if frame.kind == link.FAIL:
                code, _, text = frame.data.decode().partition(" ")
                self._end(int(code), text)
            self._answers.put(frame.data)
        self._end(
            launch.TRY_AGAIN,
            "another process of this run has died, and so it ends. What is finished is kept: start "
            "all processes again with the same command to go on.",
        )

    def _end(self, code: int, text: str) -> None:
        if self._leaving.is_set():
            sys.exit()  # this thread alone
        if code == launch.TRY_AGAIN:
            _said_by(self._said)
        print(f"error: {text}", file=sys.stderr, flush=True)
        # Nothing else would end a thread that waits for an answer or for a device.
        os._exit(code)


@contextlib.contextmanager
def joined(where: Rendezvous) -> Iterator[Team]:
    """The team of this process; if it fails, the others end with its message.

    Raises:
      UserError: an impossible rendezvous, or one that others did not come to.
    """
    where.check()
    values = {
        "coordinator_address": where.coordinator,
        "num_processes": where.count,
        "process_id": where.index,
        "initialization_timeout": where.patience_s,
    }
    with tempfile.TemporaryFile() as said:
        tethered = [sys.executable, str(_TETHER), str(os.getpid()), ""]
        process = subprocess.Popen(
            [*tethered, sys.executable, "-m", "experiments.link", json.dumps(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )
        assert process.stdout is not None
        answer = link.read(process.stdout)
        if answer is None:
            process.wait()
            _refuse(where, process.returncode, _said_by(said))
        told = json.loads(answer.data)
        if told["visible"] not in (None, "all"):
            jax.config.update("jax_cuda_visible_devices", told["visible"])
            jax.config.update("jax_rocm_visible_devices", told["visible"])
        team = _Linked(process, said, told["index"], told["count"])
        try:
            yield team
        except Exception as error:
            code = 2 if isinstance(error, launch.MENDABLE) else 1
            team.leave(link.Frame(link.FAIL, f"{code} {error}".encode()))
            raise
        team.leave(link.Frame(link.DONE))


def _said_by(file: IO[bytes]) -> str:
    """What the link wrote, with the stack of an abort; shown to those who ask for tracebacks."""
    file.seek(0)
    text = file.read().decode("utf-8", "replace")
    if os.environ.get("TTT_JAX_TRACEBACK"):
        print(text, file=sys.stderr)
    return text


def _refuse(where: Rendezvous, status: int, said: str) -> NoReturn:
    """Says why there is no team."""
    lines = [line for line in said.splitlines() if line.strip()] or [f"exit status {status}"]
    reason = lines[-1].partition(": ")[2] or lines[-1]
    # JAX aborts where it waited in vain, and has an error of its own where a peer is there no more.
    if status < 0 or "RuntimeError: " in lines[-1]:
        why = "" if status < 0 else f" ({reason[:300]})"
        print(
            f"error: not all processes came within {where.patience_s} s, or one died at the "
            f"start{why}. Start all processes again with the same command.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(launch.TRY_AGAIN)
    raise launch.UserError(
        f"JAX cannot join the processes of this run: {reason[:300]} Outside Slurm, give "
        "--coordinator=HOST:PORT, --num_processes and --process_id."
    )

"""What takes the units of a sweep: processes of this machine, or jobs of Slurm through submitit."""

import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, Protocol

import submitit

from experiments import launch
from experiments.sweeping import work
from experiments.sweeping.process import Job
from experiments.sweeping.progress import Progress

_POLL_S = 0.5
_POLL_SLURM_S = 2.0
# A job that was just submitted may not be listed yet.
_PATIENCE_S = 20.0
_SLURM_TIMEOUT_S = 30.0
_SLURM_WORKERS = 256
# Of jobs in turn that changed nothing; each is waited for longer, in all for an hour.
_MOST_IDLE, _MOST_REFUSALS = 20, 5
_END_JOBS_S = 120.0


class Pool(Protocol):
    """Runs :func:`work.run`, as often as there is something to do."""

    def tend(self, now: Progress) -> None:
        """Sees to it for a moment that units are taken.

        Raises:
          UserError: as :func:`work.run`, or whatever runs it does not.
        """

    def end(self) -> None:
        """Ends all that it started."""


class Worker(NamedTuple):
    """A share of this machine: cores, and variables that name a device."""

    cores: tuple[int, ...]
    environment: Mapping[str, str]


def workers(count: int, cores_each: int, gpus: Sequence[str]) -> list[Worker]:
    """One worker per GPU, or per so many cores.

    Args:
      count: how many; 0 for as many as there are GPUs, or groups of cores.
      cores_each: of a worker; 0 shares the cores out evenly (one each without a GPU).
      gpus: names of those that may be used; workers take turns on them.

    Raises:
      UserError: more workers or cores than there are.
    """
    cores = sorted(os.sched_getaffinity(0))
    wanted = count or len(gpus) or len(cores) // max(cores_each, 1)
    each = cores_each or max(1, len(cores) // max(wanted, 1))
    if wanted < 1 or wanted * each > len(cores):
        raise launch.UserError(
            f"{max(wanted, 1)} workers of {each} cores need {max(wanted, 1) * each} cores, and "
            f"this process may use {len(cores)}; give fewer --workers or --cores."
        )
    # Where several processes share a card, none may reserve most of its memory.
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if wanted > len(gpus) else {}
    return [
        Worker(
            tuple(cores[number * each : (number + 1) * each]),
            {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)], **shared} if gpus else {},
        )
        for number in range(wanted)
    ]


def visible_gpus() -> list[str]:
    """Names, for ``CUDA_VISIBLE_DEVICES``, of the NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        # CUDA's rule: what follows -1 is not seen.
        return names[: names.index("-1")] if "-1" in names else names
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    count = listed.stdout.count("GPU ") if listed.returncode == 0 else 0
    return [str(number) for number in range(count)]


def maker(values: Any) -> Callable[[Job], Pool]:
    """What makes the pool that the flags of :mod:`experiments.sweep` name.

    Raises:
      UserError: there is no such pool here.
    """
    if values.executor == "local":
        those = workers(values.workers, values.cores, visible_gpus())
        return lambda job: LocalPool(job, those)
    parameters: dict[str, Any] = {
        "time": int(values.time_min * 1.1) + 5,
        "array_parallelism": values.workers or _SLURM_WORKERS,
    }
    for pair in values.slurm:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise launch.UserError(f"--slurm takes name=value; got {pair!r}.")
        parameters[name] = int(value) if value.isdigit() else value
    _require_slurm()
    return lambda job: SlurmPool(job, parameters)


class LocalPool:
    """Threads that hold a process each; these die with this one."""

    def __init__(self, job: Job, workers: Sequence[Worker]):
        self._job, self._workers, self._wanted = job, workers, 0
        self._stop = threading.Event()
        self._threads = futures.ThreadPoolExecutor(len(workers))
        self._running: list[futures.Future[None]] = []

    def _run(self, number: int) -> None:
        worker = self._workers[number]
        environment = {**self._job.environment, **worker.environment}
        job = self._job._replace(environment=environment, cores=worker.cores)
        while not self._stop.is_set():
            # No more of them look for a unit than there are.
            if number >= self._wanted or not work.run(job, self._stop):
                self._stop.wait(_POLL_S)

    def tend(self, now: Progress) -> None:
        """Waits a moment; see :class:`Pool`."""
        self._wanted = now.wanted
        if not self._running:
            numbers = range(len(self._workers))
            self._running = [self._threads.submit(self._run, number) for number in numbers]
        for ended in futures.wait(self._running, _POLL_S, futures.FIRST_EXCEPTION).done:
            ended.result()

    def end(self) -> None:
        """Ends the processes, which takes a moment."""
        self._stop.set()
        self._threads.shutdown()


def _run_alone(job: Job) -> None:
    """As :func:`work.run`, in a process that Slurm tells to stop by a signal."""
    stop = threading.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: stop.set())
    work.run(job, stop)


class SlurmPool:
    """Arrays of Slurm jobs; Slurm decides how many run at a time."""

    def __init__(self, job: Job, parameters: Mapping[str, Any]):
        _require_slurm()
        self._job, self._folder = job, pathlib.Path(job.workdir) / "jobs"
        with launch.writing(self._folder):
            self._executor = submitit.SlurmExecutor(folder=self._folder)
        # By its name a later run finds the jobs of one that was killed.
        name = f"sweep-{hashlib.sha256(job.workdir.encode()).hexdigest()[:10]}"
        self._executor.update_parameters(**{"job_name": name, **parameters})
        self._which = ["-n", str(self._executor.parameters["job_name"]), "-u", str(os.getuid())]
        self._size = int(parameters["array_parallelism"])
        self._idle, self._next = 0, 0.0
        self._before: Sequence[Any] = ()
        self._end_earlier()

    def _listed(self) -> int | None:
        """How many jobs Slurm lists as waiting or running; None where it does not answer."""
        # -r: an array is listed job by job.
        answer = _ask("squeue", "-h", "-r", "-o", "%A", *self._which)
        return None if answer is None else len(answer.split())

    def _end_earlier(self) -> None:
        """Cancels what a sweep left behind that was killed, and waits for it."""
        last = time.monotonic() + _END_JOBS_S
        while (left := self._listed()) != 0:
            if left is None or time.monotonic() > last:
                raise launch.UserError(
                    f"Slurm does not end the jobs of an earlier run, or does not answer; try "
                    f"again, or cancel them with scancel {' '.join(self._which)}."
                )
            self.end()
            time.sleep(1.0)

    def tend(self, now: Progress) -> None:
        """Submits what lacks; see :class:`Pool`."""
        time.sleep(_POLL_SLURM_S)
        if time.monotonic() < self._next or (listed := self._listed()) is None:
            return
        if (lacking := min(now.wanted, self._size) - listed) <= 0:
            return
        self._idle = self._idle + 1 if now.states == self._before else 0
        if self._idle > _MOST_IDLE:
            raise launch.UserError(
                f"the last {_MOST_IDLE} jobs ended and had done nothing; see their logs in "
                f"{self._folder}. What is finished is kept; run the same command to go on."
            )
        try:
            with launch.writing(self._folder):
                self._executor.map_array(_run_alone, lacking * [self._job])
        except submitit.core.utils.FailedJobError as error:
            # The first refusal is for whoever starts the sweep; a later one may pass.
            if not self._before or self._idle >= _MOST_REFUSALS:
                raise launch.UserError(
                    f"Slurm refuses the jobs: {' '.join(str(error).split())[:400]}. What is "
                    "finished is kept; run the same command to go on."
                ) from error
        self._before, self._next = now.states, time.monotonic() + _PATIENCE_S * (1 + self._idle)

    def end(self) -> None:
        """Cancels all jobs."""
        _ask("scancel", *self._which)


def _require_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise launch.UserError(
            "--executor=slurm needs Slurm's sbatch on the PATH, and it is not there; run on a "
            "login node of the cluster, or use --executor=local."
        )


def _ask(*command: str) -> str | None:
    """The output of one of Slurm's commands; None where Slurm does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

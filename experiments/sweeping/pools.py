"""Where jobs run: processes of this machine, or Slurm; both through submitit."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import submitit

from experiments import launch
from experiments.sweeping import job as job_lib

_UNLIMITED_MIN = 60 * 24 * 365
_ASK_SLURM_EVERY_S = 2.0
# A job that was just submitted may not be listed yet.
_SLURM_PATIENCE_S = 20.0
_SLURM_TIMEOUT_S = 30.0
_SUBMISSIONS, _SUBMIT_AGAIN_S = 5, 10.0
_END_JOBS_S = 120.0


class Handle(Protocol):
    """A job that was submitted."""

    def alive(self) -> bool:
        """Whether it runs, or will without being submitted again."""

    def cancel(self) -> None:
        """Tells it to stop."""


class Pool(Protocol):
    """Runs jobs, at most ``size`` side by side."""

    size: int

    def room(self) -> int:
        """How many more jobs it takes now."""

    def submit(self, jobs: Sequence[job_lib.Job]) -> Sequence[Handle]:
        """Starts at most :meth:`room` jobs, which come without an environment of their own."""


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
    made = []
    for number in range(wanted):
        share = tuple(cores[number * each : (number + 1) * each])
        device = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        if gpus and wanted > len(gpus):
            # Several processes share a card: none may reserve most of its memory.
            device["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        made.append(Worker(share, device))
    return made


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


class LocalPool:
    """Processes of this machine, one per worker at a time."""

    def __init__(self, folder: pathlib.Path, workers: Sequence[Worker]):
        self._folder = folder
        with launch.writing(folder):
            self._executor = submitit.LocalExecutor(folder=folder)
        # The limits are the job's own: those of submitit begin a job anew.
        self._executor.update_parameters(timeout_min=_UNLIMITED_MIN)
        self._workers, self.size = list(workers), len(workers)
        self._busy: list[_LocalHandle | None] = [None] * len(workers)

    def _free(self) -> list[int]:
        return [n for n, handle in enumerate(self._busy) if handle is None or not handle.alive()]

    def room(self) -> int:
        """Workers without a job."""
        return len(self._free())

    def submit(self, jobs: Sequence[job_lib.Job]) -> Sequence[Handle]:
        """Starts a job on each of as many workers."""
        handles = []
        for job, number in zip(jobs, self._free(), strict=False):
            worker = self._workers[number]
            environment = {**job.environment, **worker.environment}
            job = job._replace(environment=environment, cores=worker.cores, owner=job_lib.owner())
            with launch.writing(self._folder):
                handle = _LocalHandle(self._executor.submit(job_lib.run, job))
            self._busy[number] = handle
            handles.append(handle)
        return handles


class _LocalHandle:
    def __init__(self, job: Any):
        self._job = job

    def alive(self) -> bool:
        return not self._job.done()

    def cancel(self) -> None:
        # submitit's own way is an interrupt, whose traceback ends up on this terminal.
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self._job.job_id), signal.SIGTERM)


class SlurmPool:
    """Arrays of Slurm jobs; Slurm decides how many run at a time."""

    def __init__(self, folder: pathlib.Path, parameters: Mapping[str, Any]):
        if shutil.which("sbatch") is None:
            raise launch.UserError(
                "--executor=slurm needs Slurm's sbatch on the PATH, and it is not there; run on a "
                "login node of the cluster, or use --executor=local."
            )
        self._folder = folder
        with launch.writing(folder):
            self._executor = submitit.SlurmExecutor(folder=folder)
        # By its name a later run finds the jobs of one that was killed.
        name = f"sweep-{hashlib.sha256(str(folder).encode()).hexdigest()[:10]}"
        self._executor.update_parameters(**{"job_name": name, **parameters})
        self.size = int(parameters["array_parallelism"])
        _end_jobs(str(self._executor.parameters["job_name"]))
        self._queue = _Queue()
        self._handles: list[_SlurmHandle] = []

    def room(self) -> int:
        """Jobs that may still run side by side."""
        self._handles = [handle for handle in self._handles if handle.alive()]
        return self.size - len(self._handles)

    def submit(self, jobs: Sequence[job_lib.Job]) -> Sequence[Handle]:
        """Submits the jobs as one array."""
        made = self._array(jobs)
        handles = [_SlurmHandle(self._queue, job) for job in made]
        self._handles += handles
        return handles

    def _array(self, jobs: Sequence[job_lib.Job]) -> Sequence[Any]:
        for left in reversed(range(_SUBMISSIONS)):
            try:
                with launch.writing(self._folder):
                    return self._executor.map_array(job_lib.run, list(jobs))
            except submitit.core.utils.FailedJobError as error:
                if not left:
                    raise launch.UserError(
                        f"Slurm refuses the jobs: {' '.join(str(error).split())[:400]}. What is "
                        "finished is kept; run the same command to go on."
                    ) from error
                time.sleep(_SUBMIT_AGAIN_S)
        raise AssertionError


def _ask(*command: str) -> str | None:
    """The output of one of Slurm's commands; None where Slurm does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _end_jobs(name: str) -> None:
    """Cancels jobs of that name, which a sweep left behind that was killed, and waits for them."""
    last = time.monotonic() + _END_JOBS_S
    while (left := _ask("squeue", "-h", "-n", name, "-u", str(os.getuid()), "-o", "%A")) != "":
        if left is None or time.monotonic() > last:
            raise launch.UserError(
                f"Slurm does not end the jobs of an earlier run ({name}), or does not answer; try "
                f"again, or cancel them with scancel -n {name}."
            )
        _ask("scancel", "-n", name, "-u", str(os.getuid()))
        time.sleep(1.0)


class _Queue:
    """The ids that Slurm lists as waiting or running, asked for every now and then."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._asked = self._answered = 0.0

    def lists(self, job_id: str, since: float) -> bool:
        """Whether a job is listed, or could not be yet: no answer is late enough to know."""
        now = time.monotonic()
        if now - self._asked > _ASK_SLURM_EVERY_S:
            self._asked = now
            # -r: an array is listed job by job.
            listed = _ask("squeue", "-h", "-r", "-o", "%F_%K %A", "-u", str(os.getuid()))
            if listed is not None:
                self._answered, self._ids = now, set(listed.split())
        return job_id in self._ids or self._answered < since + _SLURM_PATIENCE_S


class _SlurmHandle:
    def __init__(self, queue: _Queue, job: Any):
        self._queue, self._job, self._submitted = queue, job, time.monotonic()

    def alive(self) -> bool:
        return self._queue.lists(self._job.job_id, self._submitted)

    def cancel(self) -> None:
        self._job.cancel(check=False)

"""Where jobs run: processes of this machine, or Slurm; both through submitit."""

import os
import pathlib
import shutil
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


class Handle(Protocol):
    """A job that was submitted."""

    def alive(self) -> bool:
        """Whether it runs, or will without being submitted again."""

    def cancel(self) -> None:
        """Tells it to stop."""


class Pool(Protocol):
    """Runs jobs."""

    def room(self) -> int:
        """How many more jobs it takes now."""

    def submit(self, jobs: Sequence[job_lib.Job]) -> Sequence[Handle]:
        """Starts at most :meth:`room` jobs, which come without an environment of their own."""


class Worker(NamedTuple):
    """A share of this machine: cores, and variables that name a device."""

    cores: tuple[int, ...]
    environment: Mapping[str, str]


def workers(count: int, cores_each: int, gpus: int) -> list[Worker]:
    """One worker per GPU, or per so many cores.

    Args:
      count: how many; 0 for as many as there are GPUs, or groups of cores.
      cores_each: of a worker; 0 shares the cores out evenly (one each without a GPU).
      gpus: of this machine; workers take turns on them.

    Raises:
      UserError: more workers or cores than there are.
    """
    cores = sorted(os.sched_getaffinity(0))
    wanted = count or gpus or len(cores) // max(cores_each, 1)
    each = cores_each or max(1, len(cores) // max(wanted, 1))
    if wanted < 1 or wanted * each > len(cores):
        raise launch.UserError(
            f"{max(wanted, 1)} workers of {each} cores need {max(wanted, 1) * each} cores, and "
            f"this process may use {len(cores)}; give fewer --workers or --cores."
        )
    made = []
    for number in range(wanted):
        share = tuple(cores[number * each : (number + 1) * each])
        device = {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {}
        if gpus and wanted > gpus:
            # Several processes share a card: none may reserve most of its memory.
            device["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        made.append(Worker(share, device))
    return made


def count_gpus() -> int:
    """NVIDIA GPUs that processes of this machine may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


class LocalPool:
    """Processes of this machine, one per worker at a time."""

    def __init__(self, folder: pathlib.Path, workers: Sequence[Worker]):
        self._executor = submitit.LocalExecutor(folder=folder)
        # The limits are the job's own: those of submitit begin a job anew.
        self._executor.update_parameters(timeout_min=_UNLIMITED_MIN)
        self._workers = list(workers)
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
        self._job.cancel()


class SlurmPool:
    """Arrays of Slurm jobs; Slurm decides how many run at a time."""

    def __init__(self, folder: pathlib.Path, parameters: Mapping[str, Any]):
        if shutil.which("sbatch") is None:
            raise launch.UserError(
                "--executor=slurm needs Slurm's sbatch on the PATH, and it is not there; run on a "
                "login node of the cluster, or use --executor=local."
            )
        self._executor = submitit.SlurmExecutor(folder=folder)
        self._executor.update_parameters(**parameters)
        self._most = int(parameters["array_parallelism"])
        self._queue = _Queue()
        self._handles: list[_SlurmHandle] = []

    def room(self) -> int:
        """Jobs that may still run side by side."""
        self._handles = [handle for handle in self._handles if handle.alive()]
        return self._most - len(self._handles)

    def submit(self, jobs: Sequence[job_lib.Job]) -> Sequence[Handle]:
        """Submits the jobs as one array."""
        made = self._executor.map_array(job_lib.run, list(jobs))
        handles = [_SlurmHandle(self._queue, job) for job in made]
        self._handles += handles
        return handles


class _Queue:
    """The ids that Slurm lists as waiting or running, asked for every now and then."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._asked = 0.0

    def ids(self) -> set[str]:
        now = time.monotonic()
        if now - self._asked > _ASK_SLURM_EVERY_S:
            # -r: an array is listed job by job.
            command = ["squeue", "-h", "-r", "-o", "%F_%K %A %T", "-u", str(os.getuid())]
            listed = subprocess.run(command, capture_output=True, text=True)
            if listed.returncode == 0:  # else Slurm does not answer for now: what it said stands
                self._asked = now
                self._ids = {name for line in listed.stdout.splitlines() for name in line.split()}
        return self._ids


class _SlurmHandle:
    def __init__(self, queue: _Queue, job: Any):
        self._queue, self._job, self._submitted = queue, job, time.monotonic()

    def alive(self) -> bool:
        if time.monotonic() - self._submitted < _SLURM_PATIENCE_S:
            return True
        return self._job.job_id in self._queue.ids()

    def cancel(self) -> None:
        self._job.cancel(check=False)

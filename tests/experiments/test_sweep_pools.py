"""Where the processes of a sweep run: shares of this machine, arrays of Slurm jobs."""

import os
import types

import pytest
import submitit

from experiments import launch
from experiments.sweeping import pools, progress
from experiments.sweeping.process import Job
from experiments.sweeping.state import State
from experiments.sweeping.unit import Unit


def test_workers_share_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [w.cores for w in pools.workers(0, 0, [])] == [(n,) for n in range(8)]
    assert [w.cores for w in pools.workers(2, 0, [])] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [w.cores for w in pools.workers(0, 3, [])] == [(0, 1, 2), (3, 4, 5)]
    cards = pools.workers(0, 0, ["2", "5"])
    assert [w.cores for w in cards] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [w.environment for w in cards] == [{"CUDA_VISIBLE_DEVICES": n} for n in "25"]
    shared = pools.workers(4, 0, ["2", "5"])
    assert [w.environment["CUDA_VISIBLE_DEVICES"] for w in shared] == ["2", "5", "2", "5"]
    assert all(w.environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false" for w in shared)
    with pytest.raises(launch.UserError, match=r"3 workers of 4 cores need 12 cores.* may use 8"):
        pools.workers(3, 4, [])


def test_gpus_are_those_that_are_visible(monkeypatch):
    for value, names in (("2,3", ["2", "3"]), ("-1", []), ("", []), ("1,-1,2", ["1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert pools.visible_gpus() == names


class Slurm:
    """Slurm's commands and submitit, played: jobs are listed until the test takes them away."""

    def __init__(self, monkeypatch, folder):
        self.now, self.jobs, self.answers, self.error = 0.0, 0, True, None
        self.submitted, self.asked, self.parameters = [], [], {"job_name": "sweep"}
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(pools, "time", clock)
        monkeypatch.setattr(pools, "_ask", self.ask)
        monkeypatch.setattr(pools.shutil, "which", lambda name: name)
        monkeypatch.setattr(submitit, "SlurmExecutor", lambda folder: self)
        self.folder, self.units = folder, [Unit("trial", n, "", None, "") for n in "abc"]

    def pool(self):
        return pools.SlurmPool(Job(str(self.folder), (), {}), {"array_parallelism": 2})

    def sleep(self, seconds):
        self.now += seconds

    def ask(self, *command):
        self.asked.append(command[0])
        if command[0] == "scancel":
            self.jobs = 0
        return "".join(f"{n}\n" for n in range(self.jobs)) if self.answers else None

    def update_parameters(self, **parameters):
        self.parameters.update(parameters)

    def map_array(self, function, jobs):
        if self.error:
            raise submitit.core.utils.FailedJobError(self.error)
        self.submitted.append(len(jobs))
        self.jobs += len(jobs)

    def progress(self, *states):
        return progress.summarized(self.units, list(states))


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    return Slurm(monkeypatch, tmp_path)


def test_what_slurm_lost_is_submitted_again(slurm):
    slurm.jobs = 3
    pool = slurm.pool()
    assert slurm.jobs == 0 and "scancel" in slurm.asked  # of an earlier sweep
    states = [State()] * 3
    for _ in range(30):
        pool.tend(slurm.progress(*states))
    assert slurm.submitted == [2]
    slurm.jobs, states[0] = 1, State("running")
    for _ in range(30):
        pool.tend(slurm.progress(*states))
    assert slurm.submitted == [2, 1]
    # No answer is no news.
    slurm.jobs, slurm.answers = 0, False
    for _ in range(30):
        pool.tend(slurm.progress(*states))
    assert slurm.submitted == [2, 1]
    slurm.answers, states = True, [State("done"), State("done"), State()]
    pool.tend(slurm.progress(*states))
    assert slurm.submitted == [2, 1, 1]
    pool.end()
    assert slurm.jobs == 0


def test_jobs_that_die_without_a_word_are_not_submitted_for_ever(slurm):
    pool = slurm.pool()
    with pytest.raises(launch.UserError, match="the last 20 jobs ended and had done nothing"):
        while True:
            pool.tend(slurm.progress(State(), State(), State()))
            slurm.jobs = 0
    assert slurm.submitted == 21 * [2] and slurm.now > 3600


def test_a_slurm_that_refuses_jobs(slurm):
    slurm.error = "sbatch: error: invalid\n partition"
    with pytest.raises(launch.UserError, match="Slurm refuses the jobs: sbatch: error: invalid pa"):
        slurm.pool().tend(slurm.progress(State(), State(), State()))
    # Once it took some, it is asked again.
    slurm.error, pool = None, slurm.pool()
    pool.tend(slurm.progress(State(), State(), State()))
    slurm.error, slurm.jobs, started = "busy", 0, slurm.now
    with pytest.raises(launch.UserError, match="Slurm refuses the jobs: busy"):
        while True:
            pool.tend(slurm.progress(State(), State(), State()))
    assert slurm.now - started > 200


def test_a_slurm_that_keeps_the_jobs_of_an_earlier_sweep(slurm):
    slurm.answers = False
    with pytest.raises(launch.UserError, match=r"does not answer; try again, or .* scancel -n swe"):
        slurm.pool()

"""Units of a sweep: who takes which, how an attempt ends, what limits it, and what ends with it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import psutil
import pytest

from experiments import launch
from experiments.sweeping import pools, process as process_lib, progress, state as state_lib, work
from experiments.sweeping.process import Job, Limits
from experiments.sweeping.unit import Unit

PROTOCOL = """
import json, os, signal, sys
def answer(outcome="done", message=""):
    print(json.dumps([outcome, message]), flush=True)
units = map(str.strip, sys.stdin)
"""


def job(folder, program, names="a", **changed):
    """Trials of one pack, and a process that reads ``units`` and gives each an ``answer``."""
    folder.mkdir(exist_ok=True)
    progress.save(folder, [Unit("trial", name, "", None, "", "pack") for name in names])
    command = [sys.executable, "-c", PROTOCOL + textwrap.dedent(program)]
    environment = {"GREETING": "hello"}
    cores = changed.pop("cores", ())
    return Job(str(folder), command, environment, Limits(**changed), cores)


def run(made):
    return work.run(made, threading.Event())


def place(folder, name="a"):
    return folder / "trials" / name


def state(folder, name="a"):
    return state_lib.read(place(folder, name))


def test_an_attempt_that_succeeds(tmp_path):
    core = min(os.sched_getaffinity(0))
    program = """
    for name in units:
        print(name, os.environ["GREETING"], os.sched_getaffinity(0), file=sys.stderr)
        answer()
    """
    made = job(tmp_path, program, cores=(core,))
    assert run(made)
    ended = state(tmp_path)
    assert (ended.state, ended.failures, ended.message) == ("done", 0, "")
    assert ended.finished >= ended.started > 0
    assert (place(tmp_path) / "log.txt").read_text() == f"a hello {{{core}}}\n"
    # Run again, such as by a scheduler, it does nothing.
    assert not run(made) and state(tmp_path) == ended


def test_an_attempt_that_fails_is_tried_again_so_often(tmp_path):
    program = "next(units); print('before', file=sys.stderr); sys.exit('error: no such thing')"
    made = job(tmp_path, program)
    assert run(made)
    ended = state(tmp_path)
    assert (ended.state, ended.failures) == ("waiting", 1)
    assert ended.message == "error: no such thing"
    assert run(made) and not run(made)
    assert (state(tmp_path).state, state(tmp_path).failures) == ("failed", 2)
    for status in (3, 0):
        silent = tmp_path / f"silent{status}"
        run(job(silent, f"raise SystemExit({status})"))
        assert state(silent).failures == 1
        assert state(silent).message == f"its process ended with exit status {status}"


def test_only_the_unit_that_was_at_work_is_charged(tmp_path):
    program = """
    for name in units:
        if name == "b":
            answer("failed", "bad")
        elif name == "c":
            sys.exit("worse")
        else:
            answer()
    """
    made = job(tmp_path, program, "abcd")
    run(made)
    states = [state(tmp_path, name) for name in "abcd"]
    assert [(s.state, s.failures, s.message) for s in states] == [
        ("done", 0, ""),
        ("waiting", 1, "bad"),
        ("waiting", 1, "worse"),
        ("done", 0, ""),
    ]
    run(made)
    assert [state(tmp_path, name).failures for name in "abcd"] == [0, 2, 2, 0]
    assert state(tmp_path, "b").state == state(tmp_path, "c").state == "failed"


def test_what_is_killed_again_and_again_has_failed():
    ended = state_lib.State()
    for _ in range(20):
        ended = state_lib.ended(ended, "interrupted", "killed by SIGKILL", 1)
        assert ended.state == "waiting"
    ended = state_lib.ended(ended, "interrupted", "killed by SIGKILL", 1)
    assert (ended.state, ended.message) == ("failed", "killed 21 times: killed by SIGKILL")


class Noted:
    """Notes what each process does, which is nothing."""

    runs: list[str]

    def __init__(self, job):
        self.runs.append("")

    def attempt(self, folder, stop):
        self.runs[-1] += folder.name
        return "done", ""

    def end(self):
        pass


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(Noted, "runs", [], raising=False)
    monkeypatch.setattr(work, "Process", Noted)
    return Noted.runs


def test_a_process_has_a_model_or_trials_of_one_pack(tmp_path, noted):
    units = [Unit("model", name, "", None, "") for name in "mn"]
    trials = {"a": "mp", "b": "np", "c": "mq", "d": "mp", "e": "mp"}
    units += [Unit("trial", name, "", needs, "", pack) for name, (needs, pack) in trials.items()]
    progress.save(tmp_path, units)
    made = Job(str(tmp_path), (), {}, Limits(pack=2))
    state_lib.write(tmp_path / "models" / "n", state_lib.State("failed"))
    while run(made):
        pass
    # The trial of a model that failed never runs; the last process found nothing to do.
    assert noted == ["m", "ad", "c", "e", ""]


def test_nobody_takes_what_another_is_at_work_on(tmp_path, noted):
    made = job(tmp_path, "", "ab")
    state_lib.write(place(tmp_path), state_lib.begun(state_lib.State()))
    attempt = launch.open_workdir(str(place(tmp_path) / "attempt"))
    with launch.locked(attempt):
        assert run(made)
    assert noted == ["b"] and state(tmp_path).state == "running"
    # Without a lock its process was killed.
    assert run(made)
    ended = state(tmp_path)
    assert noted == ["b", "a"] and (ended.state, ended.interruptions) == ("done", 1)


def test_the_limit_of_time_is_that_of_one_unit(tmp_path, monkeypatch):
    """Time is a number in a file, which the program moves on and the job reads."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    program = f"""
    import time
    now = 0
    for name in units:
        now += 11 if name == "c" else 6
        with open({str(clock)!r} + ".new", "w") as file:
            file.write(str(now))
        os.replace({str(clock)!r} + ".new", {str(clock)!r})
        time.sleep(1e6) if name == "c" else answer()
    """
    fake = types.SimpleNamespace(monotonic=lambda: float(clock.read_text()))
    monkeypatch.setattr(process_lib, "time", fake)
    run(job(tmp_path, program, "abc", time_s=10))
    assert [state(tmp_path, name).state for name in "abc"] == ["done", "done", "waiting"]
    assert state(tmp_path, "c").message.startswith("took longer than its limit of 0.16")


SLEEPER = """
import subprocess, time
next(units)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
print(os.getpid(), child.pid, file=sys.stderr, flush=True)
time.sleep(1e6)
"""


def wait_for_end(pid):
    """Returns once a process has ended; one that does not end is never returned from."""
    while psutil.pid_exists(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        time.sleep(0.05)


def sleepers(folder):
    """The sleeper and its child, once they are there."""
    log = place(folder) / "log.txt"
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    return [int(word) for word in log.read_text().split()]


def test_limits_of_time_and_memory_end_all_processes(tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    made = job(slow, SLEEPER, time_s=6)
    log = place(slow) / "log.txt"

    def look():
        return 7.0 if log.exists() and log.read_text().endswith("\n") else 0.0

    with monkeypatch.context() as patch:
        patch.setattr(process_lib, "time", types.SimpleNamespace(monotonic=look))
        run(made)
    assert state(slow).message == "took longer than its limit of 0.1 minutes"
    for pid in sleepers(slow):
        wait_for_end(pid)
    large = tmp_path / "large"
    program = "import time; held = bytearray(300_000_000); time.sleep(1e6)"
    run(job(large, program, memory_gb=0.2))
    assert "more than its limit of 0.2 GB" in state(large).message


def test_a_killed_attempt_waits_to_go_on(tmp_path):
    run(job(tmp_path, "next(units); os.kill(os.getpid(), signal.SIGKILL)"))
    ended = state(tmp_path)
    assert (ended.state, ended.failures, ended.interruptions) == ("waiting", 0, 1)
    assert ended.message == "killed by SIGKILL"


def test_a_sweep_that_ends_ends_its_processes(tmp_path):
    pool = pools.LocalPool(job(tmp_path, SLEEPER), [pools.Worker((), {})])
    pool.tend(progress.measure(tmp_path, progress.load(tmp_path)))
    pids = sleepers(tmp_path)
    pool.end()
    assert state(tmp_path).message == "told to stop"
    for pid in pids:
        wait_for_end(pid)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_ends_with_the_job_that_holds_it(tmp_path, kind):
    """A scheduler tells a job to stop; what is killed tells nobody."""
    made = job(tmp_path, SLEEPER)
    program = f"from experiments.sweeping import pools; from {Job.__module__} import *\n"
    root = pathlib.Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", f"{program}pools._run_alone({made!r})"]
    holder = subprocess.Popen(command, cwd=root)
    pids = sleepers(tmp_path)
    holder.send_signal(kind)
    holder.wait()
    told = kind == signal.SIGTERM
    for pid in pids if told else pids[:1]:
        wait_for_end(pid)
    ended = state(tmp_path)
    assert (ended.state, ended.interruptions) == (("waiting", 1) if told else ("running", 0))
    if not told:
        os.kill(pids[1], signal.SIGKILL)

"""Jobs of a sweep: how an attempt ends, what limits it, and what ends with it."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import psutil

from experiments.sweeping import job as job_lib, state as state_lib

BEGIN = """
import pathlib, sys
from experiments.sweeping import state
folders = [pathlib.Path(name) for name in sys.argv[1:]]
def begin(n):
    state.write(folders[n], state.begun(state.read(folders[n])))
def end(n, outcome="done", message=""):
    state.write(folders[n], state.ended(state.read(folders[n]), outcome, message, 1))
"""


def job(folders, program, **changed):
    """A process that runs a program with ``begin(n)`` and ``end(n)`` of its n-th unit."""
    folders = folders if isinstance(folders, list) else [folders]
    names = [str(folder) for folder in folders]
    head = BEGIN if "begin(" in program else ""
    values = {
        "command": [sys.executable, "-c", head + textwrap.dedent(program), *names],
        "folders": names,
        "environment": {"GREETING": "hello"},
        "cores": (),
        "owner": None,
        "retries": 1,
        "time_limit_s": 1e6,
        "memory_limit_gb": 0.0,
    }
    return job_lib.Job(**{**values, **changed})


def test_an_attempt_that_succeeds(tmp_path):
    core = min(os.sched_getaffinity(0))
    program = "import os; begin(0); print(os.environ['GREETING'], os.sched_getaffinity(0)); end(0)"
    assert job_lib.run(job(tmp_path / "a", program, cores=(core,))) == "done"
    state = state_lib.read(tmp_path / "a")
    assert (state.state, state.failures, state.message) == ("done", 0, "")
    assert state.finished >= state.started > 0
    assert (tmp_path / "a" / "log.txt").read_text() == f"hello {{{core}}}\n"
    # Started again, such as by a scheduler, it does nothing.
    assert job_lib.run(job(tmp_path / "a", "raise SystemExit(1)")) == "done"
    assert state_lib.read(tmp_path / "a") == state


def test_an_attempt_that_fails_is_tried_again_so_often(tmp_path):
    program = "begin(0); print('before'); sys.exit('error: no such thing')"
    assert job_lib.run(job(tmp_path, program)) == "failed"
    state = state_lib.read(tmp_path)
    assert (state.state, state.failures) == ("waiting", 1)
    assert state.message == "error: no such thing"
    assert job_lib.run(job(tmp_path, "raise SystemExit(3)")) == "failed"
    assert (state_lib.read(tmp_path).state, state_lib.read(tmp_path).failures) == ("failed", 2)
    for status, message in ((3, "exit status 3"), (0, "its process ended without a word")):
        silent = tmp_path / f"silent{status}"
        assert job_lib.run(job(silent, f"raise SystemExit({status})")) == "failed"
        assert state_lib.read(silent).message == message


def test_one_that_asks_to_be_started_again_did_not_fail(tmp_path):
    program = "begin(0); print('error: a peer died', file=sys.stderr); sys.exit(75)"
    for count in (1, 2):
        assert job_lib.run(job(tmp_path, program)) == "interrupted"
        state = state_lib.read(tmp_path)
        assert (state.state, state.failures, state.interruptions) == ("waiting", 0, count)
        assert state.message == "error: a peer died"


def test_only_the_unit_that_was_at_work_is_charged(tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    program = "begin(0); end(0); begin(1); end(1, 'failed', 'bad'); begin(2); sys.exit('worse')"
    assert job_lib.run(job(folders, program)) == "failed"
    states = [state_lib.read(folder) for folder in folders]
    assert [(s.state, s.failures, s.message) for s in states] == [
        ("done", 0, ""),
        ("waiting", 1, "bad"),
        ("waiting", 1, "worse"),
        ("waiting", 0, ""),
    ]
    # What one says itself is not said again.
    job_lib.run(job(folders[1:], "begin(0); end(0, 'failed', 'bad'); sys.exit(1)"))
    states = [state_lib.read(folder) for folder in folders[1:]]
    assert [s.failures for s in states] == [2, 1, 0] and states[0].state == "failed"


def test_the_limit_of_time_is_that_of_one_unit(tmp_path, monkeypatch):
    """Time is a number in a file, which the program moves on and the job reads."""
    folders = [tmp_path / name for name in "abc"]
    clock, seen = tmp_path / "clock", tmp_path / "seen"
    clock.write_text("0")
    program = f"""
    import os, time, types
    clock, seen = pathlib.Path({str(clock)!r}), pathlib.Path({str(seen)!r})
    state.time = types.SimpleNamespace(time=lambda: float(clock.read_text()))
    def pass_to(now):
        clock.with_suffix(".new").write_text(str(now))
        os.replace(clock.with_suffix(".new"), clock)
        while not seen.exists() or float(seen.read_text() or 0) < now:
            time.sleep(0.01)
    begin(0); pass_to(6); end(0)
    begin(1); pass_to(12); end(1)
    begin(2); pass_to(23); time.sleep(1e6)
    """

    def look():
        now = clock.read_text()
        seen.write_text(now)
        return float(now)

    monkeypatch.setattr(job_lib, "time", types.SimpleNamespace(time=look, sleep=time.sleep))
    assert job_lib.run(job(folders, program, time_limit_s=10)) == "failed"
    assert [state_lib.read(folder).state for folder in folders] == ["done", "done", "waiting"]


SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
print(child.pid, flush=True)
time.sleep(1e6)
"""


def wait_for_end(pid):
    """Returns once a process has ended; one that does not end is never returned from."""
    while psutil.pid_exists(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        time.sleep(0.05)


def child_of(folder):
    """The process that the sleeper started, 0 before it did."""
    log = folder / "log.txt"
    words = log.read_text().split("\n") if log.exists() else []
    return int(words[0]) if len(words) > 1 else 0


def once_it_sleeps(folder, act):
    """Acts, in a thread, as soon as the sleeper has its child."""

    def wait():
        while not child_of(folder):
            time.sleep(0.05)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_limits_of_time_and_memory(tmp_path, monkeypatch):
    slow, start = tmp_path / "slow", time.time()

    def look():
        return start + (7 if child_of(slow) else 0)

    with monkeypatch.context() as patch:
        patch.setattr(job_lib, "time", types.SimpleNamespace(time=look, sleep=time.sleep))
        assert job_lib.run(job(slow, SLEEPER, time_limit_s=6)) == "failed"
    assert state_lib.read(slow).message == "took longer than its limit of 0.1 minutes"
    wait_for_end(child_of(slow))
    large = tmp_path / "large"
    program = "import time; held = bytearray(300_000_000); time.sleep(1e6)"
    assert job_lib.run(job(large, program, memory_limit_gb=0.2)) == "failed"
    assert "more than its limit of 0.2 GB" in state_lib.read(large).message


def test_a_killed_attempt_waits_to_go_on(tmp_path):
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert job_lib.run(job(tmp_path, program)) == "interrupted"
    state = state_lib.read(tmp_path)
    assert (state.state, state.failures, state.interruptions) == ("waiting", 0, 1)
    assert state.message == "killed by SIGKILL"


def test_a_job_that_is_told_to_stop_ends_its_processes(tmp_path):
    once_it_sleeps(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert job_lib.run(job(tmp_path, SLEEPER)) == "interrupted"
    assert state_lib.read(tmp_path).message == "told to stop"
    wait_for_end(child_of(tmp_path))


def test_a_job_ends_with_the_sweep_that_owns_it(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
    named = (owner.pid, psutil.Process(owner.pid).create_time())

    def end():
        owner.kill()
        owner.wait()

    once_it_sleeps(tmp_path, end)
    assert job_lib.run(job(tmp_path, SLEEPER, owner=named)) == "interrupted"
    assert state_lib.read(tmp_path).message == "the sweep ended"
    wait_for_end(child_of(tmp_path))

"""Kills at any moment: the table of a sweep is that of an undisturbed one.

``TTT_JAX_KILLS=100 pytest tests/experiments/test_sweep_faults.py`` (``make test-faults``) kills a
hundred times at random moments during the example sweep, on two cores about twenty minutes.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import psutil
import pyarrow.parquet as pq
import pytest

from experiments import sweep
from experiments.sweeping import pools, progress, state as state_lib
from tests.experiments import tiny_sweep

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "experiments" / "configs" / "digits_sweep.py"
KILLS = int(os.environ.get("TTT_JAX_KILLS", "0"))
# One worker per two cores, each killed as often, however many there are.
WORKERS = max(2, len(os.sched_getaffinity(0)) // 2)
LONGEST_S = 40 / WORKERS
TIMING = {"seconds", "compile_seconds", "samples_per_second"}

SMALL = """
for domain in ("fog", "clean"):
    add(domains=(domain,), seeds=(0,))
"""

# Of small programs: what a process does is mostly its start.
LIGHT = """

def get_config():
    config = dense_config.get_config()
    config.train.aux = "none"
    config.methods = {"tent": config.methods.tent}
    return config

"""

# A small training is over before it is met: this one waits for its kill at its first save.
HELD = """
import time
from ttt_jax import checkpoint

save = checkpoint.Saves.save


def held(self, step, state):
    save(self, step, state)
    if step == 5:
        time.sleep(1800)


checkpoint.Saves.save = held
"""


def command(config, folder, workers):
    program = [sys.executable, "-m", "experiments.sweep", f"--config={config}"]
    return [*program, f"--workdir={folder}", f"--workers={workers}"]


def start(config, folder, log, workers=WORKERS):
    return subprocess.Popen(command(config, folder, workers), stdout=log, stderr=log, cwd=ROOT)


def table(folder):
    """The rows without what depends on time, each as it is: floats compare bit by bit."""
    found = pq.read_table(folder / "results.parquet")
    return found.drop_columns([name for name in found.column_names if name in TIMING])


def processes_of(folder):
    """Those that name the folder on their command lines."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def kill_one(rng, main):
    """Kills the sweep or a process below it; returns whether there was one."""
    try:
        found = [psutil.Process(main.pid), *psutil.Process(main.pid).children(recursive=True)]
        rng.choice(found).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def disturbed(config, folder, kills, longest_s, log):
    """Runs a sweep under kills, starting it anew when it died; returns how many there were."""
    rng, done = random.Random(0), 0
    main = start(config, folder, log)
    while True:
        if done < kills:
            time.sleep(rng.uniform(0.3, longest_s))
            done += kill_one(rng, main)
        status = main.wait() if done >= kills else main.poll()
        if status == 0 and (folder / "results.parquet").exists():
            return done
        if status is not None:
            main = start(config, folder, log)


@pytest.mark.faults
def test_many_kills_leave_no_trace(tmp_path):
    if not KILLS:
        pytest.skip("set TTT_JAX_KILLS, as make test-faults does")
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    with (tmp_path / "log.txt").open("w") as log:
        assert start(EXAMPLE, calm, log).wait() == 0, (tmp_path / "log.txt").read_text()
        # Compiled programs are no results; without them every restart would compile anew.
        shutil.copytree(calm / "compiled", rough / "compiled")
        done = disturbed(EXAMPLE, rough, KILLS, LONGEST_S, log)
    wanted, found = table(calm), table(rough)
    assert wanted.equals(found)
    trials = found["trial"].to_pylist()
    assert len(trials) == len(set(trials)) == 24 and done == KILLS
    # Whatever was killed, nothing goes on by itself: every process ends.
    psutil.wait_procs(processes_of(rough))
    assert table(rough).equals(found)


def until(ready):
    """Waits for an event, however long it takes on a busy machine."""
    last = time.monotonic() + 1800
    while not ready():
        assert time.monotonic() < last
        time.sleep(0.05)


def worker(main):
    """The process that does the work, once it runs."""
    found = []

    def started():
        found[:] = psutil.Process(main.pid).children()
        return bool(found)

    until(started)
    return found[0]


def at_work(folder, interruptions):
    """Whether a trial runs that was interrupted so often."""
    return any(
        (state := state_lib.read(place)).state == "running"
        and state.interruptions == interruptions
        and (place / "run.json").exists()
        for place in folder.glob("trials/*")
    )


def test_a_kill_of_each_kind_leaves_no_trace(tmp_path, monkeypatch):
    """Kills in a training, in a trial, and of the sweep itself."""
    cache = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Programs for the four devices of conftest.py take longer to compile than for one.
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=4", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    config, held = (tiny_sweep.write(tmp_path / name, SMALL) for name in ("small.py", "held.py"))
    for path, more in ((config, LIGHT), (held, LIGHT + HELD)):
        with open(path, "a") as file:
            file.write(more)
    calm, rough = tmp_path / "calm", tmp_path / "rough"

    def finish(folder):
        share = [pools.Worker((min(os.sched_getaffinity(0)),), {})]
        assert sweep.run(config, str(folder), lambda job: pools.LocalPool(job, share)) == 0

    finish(calm)
    with (tmp_path / "log.txt").open("w") as log:
        killed = subprocess.Popen(
            [*command(held, rough, 1), "--cores=1"], stdout=log, stderr=log, cwd=ROOT
        )
        until(lambda: list(rough.glob("models/*/training/seed_0/step_*")))
        worker(killed).kill()
        until(lambda: at_work(rough, 0))
        worker(killed).kill()
        until(lambda: at_work(rough, 1))
        last = worker(killed)
        killed.kill()
        psutil.wait_procs([last])
        killed.wait()
    states = progress.measure(rough, progress.load(rough)).states
    assert states[0].state == "done" and states[0].interruptions == 1
    finish(rough)
    assert table(rough).equals(table(calm)) and table(rough).num_rows == 2

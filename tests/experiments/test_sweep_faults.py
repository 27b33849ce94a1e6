"""Kills at random moments: the table of a sweep is that of an undisturbed one.

``TTT_JAX_KILLS=100 pytest tests/experiments/test_sweep_faults.py`` (``make test-faults``) kills a
hundred times during the example sweep, on two cores about twenty minutes.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest

from tests.experiments import tiny_sweep

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "experiments" / "configs" / "digits_sweep.py"
KILLS = int(os.environ.get("TTT_JAX_KILLS", "0"))
TIMING = {"seconds", "compile_seconds", "samples_per_second"}

SMALL = """
for domain in ("fog", "contrast", "clean"):
    add(domains=(domain,), seeds=(0,))
"""


def start(config, folder, log):
    command = [sys.executable, "-m", "experiments.sweep", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"--workdir={folder}", "--workers=2"], stdout=log, stderr=log, cwd=ROOT
    )


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


def kill_one(rng, sweep):
    """Kills the sweep or a process below it; returns whether there was one."""
    try:
        found = [psutil.Process(sweep.pid), *psutil.Process(sweep.pid).children(recursive=True)]
        rng.choice(found).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def disturbed(config, folder, kills, longest_s, log):
    """Runs a sweep under kills, starting it anew when it died; returns how many there were."""
    rng, done = random.Random(0), 0
    sweep = start(config, folder, log)
    while True:
        if done < kills:
            time.sleep(rng.uniform(0.3, longest_s))
            done += kill_one(rng, sweep)
        status = sweep.wait() if done >= kills else sweep.poll()
        if status == 0 and (folder / "results.parquet").exists():
            return done
        if status is not None:
            sweep = start(config, folder, log)


@pytest.mark.parametrize("example", [pytest.param(True, marks=pytest.mark.faults), False])
def test_kills_leave_no_trace(tmp_path, example):
    if example and not KILLS:
        pytest.skip("set TTT_JAX_KILLS, as make test-faults does")
    config = EXAMPLE
    if not example:
        config = tiny_sweep.write(tmp_path / "small.py", SMALL)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    with (tmp_path / "log.txt").open("w") as log:
        assert start(config, calm, log).wait() == 0, (tmp_path / "log.txt").read_text()
        # Compiled programs are no results; without them every restart would compile anew.
        shutil.copytree(calm / "compiled", rough / "compiled")
        done = disturbed(config, rough, KILLS if example else 4, 20.0 if example else 4.0, log)
    wanted, found = table(calm), table(rough)
    assert wanted.equals(found)
    trials = found["trial"].to_pylist()
    assert len(trials) == len(set(trials)) == (24 if example else 3)
    assert done == KILLS if example else done >= 1
    # Whatever was killed, nothing goes on by itself: every process ends.
    psutil.wait_procs(processes_of(rough))
    assert table(rough).equals(found)

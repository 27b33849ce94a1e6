"""Several processes under a real Slurm, one of which is killed; ``make test-slurm``, as root.

The job script is that of docs/scaling.md.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import sys
import time

import psutil
import pytest

from experiments import adapt, train
from tests.experiments import slurm_cluster, team_config
from tests.experiments.test_distributed import CONFIG, DOMAINS, environment_of
from tests.experiments.test_programs import ROOT, assert_equal_rows, rows_of

pytestmark = pytest.mark.slurm

SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --output={log}
srun --kill-on-bad-exit=1 {python} -m experiments.adapt --distributed \\
    --workdir={folder} --config={config} --domains={domains}
code=$?
echo "ended with $code"
[ $code -le 2 ] && exit $code
[ "${{SLURM_RESTART_COUNT:-0}}" -lt 20 ] && scontrol requeue "$SLURM_JOB_ID"
"""
PATIENCE_S = 420


@contextlib.contextmanager
def named(nodes):
    """Lets the names of nodes mean this machine: JAX takes the first one as its coordinator."""
    hosts = pathlib.Path("/etc/hosts")
    before = hosts.read_text()
    hosts.write_text(before + "".join(f"127.0.0.1 {name}\n" for name in nodes))
    try:
        yield
    finally:
        hosts.write_text(before)


@pytest.fixture
def slurm(tmp_path, request):
    slurm_cluster.skip_unless_asked(request)
    with named(slurm_cluster.NODES), slurm_cluster.cluster(tmp_path / "slurm") as made:
        yield made


def processes_of(folder):
    """Those that adapt in a folder, by their number in the job."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if "experiments.adapt" in command and f"--workdir={folder}" in command:
                if command[0].endswith("srun"):
                    continue
                found[int(process.environ()["SLURM_PROCID"])] = process.pid
    return found


def until(ready, log):
    last = time.monotonic() + PATIENCE_S
    while not (value := ready()):
        said = log.read_text() if log.exists() else ""
        assert time.monotonic() < last, said
        time.sleep(0.5)
    return value


def test_a_job_that_loses_a_process_is_requeued_and_goes_on(slurm, tmp_path):
    config, part = team_config.get_config(), adapt.Part(domains=DOMAINS)
    alone, folder = tmp_path / "alone", tmp_path / "run"
    train.run(config, str(alone))
    shutil.copytree(alone, folder)
    assert adapt.run(config, str(alone), part=part, devices=1) == 0

    log, script = tmp_path / "log.txt", tmp_path / "job.sbatch"
    values = {"log": log, "python": sys.executable, "folder": folder, "config": CONFIG}
    script.write_text(SCRIPT.format(**values, domains=",".join(DOMAINS)))
    slurm.environment |= environment_of(2)
    job = slurm.ask("sbatch", "--parsable", f"--chdir={ROOT}", str(script)).strip()
    assert job.isdigit()
    results = folder / "results.jsonl"
    until(lambda: results.exists() and len(results.read_text().splitlines()) >= 3, log)
    os.kill(processes_of(folder)[1], signal.SIGKILL)
    until(lambda: "ended with" in log.read_text(), log)
    # The other process noticed by itself, or srun told it to stop.
    assert re.search(r"ended with (75|137|143)$", log.read_text(), re.M)

    until(lambda: "ended with 0" in log.read_text(), log)
    assert slurm.ask("squeue", "-h", "-j", job, "-t", "R").strip() == ""
    assert_equal_rows(rows_of(folder), rows_of(alone))

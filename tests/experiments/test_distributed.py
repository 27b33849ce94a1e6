"""Several processes that share a run: equal rows, a peer that dies, flags that cannot be."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time

import jax
import pytest

from experiments import adapt, launch, team, train
from tests.experiments import team_config
from tests.experiments.test_programs import ROOT, assert_equal_rows, rows_of

DOMAINS = ("fog", "contrast", "saturate")
CONFIG = ROOT / "tests" / "experiments" / "team_config.py"
# Of the methods those that start soonest, where processes are killed: a unit is a unit.
QUICK = "--methods=source,tent"
GATED = CONFIG.with_name("gated_config.py")


def environment_of(devices):
    """The environment of a process with so many devices."""
    # As in conftest.py, which says why.
    forced = (
        f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    return {
        # What one process compiles, however quickly, no other compiles again.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": forced,
    }


def start(folder, *flags, devices=2, config=CONFIG, **environment):
    """``experiments.adapt --distributed`` in a process of its own, with so many devices."""
    environment = os.environ | environment_of(devices) | environment
    command = [sys.executable, "-m", "experiments.adapt", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"--workdir={folder}", f"--domains={','.join(DOMAINS)}", *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def rendezvous(index, port, *, count=2):
    return (
        "--distributed",
        f"--coordinator=localhost:{port}",
        f"--num_processes={count}",
        f"--process_id={index}",
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_two(folder, *flags, **options):
    port = free_port()
    return [start(folder, *rendezvous(index, port), *flags, **options) for index in range(2)]


def finish(process):
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train.run(team_config.get_config(), str(folder))
    return folder


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(trained, folder)
    config, part = team_config.get_config(), adapt.Part(domains=DOMAINS)
    assert adapt.run(config, str(folder), part=part, devices=1) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_two_processes_that_slurm_started_equal_one(alone, folder):
    """JAX finds number and place of a process, and the first one's address, in the environment."""
    slurm = {
        "SLURM_JOB_ID": str(random.randrange(10**6)),  # decides the port
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
    }
    both = [
        start(folder, "--distributed", **slurm, SLURM_PROCID=str(n), SLURM_LOCALID=str(n))
        for n in range(2)
    ]
    ends = [finish(process) for process in both]
    assert [end[0] for end in ends] == [0, 0], ends
    assert f"{4 * len(DOMAINS)} rows in" in ends[0][1] and ends[1][1] == ""
    assert_equal_rows(rows_of(folder), rows_of(alone))
    chosen = [json.loads((at / "selection.json").read_text()) for at in (folder, alone)]
    assert chosen[0] == chosen[1]
    record = json.loads((folder / "run.json").read_text())
    assert (record["devices"], record["processes"]) == (2, 2)


def kill_midway(folder, which, lines):
    """Kills one of two processes once so many rows are there; returns how the other ended."""
    both = start_two(folder, QUICK, config=GATED, GATE_ROWS=str(lines))
    results = folder / "results.jsonl"
    try:
        while not results.exists() or results.read_bytes().count(b"\n") < lines:
            ended = [process for process in both if process.poll() is not None]
            assert not ended, ended[0].communicate()
            time.sleep(0.02)
        both[which].kill()
        # The other one ends by itself.
        return finish(both[1 - which])
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_peer_that_is_killed_ends_the_run_and_it_resumes(alone, folder):
    for which, lines in ((1, 2), (0, 4)):
        code, out, err = kill_midway(folder, which, lines)
        assert (code, out) == (launch.TRY_AGAIN, "")
        (line,) = err.splitlines()
        assert line.startswith("error: another process of this run has died")
        assert "start all processes again with the same command" in line
        assert lines <= len(rows_of(folder)) < 2 * len(DOMAINS)
    ends = [finish(process) for process in start_two(folder, QUICK)]
    assert [end[0] for end in ends] == [0, 0], ends
    wanted = [row for row in rows_of(alone) if row["method"] in ("source", "tent")]
    assert_equal_rows(rows_of(folder), wanted)


def test_an_error_of_one_process_ends_the_others_with_its_message(folder):
    with launch.locked(folder):
        ends = [finish(process) for process in start_two(folder)]
    assert [end[0] for end in ends] == [2, 2], ends
    message = f"{folder} is in use by another program"
    assert ends[0][2].startswith(f"error: {message}")
    assert ends[1][2].startswith(f"error: process 0: {message}")
    assert all(len(err.splitlines()) == 1 for _, _, err in ends)


def test_one_that_comes_alone_asks_to_be_started_again(folder):
    lonely = start(folder, *rendezvous(1, free_port()), "--initialization_timeout=1")
    code, _, err = finish(lonely)
    assert code == launch.TRY_AGAIN
    (line,) = err.splitlines()
    assert line.startswith("error: not all processes came within 1 s")


def test_without_slurm_it_says_what_to_give(folder):
    code, _, err = finish(start(folder, "--distributed"))
    (line,) = err.splitlines()
    assert code == 2
    assert "give --coordinator=HOST:PORT, --num_processes and --process_id" in line


def test_a_rendezvous_without_the_flag_is_refused(tmp_path):
    code, _, err = finish(start(tmp_path / "run", "--process_id=0"))
    assert (code, err.strip()) == (
        2,
        "error: --coordinator, --num_processes and --process_id need --distributed.",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("host:1", 2, None), r"go together; got 'host:1', 2 and None\. Give all three, or none"),
        ((None, None, 0), r"go together; got None, None and 0"),
        (("host", 2, 0), r"--coordinator must be HOST:PORT; got 'host'"),
        (("host:x", 2, 0), r"--coordinator must be HOST:PORT; got 'host:x'"),
        (("host:1", 2, 2), r"--process_id must lie between 0 and --num_processes - 1; got 2 of 2"),
        (("host:1", 0, 0), r"got 0 of 0"),
        (("host:1", 2, -1), r"got -1 of 2"),
    ],
)
def test_an_impossible_rendezvous(where, message):
    with pytest.raises(launch.UserError, match=message):
        with team.joined(team.Rendezvous(*where)):
            pytest.fail("joined")

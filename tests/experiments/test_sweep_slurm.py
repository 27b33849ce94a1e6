"""The example sweep on a real Slurm, which loses a node midway; ``make test-slurm``, as root."""

import pathlib
import re
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from tests.experiments import slurm_cluster

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "experiments" / "configs" / "digits_sweep.py"
TIMING = {"seconds", "compile_seconds", "samples_per_second"}

pytestmark = pytest.mark.slurm


@pytest.fixture
def slurm(tmp_path, request):
    slurm_cluster.skip_unless_asked(request)
    with slurm_cluster.cluster(tmp_path / "slurm") as made:
        yield made


def command(folder, *flags):
    program = [sys.executable, "-m", "experiments.sweep", f"--config={EXAMPLE}"]
    return [*program, f"--workdir={folder}", *flags]


def done(folder):
    said = subprocess.run(command(folder, f"--status={folder}"), capture_output=True, cwd=ROOT)
    found = re.search(r"(\d+) done", said.stdout.decode())
    return int(found[1]) if found else 0


def table(folder):
    found = pq.read_table(folder / "results.parquet")
    return found.drop_columns([name for name in found.column_names if name in TIMING])


def test_a_lost_node_loses_no_trial_and_doubles_none(slurm, tmp_path):
    folder, log = tmp_path / "sweep", tmp_path / "log.txt"
    with log.open("w") as file:
        sweep = subprocess.Popen(
            command(folder, "--executor=slurm", "--time_min=30"),
            env=slurm.environment,
            stdout=file,
            stderr=file,
            cwd=ROOT,
        )
        while done(folder) < 5:
            assert sweep.poll() is None, log.read_text()
            time.sleep(1)
        assert "node2" in slurm.ask("squeue", "-h", "-t", "R", "-o", "%N")
        slurm.kill("node2")
        assert sweep.wait() == 0, log.read_text()
    # Slurm has noticed.
    assert "down" in slurm.ask("sinfo", "-h", "-N", "-n", "node2", "-o", "%t")
    rows = table(folder)
    assert rows.num_rows == 24 == len(set(rows["trial"].to_pylist()))
    assert set(rows["status"].to_pylist()) == {"ok"}
    # The same on this machine; how many cores a training has changes its last bits.
    local = tmp_path / "local"
    subprocess.run(command(local, "--workers=1"), check=True, cwd=ROOT, capture_output=True)
    assert table(local).equals(rows)

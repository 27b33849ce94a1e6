"""Disks that are full or read-only: one sentence, and nothing of what was there is lost."""

import contextlib
import pathlib
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from tests.experiments import called, tiny_sweep

pytestmark = [
    # Mounts a file system, which `make test` must not.
    pytest.mark.faults,
    # Of ml_collections, which loads a config file so.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]


@pytest.fixture
def disk(tmp_path):
    """A file system of sixteen megabytes, in memory: five times what two trials write."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a small file system needs root: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def sweep(config, workdir):
    """Runs the program; returns its exit status and the last line of its errors."""
    command = [sys.executable, "-m", "experiments.sweep", f"--config={config}"]
    found = subprocess.run(
        [*command, f"--workdir={workdir}", "--workers=1", "--cores=1"],
        capture_output=True,
        text=True,
    )
    return found.returncode, found.stderr.strip()


def config_of(folder, seeds):
    body = f'for seed in range({seeds}):\n    add(seeds=(seed,), domains=("fog",))\n'
    return tiny_sweep.write(folder / f"sweep_{seeds}.py", body)


def fill(disk, free):
    """Leaves so many bytes of the disk free; returns what takes the rest."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with ballast.open("r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - free))
    return ballast


PROGRAMS = {  # name: what it starts with, its arguments, and free bytes that end it half-way
    "train": ((), ["--config.train.num_steps=6"], 40_000),
    "adapt": (("checkpoints",), ["--methods=source,rotation", "--domains=fog,clean"], 14_000),
    "diagnose": (("checkpoints",), ["--severities=1", "--corruptions=fog"], 6_000),
    "feature_shift": (("checkpoints",), ["--domains=fog"], 2_000),
}


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_ran_out_of_space_goes_on_with_the_same_command(
    name, disk, dense_folder, monkeypatch, capsys
):
    start, arguments, free = PROGRAMS[name]
    workdir = disk / "run"
    workdir.mkdir()
    for part in start:
        shutil.copytree(dense_folder / part, workdir / part)
    config = called.ROOT / "tests" / "experiments" / "dense_config.py"
    arguments = [f"--config={config}", f"--workdir={workdir}", *arguments]
    ballast = fill(disk, free)
    assert called.program(monkeypatch, f"experiments.{name}", *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert "No space left on device" in err and err.endswith("run the same command again.\n")
    assert not [path for path in workdir.rglob(".*") if not path.name.startswith((".lock", ".z"))]
    ballast.unlink()
    assert called.program(monkeypatch, f"experiments.{name}", *arguments) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert called.program(monkeypatch, f"experiments.{name}", *arguments) == 2
    assert "Read-only file system" in capsys.readouterr().err


def contents(workdir):
    return {
        path.relative_to(workdir): path.read_bytes()
        for name in ("results.jsonl", "results.parquet")
        for path in pathlib.Path(workdir).rglob(name)
    }


def test_rows_survive_a_full_disk_and_a_read_only_one(disk, tmp_path):
    one, two = config_of(tmp_path, 1), config_of(tmp_path, 2)
    workdir = disk / "sweep"
    assert sweep(one, workdir) == (0, "")
    before = contents(workdir)
    assert len(before) == 2

    # Some files of the next trial fit, its checkpoint does not.
    ballast = fill(disk, 80_000)
    status, said = sweep(two, workdir)
    assert status == 2
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert "intact" in said and "run the same command again" in said
    assert contents(workdir) == before

    ballast.unlink()
    remount = ["mount", "-o", "remount,ro", str(disk)]
    subprocess.run(remount, check=True)
    status, said = sweep(two, workdir)
    assert status == 2 and len(said.splitlines()) == 1
    assert "Read-only file system" in said and "intact" in said
    assert contents(workdir) == before

    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert sweep(two, workdir) == (0, "")
    after = contents(workdir)
    assert {name: after[name] for name in before if name.suffix == ".jsonl"} == {
        name: text for name, text in before.items() if name.suffix == ".jsonl"
    }
    rows = pq.read_table(workdir / "results.parquet").to_pylist()
    assert sorted({row["seed"] for row in rows}) == [0, 1]
    assert all(row["status"] == "ok" for row in rows)

"""``sweep --dry_run``: what it prints is what a run then writes, and it writes nothing itself."""

import os
import re

import pyarrow.parquet as pq
import pytest

from experiments import launch, sweep
from experiments.sweeping import preview, work
from tests.experiments import called, test_sweep, tiny_sweep

# Of ml_collections, which loads a config file so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
BODY = """
add(domains=("fog",))
add(domains=("fog", "speckle_noise"), seeds=(0,))
"""


def files_of(folder):
    """What lies in the folder of a unit, with how many files of instances and how many rows."""
    found = {path.name + "/" * path.is_dir() for path in folder.iterdir()}
    # Locks; folders that are empty; what the process says.
    found -= {
        "examples.npz",
        ".lock",
        ".lock.run",
        ".lock.selection",
        "attempt/",
        "training/",
        "log.txt",
    }
    if "checkpoints/" in found:
        found |= {f"checkpoints/{path.name}/" for path in (folder / "checkpoints").iterdir()}
    if "instances/" in found:
        count = len([*(folder / "instances").iterdir()])
        found |= {f"{count} file{'s' * (count > 1)} in instances/"}
        lines = len((folder / "results.jsonl").read_text().splitlines())
        found |= {f"results.jsonl of {lines} row{'s' * (lines > 1)}"}
    return {name for name in found if name not in ("checkpoints/", "instances/", "results.jsonl")}


def printed_of(text, kind):
    """The listed files of every unit by its id."""
    lines = re.findall(rf"^  {kind}s/(\w+)/: (.*)$", text, re.M)
    return {name: {*re.sub(r" \([^)]*\)", "", listed).split(", ")} for name, listed in lines}


def test_what_is_printed_is_what_is_written(tmp_path, monkeypatch, capsys):
    path, folder = tiny_sweep.write(tmp_path / "config.py", BODY), tmp_path / "sweep"
    arguments = [f"--config={path}", f"--workdir={folder}", "--config.adapt.severity=3"]
    assert called.program(monkeypatch, "experiments.sweep", *arguments, "--dry_run") == 0
    output = capsys.readouterr()
    assert output.err == "" and not folder.exists()
    assert output.out.startswith(f"2 trials, 1 model in {folder}/\n")
    assert "methods rotation; seed 0, model " in output.out
    assert "(waiting): seeds=0 domains=fog,speckle_noise\n" in output.out

    monkeypatch.setattr(work, "Process", test_sweep.Here)
    given = {"adapt.severity": 3}
    assert sweep.run(path, str(folder), test_sweep.Pool, overrides=given) == 0
    for kind in ("model", "trial"):
        listed = printed_of(output.out, kind)
        found = {place.name: files_of(place) for place in folder.glob(f"{kind}s/*")}
        maybe = {"perhaps examples.npz"} if kind == "trial" else set()
        assert listed == {name: files | maybe for name, files in found.items()}
    rows = pq.read_table(folder / "results.parquet").num_rows
    assert f"results.parquet of {rows} rows" in output.out and rows == 3
    # What is finished is said.
    before = {place: place.stat().st_mtime_ns for place in folder.rglob("*")}
    assert preview.show(path, str(folder), given) == 0
    assert capsys.readouterr().out.count("(done): ") == 3
    assert {place: place.stat().st_mtime_ns for place in folder.rglob("*")} == before


def refused(path, folder, words):
    with pytest.raises(launch.UserError, match=words):
        preview.show(path, str(folder))


def test_a_trial_that_cannot_run_is_said_now(tmp_path, capsys):
    nothing = '**{"methods.rotation.select": "nowhere/.*"}'
    path = tiny_sweep.write(tmp_path / "config.py", f'add(domains=("fog",))\nadd({nothing})')
    refused(path, tmp_path / "sweep", r"^1 of 2 trials cannot run: \w+ \(.*nowhere/")
    out = capsys.readouterr().out
    assert out.count("results.jsonl of 1 row (") == 1 and out.count("  cannot run: ") == 1
    assert not (tmp_path / "sweep").exists()


def test_what_a_sweep_is_refused_for_a_dry_run_is_refused_for(tmp_path, monkeypatch, capsys):
    path = tiny_sweep.write(tmp_path / "config.py", 'add(domains=("fog",))')
    (tmp_path / "file").write_text("")
    refused(path, tmp_path / "file" / "sweep", "file is a file and no folder; choose another")
    (tmp_path / "busy").mkdir()
    with launch.locked(tmp_path / "busy"):
        refused(path, tmp_path / "busy", "in use by another program")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(path, tmp_path / "sweep", "cannot be written; choose another --workdir")
    for flag in ("--workers=9999", "--executor=slurm"):
        monkeypatch.setenv("PATH", "")
        arguments = [f"--config={path}", f"--workdir={tmp_path / 'sweep'}", "--dry_run", flag]
        assert called.program(monkeypatch, "experiments.sweep", *arguments) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and ("cores" in err or "sbatch" in err)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["busy", "config.py", "file"]

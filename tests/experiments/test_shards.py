"""Processes that share a work folder: equal rows, candidates measured once, kills, refusals."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import adapt, diagnose, diagnosis, journal, launch, provenance, seed_run, tasks
from experiments.report import __main__ as report, read
from tests.experiments import dense_config
from tests.experiments.test_programs import ROOT, assert_equal_rows, rows_of
from ttt_jax import evaluation

pytestmark = pytest.mark.usefixtures("dense")
DOMAINS = ("fog", "contrast", "saturate")
CONFIG = ROOT / "tests" / "experiments" / "killed_config.py"


def get_config():
    config = dense_config.get_config()
    config.methods.rotation.learning_rate = (0.01, 0.03, 0.1)
    return config


@pytest.fixture(scope="module")
def trained(dense_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(dense_folder / "checkpoints", folder / "checkpoints")
    # As the training does.
    provenance.claim(folder, get_config())
    return folder


def run(folder, shard="0/1"):
    part, shard = adapt.Part(domains=DOMAINS), journal.shard(shard)
    return adapt.run(get_config(), str(folder), part=part, devices=1, shard=shard)


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("alone") / "run")
    assert run(folder) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def shard_rows(folder, name):
    lines = (folder / f"results.{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_shards_make_the_rows_of_one_process(folder, alone, capsys):
    assert [run(folder, f"{index}/3") for index in range(3)] == [0, 0, 0]
    assert not (folder / "results.jsonl").exists()
    parts = [shard_rows(folder, f"{index}-of-3") for index in range(3)]
    # No process has all streams of a method: the slowest one is everybody's.
    for part in parts:
        methods = [row["method"] for row in part]
        assert all(methods.count(name) < len(DOMAINS) for name in methods)
    # The report reads the rows of all; so does a run without a shard, which makes one file.
    assert len(read.results(folder).frame) == sum(map(len, parts))
    assert report.run(folder) == 0
    assert run(folder) == 0
    assert_equal_rows(rows_of(folder), rows_of(alone))
    assert not list(folder.glob("results.*-of-*"))
    chosen = [json.loads((at / "selection.json").read_text())["chosen"] for at in (folder, alone)]
    assert chosen[0] == chosen[1]
    record = json.loads((folder / "run.json").read_text())
    assert [entry.get("shards") for entry in record["runs"]] == [None, 3, 1]
    capsys.readouterr()


def test_a_run_without_a_shard_makes_what_a_shard_left(folder, alone):
    assert run(folder, "1/2") == 0
    before = shard_rows(folder, "1-of-2")
    assert run(folder) == 0
    assert_equal_rows(rows_of(folder), rows_of(alone))
    assert rows_of(folder)[: len(before)] == before


def test_another_number_of_shards_goes_on(folder, alone):
    assert run(folder, "0/2") == 0
    assert [run(folder, f"{index}/3") for index in range(3)] == [0, 0, 0]
    files = journal.files(folder / "results.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert_equal_rows(rows, rows_of(alone))


def test_a_failing_unit_fails_its_shard_alone(folder, alone, monkeypatch):
    rows = evaluation.Evaluation.rows

    def fail(self, label, method, streams):
        if label == "tent" and "fog" in streams:
            raise ValueError("fog is too thick")
        return rows(self, label, method, streams)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "rows", fail)
        ends = [run(folder, f"{index}/2") for index in range(2)]
    assert sorted(ends) == [0, 1]
    (failed,) = read.results(folder).frame.query("status == 'failed'").to_dict("records")
    assert (failed["method"], failed["domain"]) == ("tent", "fog")
    # Another number of shards makes the unit, and the report has no more of its failure.
    assert [run(folder, f"{index}/3") for index in range(3)] == [0, 0, 0]
    assert set(read.results(folder).frame["status"]) == {"ok"}
    assert run(folder) == 0
    assert_equal_rows(rows_of(folder), rows_of(alone))


def test_each_candidate_is_measured_by_one_process(folder, monkeypatch):
    """While shard 0 measures its first candidate, shard 1 does all of its own and the others."""
    measured = {"0/2": [], "1/2": []}
    score = seed_run.SeedRun.score

    def of(name, then=lambda: None):
        def counted(self, candidate):
            measured[name].append(candidate.settings["learning_rate"])
            then()
            return score(self, candidate)

        return counted

    class Stop(Exception):
        pass

    def second():
        # Shard 1 measures what is free, then waits for the first candidate: it must not here.
        locked = launch.locked

        def waits(folder, name=".lock", *, shared=False, wait=False):
            if wait and name.startswith(".lock.") and name[6].isdigit():
                raise Stop
            return locked(folder, name, shared=shared, wait=wait)

        with monkeypatch.context() as patch:
            patch.setattr(seed_run.SeedRun, "score", of("1/2"))
            patch.setattr(launch, "locked", waits)
            with pytest.raises(Stop):
                run(folder, "1/2")

    once = iter([second])
    monkeypatch.setattr(seed_run.SeedRun, "score", of("0/2", lambda: next(once, lambda: None)()))
    assert run(folder, "0/2") == 0
    assert measured == {"0/2": [0.01], "1/2": [0.03, 0.1]}
    tried = json.loads((folder / "selection.json").read_text())["tried"]
    assert sorted(entry["params"]["learning_rate"] for entry in tried) == [0.01, 0.03, 0.1]


def test_a_killed_shard_is_started_again(folder, alone, tmp_path):
    """SIGKILL after its third row; the other shard neither waits nor ends."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "KILL_AT_ROWS": "3",
    }
    command = [sys.executable, "-m", "experiments.adapt", f"--config={CONFIG}"]
    command += [f"--workdir={folder}", f"--domains={','.join(DOMAINS)}", "--devices=1"]
    command += ["--config.methods.rotation.learning_rate=(0.01,0.03,0.1)", "--shard=0/2"]
    end = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert end.returncode == -signal.SIGKILL, end.stderr
    assert len(shard_rows(folder, "0-of-2")) == 3
    assert [run(folder, f"{index}/2") for index in (1, 0)] == [0, 0]
    assert run(folder) == 0
    assert_equal_rows(rows_of(folder), rows_of(alone))


def test_the_sums_of_a_row_are_its_values(alone):
    """So rows of several parts are joined by addition, with the metrics of the task."""
    known = tasks.build(get_config()).metrics
    for row in rows_of(alone):
        assert {"error", "cross_entropy"} <= row["sums"].keys()
        for name, sums in row["sums"].items():
            value = known[name].value(np.asarray(sums))
            np.testing.assert_allclose(value, row[name], 1e-6, err_msg=name)


@pytest.mark.parametrize("shard", ["0/2", "0/1"])
def test_a_second_program_of_the_same_rows_is_refused(folder, shard):
    with journal.locked(folder, journal.Shard(0, 2)):
        with pytest.raises(launch.BusyError, match=r"is in use by another program"):
            run(folder, shard)
        with journal.locked(folder, journal.Shard(1, 2)):
            pass


def test_a_shard_is_refused_while_a_whole_run_is_at_work(folder):
    with journal.locked(folder, journal.WHOLE), pytest.raises(launch.BusyError):
        run(folder, "1/2")


def test_a_file_system_without_locks(folder, monkeypatch):
    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(launch.UserError, match=r"cannot be locked: No locks.*--workdir on a file"):
        run(folder, "1/2")


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "0.5/2"])
def test_what_is_no_shard(text):
    message = rf"--shard must be i/N, .* from 0 to N - 1; got '{text}'\. Write --shard=0/2"
    with pytest.raises(launch.UserError, match=message):
        journal.shard(text)
    assert journal.shard("1/2") == journal.Shard(1, 2)


def test_shards_of_a_diagnosis(trained, tmp_path, monkeypatch):
    folders = [shutil.copytree(trained, tmp_path / name) for name in ("alone", "shared")]
    # The method with the smallest program.
    config = dense_config.get_config()
    config.methods.memo = {"num_views": 2, "num_steps": 1, "learning_rate": 0.01, "select": "all"}
    options = diagnose.Options(
        "memo", severities=("5",), corruptions=DOMAINS[:2], num_images=10, learning_rates=("0.01",)
    )
    wanted = diagnose.run(config, str(folders[0]), options)
    shards, measure = [journal.Shard(index, 4) for index in (2, 1, 3)], diagnosis.Program.__call__

    def meanwhile(self, *args):
        while shards:
            diagnose.run(config, str(folders[1]), options, shard=shards.pop())
        return measure(self, *args)

    # The first shard is at work when the others begin, and ends last: its record has all rows.
    monkeypatch.setattr(diagnosis.Program, "__call__", meanwhile)
    made = diagnose.run(config, str(folders[1]), options, shard=journal.Shard(0, 4))
    assert not shards
    assert made["correlation"] == wanted["correlation"]
    rows = {row["domain"]: row for row in made["rows"]}
    assert len(made["rows"]) == len(wanted["rows"]) == 2
    times = {"seconds": 0, "compile_seconds": 0}
    for row in wanted["rows"]:
        np.testing.assert_equal(rows[row["domain"]] | times, row | times)
    # More processes than cells.
    empty = shutil.copytree(trained, tmp_path / "empty")
    assert diagnose.run(config, str(empty), options, shard=journal.Shard(3, 4)) == {}
    assert not (empty / "diagnostics.json").exists()


def test_rows_of_any_tags_stay_apart():
    row = {"method": "m", "dataset": "d", "seed": 0, "split_role": "reported", "stream": "s"}
    rows = [row | {"tags": ["camera"], "camera": camera} for camera in ("left", "right")]
    assert len({journal.identity(tagged) for tagged in rows}) == 2
    # Rows of earlier releases do not say their tags.
    old = row | {"domain": "fog", "severity": 5}
    assert journal.identity(old) == journal.identity(old | {"tags": ["severity", "domain"]})

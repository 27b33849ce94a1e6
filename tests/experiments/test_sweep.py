"""Sweeps: which trials there are, who runs them, what is counted and collected."""

import contextlib
import json
import os
import pathlib
import re
import signal
import threading
import time

import pyarrow.parquet as pq
import pytest

from experiments import launch, provenance, sweep, trial
from experiments.sweeping import collect, plan, pools, progress, state as state_lib, work
from experiments.sweeping.process import Limits
from experiments.sweeping.unit import Unit
from tests.experiments import tiny_sweep


@pytest.fixture
def config(tmp_path):
    return lambda body: tiny_sweep.write(tmp_path / "config.py", body)


GRID = """
for seed in range(2):
    for rate in (0.01, 0.1):
        add(domains=("fog",), seeds=(seed,), **{"methods.rotation.learning_rate": (rate,)})
"""


def test_trials_are_what_the_config_adds_and_share_models(config):
    found = plan.variants(config(GRID))
    assert [(v.seed, v.config.methods.rotation.learning_rate) for v in found] == [
        (seed, (rate,)) for seed in range(2) for rate in (0.01, 0.1)
    ]
    assert found[0].part.domains == ("fog",) and found[0].part.methods == ()
    units = plan.units(found)
    models, trials = units[:2], units[2:]
    assert [unit.kind for unit in units] == ["model"] * 2 + ["trial"] * 4
    assert [unit.needs for unit in trials] == [models[0].id] * 2 + [models[1].id] * 2
    assert len({unit.id for unit in units}) == 6
    assert trials[1].label == "seeds=0 methods.rotation.learning_rate=0.1 domains=fog"
    assert units == plan.units(plan.variants(config(GRID)))


def test_an_id_changes_with_settings_code_and_data(config, monkeypatch):
    def ids(body):
        (model, trial) = plan.units(plan.variants(config(body)))
        return model.id, trial.id

    plain = ids("add(seeds=(0,))")
    adapted = ids('add(seeds=(0,), **{"adapt.severity": 3})')
    assert adapted[0] == plain[0] and adapted[1] != plain[1]
    trained = ids('add(seeds=(0,), **{"train.num_steps": 13})')
    assert trained[0] != plain[0] and trained[1] != plain[1]
    part = ids('add(seeds=(0,), methods=("rotation",))')
    assert part[0] == plain[0] and part[1] != plain[1]
    with monkeypatch.context() as patch:
        patch.setattr(plan, "data_version", lambda config: "other")
        assert not set(ids("add(seeds=(0,))")) & set(plain)
    monkeypatch.setattr(plan, "code_version", lambda: "other")
    assert not set(ids("add(seeds=(0,))")) & set(plain)


def test_code_that_makes_no_row_changes_no_id(tmp_path, monkeypatch):
    def version():
        plan.code_version.cache_clear()
        return plan.code_version()

    for name in ("adapt.py", "report/page.py", "configs/digits.py"):
        path = tmp_path / "experiments" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr(plan, "_ROOT", tmp_path)
    plain = version()
    for name in ("report/page.py", "configs/digits.py"):
        (tmp_path / "experiments" / name).write_text("changed = True")
    assert version() == plain
    (tmp_path / "experiments" / "adapt.py").write_text("changed = True")
    assert version() != plain
    plan.code_version.cache_clear()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pass", "adds no trial"),
        ('add(**{"adapt.severty": 3})', r"no key 'adapt\.severty'.*did you mean adapt\.severity"),
        ('add(seeds=(0,), **{"adapt.severity": "high"})', "adapt|severity|type"),
        ("add(seeds=(0, 1))", r"one seed; got seeds=\(0, 1\)"),
        ("add(seeds=(0,))\nadd(seeds=(0,))", r"trials 0 and 1 are the same \(seeds=0\)"),
        ('add(methods=("rotate",))', "unknown method 'rotate'; choose from rotation"),
        ('add(domains="fog")', r"domains must be a list of names; got the text 'fog'"),
        ('add(methods="rotation")', "methods must be a list of names; got the text 'rotation'"),
        ('add(domains=("mist",))', "unknown domain 'mist'; choose from"),
        ('add(**{"train.num_steps": 0})', r"train\.num_steps must be at least 1; got 0"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(config, body, words):
    with pytest.raises(launch.UserError, match=words):
        plan.variants(config(body))


def test_no_such_file():
    with pytest.raises(launch.UserError, match=r"there is no file nowhere\.py"):
        plan.variants("nowhere.py")


def test_a_pack_differs_in_seeds_and_settings_alone(config):
    keys = [
        plan.pack_key(variant)
        for variant in plan.variants(
            config(
                """
                add(seeds=(0,))
                add(seeds=(1,), domains=("fog",), **{"methods.rotation.num_steps": 2})
                add(seeds=(0,), **{"adapt.chunk_size": 5})
                """
            )
        )
    ]
    assert keys[0] == keys[1] != keys[2]


class Pool:
    """Runs the job here, again and again."""

    def __init__(self, job):
        self._job = job

    def tend(self, now):
        work.run(self._job, threading.Event())

    def end(self):
        pass


def local(job):
    return pools.LocalPool(job, 2 * [pools.Worker((), {})])


class Quick:
    """Writes a row per trial; ``outcomes`` are those that differ, by label."""

    def __init__(self, job):
        self._labels = {unit.id: unit.label for unit in progress.load(pathlib.Path(job.workdir))}

    def attempt(self, folder, stop):
        self.done.append(label := self._labels[folder.name])
        if label in self.outcomes:
            return self.outcomes[label]
        if folder.parent.name == "trials":
            row = {"method": "rotation", "dataset": "digits", "domain": "fog", "severity": 5}
            row |= {"seed": 0, "split_role": "reported", "status": "ok", "error": 0.25}
            (folder / "results.jsonl").write_text(json.dumps(row) + "\n")
        return "done", ""

    def end(self):
        pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(Quick, "done", [], raising=False)
    monkeypatch.setattr(Quick, "outcomes", {}, raising=False)
    monkeypatch.setattr(work, "Process", Quick)
    return Quick


def test_every_trial_is_run_once_and_is_in_the_table(config, tmp_path, quick):
    path, folder = config(GRID), tmp_path / "sweep"
    assert sweep.run(path, str(folder), local) == 0
    units = plan.units(plan.variants(path))
    assert sorted(quick.done) == sorted(unit.label for unit in units)
    for seed in range(2):
        # Two workers: a trial may come before the other model.
        model, *trials = (label for label in quick.done if re.search(f"seeds?[ =]{seed}", label))
        assert model == f"model, seed {seed}" and len(trials) == 2
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [row["trial"] for row in rows] == [unit.id for unit in units[2:]]
    assert list(rows[0])[:2] == ["trial", "label"]


def test_a_table_has_one_value_per_cell(tmp_path):
    """Neither sums, whose metrics differ in shape, nor the list of tags become columns."""
    unit = Unit("trial", "one", "", None, "")
    unit.folder(tmp_path).mkdir(parents=True)
    row = {
        "method": "source",
        "dataset": "toy",
        "domain": "fog",
        "seed": 0,
        "split_role": "reported",
    }
    row |= {"status": "ok", "error": 0.5, "sums": {"error": [1, 2]}, "tags": ["domain"]}
    (unit.folder(tmp_path) / "results.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = pq.read_table(collect.write(tmp_path, collect.rows(tmp_path, [unit]))).to_pylist()
    assert found["error"] == 0.5 and not {"sums", "tags"} & found.keys()


def test_a_model_that_fails_fails_its_trials(config, tmp_path, quick, capsys):
    path, folder = config(GRID), tmp_path / "sweep"
    quick.outcomes["model, seed 1"] = ("failed", "no data")
    assert sweep.run(path, str(folder), local, Limits(retries=2)) == 1
    assert quick.done.count("model, seed 1") == 3
    assert "2 of 4 trials done, 2 failed" in capsys.readouterr().out
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed"]
    assert rows[2]["message"] == "its model failed: no data" and rows[2]["error"] is None
    # What failed for good stays so, until it is asked for.
    assert sweep.run(path, str(folder), local) == 1
    assert quick.done.count("model, seed 1") == 3
    quick.outcomes.clear()
    assert sweep.run(path, str(folder), local, retry_failed=True) == 0
    assert len(quick.done) == 3 + 1 + 2 + 1 + 2


@pytest.mark.parametrize(
    ("kind", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, launch.UserError)]
)
def test_a_signal_ends_the_jobs_and_is_one_sentence(config, tmp_path, quick, kind, raised):
    ended = []

    class Stopped(Pool):
        def tend(self, now):
            os.kill(os.getpid(), kind)

        def end(self):
            ended.append(signal.getsignal(kind))

    before = signal.getsignal(kind)
    with pytest.raises(raised, match=r"told to stop; what is finished is kept\. Run"):
        sweep.run(config(GRID), str(tmp_path / "sweep"), Stopped)
    # A second signal does not keep the jobs from being ended.
    assert ended == [signal.SIG_IGN] and signal.getsignal(kind) == before


def test_a_full_disk_ends_the_sweep_and_is_nobodys_failure(config, tmp_path, quick):
    path, folder = config(GRID), tmp_path / "sweep"
    sentence = "cannot write X: No space left on device. What was written before is intact"
    quick.outcomes["model, seed 0"] = ("blocked", sentence)
    for make_pool in (local, Pool):
        with pytest.raises(launch.UserError, match="No space left"):
            sweep.run(path, str(folder), make_pool)
    # With space it goes on by itself.
    quick.outcomes.clear()
    assert sweep.run(path, str(folder), local) == 0
    assert {s.failures for s in progress.measure(folder, progress.load(folder)).states} == {0}


def test_one_that_a_scheduler_runs_elsewhere_ends_the_sweep_too(config, tmp_path, quick):
    path, folder = config("add(seeds=(0,))"), tmp_path / "sweep"

    class Elsewhere(Pool):
        def tend(self, now):
            with contextlib.suppress(launch.UserError):
                super().tend(now)

    quick.outcomes["model, seed 0"] = ("blocked", "the config file has changed")
    with pytest.raises(launch.UserError, match="the config file has changed"):
        sweep.run(path, str(folder), Elsewhere)


def test_a_table_with_a_row_that_has_failed_since_is_written_again(config, tmp_path, quick):
    path, folder = config('add(domains=("fog",))'), tmp_path / "sweep"
    assert sweep.run(path, str(folder), local) == 0
    units = progress.load(folder)
    whole = pq.read_table(folder / "results.parquet").to_pylist()
    assert collect.up_to_date(folder, units)
    collect.write(folder, [{**whole[0], "status": "failed"}])
    assert not collect.up_to_date(folder, units)
    assert sweep.run(path, str(folder), local) == 0
    assert pq.read_table(folder / "results.parquet").to_pylist() == whole


class Here:
    """Does what the process of a job does, in this one."""

    def __init__(self, job):
        given = dict(word[2:].split("=", 1) for word in job.command if word.startswith("--"))
        self._trials = trial.Trials(given["config"], given["workdir"], (), given["overrides"])

    def attempt(self, folder, stop):
        return self._trials.attempt(folder.name)

    def end(self):
        pass


def test_a_model_keeps_its_steps_when_its_trials_change(config, tmp_path):
    # Its training is interrupted, and meanwhile the first trial becomes another one.
    path = config('add(domains=("fog",))')
    units = plan.units(plan.variants(path))
    place = units[0].folder(tmp_path)
    place.mkdir(parents=True)
    provenance.claim(place, plan.variants(path)[0].config)
    (place / "training" / "seed_0" / "something").mkdir(parents=True)
    other = config('add(domains=("fog",), **{"methods.rotation.learning_rate": (0.02,)})')
    changed = plan.units(plan.variants(other))
    assert changed[0].id == units[0].id and changed[1].id != units[1].id
    progress.save(tmp_path, units)
    outcome, message = trial.Trials(other, str(tmp_path)).attempt(units[0].id)
    assert outcome == "blocked" and "the config file or the code has changed since" in message
    progress.save(tmp_path, changed)
    assert trial.Trials(other, str(tmp_path)).attempt(units[0].id) == ("done", "")


def test_a_sweep_with_a_trial_that_fails(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(work, "Process", Here)
    nothing = '**{"methods.rotation.select": "nowhere/.*"}'
    path = config(f'add(domains=("fog",))\nadd(domains=("fog",), {nothing})')
    folder = tmp_path / "sweep"
    assert sweep.run(path, str(folder), Pool, Limits(retries=1)) == 1
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [(row["status"], row["domain"]) for row in rows] == [("ok", "fog"), ("failed", None)]
    assert "nowhere/.*" in rows[1]["message"]
    assert rows[0]["trial"] != rows[1]["trial"] and 0 <= rows[0]["error"] <= 1
    assert rows[0]["settings"].startswith('{"copies"')
    output = capsys.readouterr()
    assert "1 of 2 trials done, 1 failed" in output.out
    # Each different reason once, with where more is said.
    (reason,) = [line for line in output.err.splitlines() if line.startswith("failed (")]
    assert reason.startswith("failed (1): ") and "nowhere/.*" in reason
    assert reason.endswith(f"(log: {folder / 'trials' / rows[1]['trial'] / 'log.txt'})")
    said = sweep.status(str(folder))
    assert said.splitlines()[0].endswith("] 2 trials: 1 done, 0 running, 0 waiting, 1 failed")
    assert "nowhere/.*" in said.splitlines()[1]
    # Again: what failed for good stays so, and what is done is not done again.
    failed = state_lib.read(folder / "trials" / rows[1]["trial"])
    assert failed.failures == 2
    first = (folder / "trials" / rows[0]["trial"] / "results.jsonl").stat().st_mtime_ns
    assert sweep.run(path, str(folder), Pool) == 1
    assert state_lib.read(folder / "trials" / rows[1]["trial"]) == failed
    assert sweep.run(path, str(folder), Pool, retry_failed=True) == 1
    retried = state_lib.read(folder / "trials" / rows[1]["trial"])
    assert retried.failures == 2 and retried.started > failed.started
    assert (folder / "trials" / rows[0]["trial"] / "results.jsonl").stat().st_mtime_ns == first
    # Without the bad trial there is nothing to do but the table, and then nothing at all.
    path = config('add(domains=("fog",))')
    capsys.readouterr()
    assert sweep.run(path, str(folder), Pool) == 0
    assert "1 of 1 trials done, 0 failed" in capsys.readouterr().out
    assert pq.read_table(folder / "results.parquet").num_rows == 1
    written = (folder / "results.parquet").stat().st_mtime_ns
    assert sweep.run(path, str(folder), Pool) == 0
    assert "nothing to do: all 1 trials are finished" in capsys.readouterr().out
    assert (folder / "results.parquet").stat().st_mtime_ns == written


def test_a_second_sweep_of_a_folder_is_refused(config, tmp_path):
    folder = launch.open_workdir(str(tmp_path / "sweep"))
    with (
        launch.locked(folder),
        pytest.raises(launch.UserError, match="in use by another program"),
    ):
        sweep.run(config("add()"), str(folder), Pool)


def test_a_table_of_thousands_fits_a_terminal():
    """What has run longest comes first; the rest is counted."""
    units = [plan.Unit("trial", str(n), "d", "m", f"trial {n}") for n in range(4000)]
    states = [state_lib.State("running", started=time.time() - n) for n in range(1000)]
    states += 3000 * [state_lib.State("failed", message="broken")]
    lines = progress.table(units, progress.summarized(units, states)).splitlines()
    assert len(lines) == 1 + 2 * 9
    assert "trial 999:" in lines[1] and lines[9] == "  and 992 more that run"
    assert lines[18] == "  and 2992 more that failed"


def test_progress_counts_and_estimates(tmp_path, monkeypatch):
    units = [plan.Unit("trial", str(n), "d", "m", f"trial {n}") for n in range(4)]
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    states = {
        "0": state_lib.State("done", started=100.0, finished=200.0),
        "1": state_lib.State("running", started=960.0),
        "2": state_lib.State("failed", 2, 0, "broken"),
    }
    for name, state in states.items():
        state_lib.write(pathlib.Path(tmp_path) / "trials" / name, state)
    measured = progress.measure(tmp_path, units)
    # One of 100 s waits, and 60 of the running one are left, on one worker.
    assert measured.seconds_left == pytest.approx(160)
    assert progress.table(units, measured).splitlines() == [
        f"[{15 * '#'}{15 * '.'}] 4 trials: 1 done, 1 running, 1 waiting, 1 failed; "
        "about 02:40 left",
        "  running  1  trial 1: 00:40",
        "  failed   2  trial 2: broken",
    ]
    assert all(len(line) <= 20 for line in progress.table(units, measured, 20).splitlines())
    progress.save(tmp_path, units)
    assert progress.load(tmp_path) == units
    with pytest.raises(launch.UserError, match="there is no sweep in"):
        progress.load(tmp_path / "trials")

"""Sweeps: which trials there are, who runs them, what is counted and collected."""

import os
import pathlib
import time

import pyarrow.parquet as pq
import pytest

from experiments import launch, provenance, sweep
from experiments.sweeping import (
    collect,
    job as job_lib,
    plan,
    pools,
    progress,
    state as state_lib,
)
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
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(config, body, words):
    with pytest.raises(launch.UserError, match=words):
        plan.variants(config(body))


def test_no_such_file():
    with pytest.raises(launch.UserError, match=r"there is no file nowhere\.py"):
        plan.variants("nowhere.py")


def test_trials_of_a_pack_share_a_process():
    def unit(n, pack):
        return plan.Unit("trial" if pack else "model", str(n), "d", None, "", pack)

    units = [unit(n, "p") for n in range(5)] + [unit(5, "q"), unit(6, ""), unit(7, "")]

    def shared(room, workers, most):
        packs = sweep.packed(units, room, workers, most)
        return [[int(unit.id) for unit in pack] for pack in packs]

    assert shared(2, 2, 16) == [[0, 1, 2], [3, 4]]
    assert shared(8, 8, 16) == [[0], [1], [2], [3], [4], [5], [6], [7]]
    assert shared(4, 4, 16) == [[0, 1], [2, 3], [4], [5]]
    assert shared(2, 2, 2) == [[0, 1], [2, 3]]
    assert shared(1, 1, 16) == [[0, 1, 2, 3, 4]]
    # One worker is free and three are not: the others find something later.
    assert shared(1, 4, 16) == [[0, 1]]


def test_a_pack_differs_in_seeds_and_settings_alone(config):
    keys = [
        plan.pack_key(variant)
        for variant in plan.variants(
            config(
                """
                add(seeds=(0,))
                add(seeds=(1,), domains=("fog",), **{"methods.rotation.num_steps": 1})
                add(seeds=(0,), **{"adapt.chunk_size": 5})
                """
            )
        )
    ]
    assert keys[0] == keys[1] != keys[2]


def test_workers_share_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [w.cores for w in pools.workers(0, 0, [])] == [(n,) for n in range(8)]
    assert [w.cores for w in pools.workers(2, 0, [])] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [w.cores for w in pools.workers(0, 3, [])] == [(0, 1, 2), (3, 4, 5)]
    cards = pools.workers(0, 0, ["2", "5"])
    assert [w.cores for w in cards] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [w.environment for w in cards] == [{"CUDA_VISIBLE_DEVICES": n} for n in "25"]
    shared = pools.workers(4, 0, ["2", "5"])
    assert [w.environment["CUDA_VISIBLE_DEVICES"] for w in shared] == ["2", "5", "2", "5"]
    assert all(w.environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false" for w in shared)
    with pytest.raises(launch.UserError, match=r"3 workers of 4 cores need 12 cores.* may use 8"):
        pools.workers(3, 4, [])


def test_gpus_are_those_that_are_visible(monkeypatch):
    for value, names in (("2,3", ["2", "3"]), ("-1", []), ("", []), ("1,-1,2", ["1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert pools.visible_gpus() == names


class Silent:
    """Jobs that are gone without having done anything."""

    size = 2
    submitted = 0

    def room(self):
        return 2

    def submit(self, jobs):
        self.submitted += len(jobs)
        return [Ended() for _ in jobs]


def test_jobs_that_die_without_a_word_are_not_submitted_for_ever(config, tmp_path):
    pool = Silent()
    assert sweep.run(config("add(seeds=(0,))"), str(tmp_path / "sweep"), lambda jobs: pool) == 1
    assert pool.submitted == 21
    (row,) = pq.read_table(tmp_path / "sweep" / "results.parquet").to_pylist()
    assert row["message"] == "its model failed: killed 21 times: its job was killed"


def test_a_full_disk_ends_the_sweep_and_is_nobodys_failure(config, tmp_path, monkeypatch):
    path, folder = config('add(domains=("fog",))'), tmp_path / "sweep"
    sentence = "cannot write X: No space left on device. What was written before is intact"

    class Full(Inline):
        def submit(self, jobs):
            for one in jobs:
                place = pathlib.Path(one.folders[0])
                begun = state_lib.begun(state_lib.read(place))
                state_lib.write(place, state_lib.ended(begun, "blocked", sentence, 1))
            return [Ended() for _ in jobs]

    with pytest.raises(launch.UserError, match="No space left"):
        sweep.run(path, str(folder), lambda jobs: Full())
    # With space it goes on by itself.
    assert sweep.run(path, str(folder), lambda jobs: Inline()) == 0
    assert [s.failures for s in progress.measure(folder, progress.load(folder)).states] == [0, 0]


def test_a_model_keeps_its_steps_when_its_trials_change(config, tmp_path):
    # Its training is interrupted, and meanwhile the first trial becomes another one.
    folder = tmp_path / "sweep"
    path = config('add(domains=("fog",))')
    units = plan.units(plan.variants(path))
    place = units[0].folder(folder)
    place.mkdir(parents=True)
    provenance.claim(place, plan.variants(path)[0].config)
    state_lib.write(place, state_lib.State("running", interruptions=3))
    other = config('add(domains=("fog",), **{"methods.rotation.learning_rate": (0.02,)})')
    assert plan.units(plan.variants(other))[0].id == units[0].id
    assert sweep.run(other, str(folder), lambda jobs: Inline()) == 0


def test_a_table_with_a_row_that_has_failed_since_is_written_again(config, tmp_path):
    path, folder = config('add(domains=("fog",))'), tmp_path / "sweep"
    assert sweep.run(path, str(folder), lambda jobs: Inline()) == 0
    units = progress.load(folder)
    whole = pq.read_table(folder / "results.parquet").to_pylist()
    assert collect.up_to_date(folder, units)
    collect.write(folder, [{**whole[0], "status": "failed"}])
    assert not collect.up_to_date(folder, units)
    assert sweep.run(path, str(folder), lambda jobs: Inline()) == 0
    assert pq.read_table(folder / "results.parquet").to_pylist() == whole


class Inline:
    """Runs every job at once, here."""

    size = 1

    def room(self):
        return 1

    def submit(self, jobs):
        for one in jobs:
            job_lib.run(one)
        return [Ended() for _ in jobs]


class Ended:
    def alive(self):
        return False

    def cancel(self):
        raise AssertionError("it has ended")


def test_a_sweep_with_a_trial_that_fails(config, tmp_path, capsys):
    path = config('add(domains=("fog",))\nadd(domains=("mist",))')
    folder = tmp_path / "sweep"
    assert sweep.run(path, str(folder), lambda jobs: Inline(), sweep.Limits(retries=1)) == 1
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [(row["status"], row["domain"]) for row in rows] == [("ok", "fog"), ("failed", None)]
    assert "unknown domain 'mist'; choose from" in rows[1]["message"]
    assert rows[0]["trial"] != rows[1]["trial"] and 0 <= rows[0]["error"] <= 1
    assert rows[0]["settings"].startswith('{"copies"')
    assert "1 of 2 trials done, 1 failed" in capsys.readouterr().out
    said = sweep.status(str(folder))
    assert said.splitlines()[0].endswith("] 2 trials: 1 done, 0 running, 0 waiting, 1 failed")
    assert "unknown domain 'mist'" in said.splitlines()[1]
    # Again: what failed for good stays so, and what is done is not done again.
    failed = state_lib.read(folder / "trials" / rows[1]["trial"])
    assert failed.failures == 2
    first = (folder / "trials" / rows[0]["trial"] / "results.jsonl").stat().st_mtime_ns
    assert sweep.run(path, str(folder), lambda jobs: Inline()) == 1
    assert state_lib.read(folder / "trials" / rows[1]["trial"]).failures == 2
    assert sweep.run(path, str(folder), lambda jobs: Inline(), retry_failed=True) == 1
    assert state_lib.read(folder / "trials" / rows[1]["trial"]).failures == 2
    assert (folder / "trials" / rows[0]["trial"] / "results.jsonl").stat().st_mtime_ns == first
    # Without the bad trial there is nothing to do but the table, and then nothing at all.
    path = config('add(domains=("fog",))')
    capsys.readouterr()
    assert sweep.run(path, str(folder), lambda jobs: Inline()) == 0
    assert "1 of 1 trials done, 0 failed" in capsys.readouterr().out
    assert pq.read_table(folder / "results.parquet").num_rows == 1
    written = (folder / "results.parquet").stat().st_mtime_ns
    assert sweep.run(path, str(folder), lambda jobs: Inline()) == 0
    assert "nothing to do: all 1 trials are finished" in capsys.readouterr().out
    assert (folder / "results.parquet").stat().st_mtime_ns == written


def test_a_second_sweep_of_a_folder_is_refused(config, tmp_path):
    folder = launch.open_workdir(str(tmp_path / "sweep"))
    with (
        launch.locked(folder),
        pytest.raises(launch.UserError, match="in use by another program"),
    ):
        sweep.run(config("add()"), str(folder), lambda jobs: Inline())


def test_trials_of_a_model_that_failed_are_rows(tmp_path):
    units = [
        plan.Unit("model", "m", "d", None, "model, seed 0"),
        plan.Unit("trial", "t", "d", "m", "seeds=0"),
    ]
    state_lib.write(tmp_path / "models" / "m", state_lib.State("failed", 2, 0, "no data"))
    assert collect.rows(tmp_path, units) == [
        {
            "trial": "t",
            "label": "seeds=0",
            "status": "failed",
            "message": "its model failed: no data",
        }
    ]


def test_a_table_of_thousands_fits_a_terminal():
    """What has run longest comes first; the rest is counted."""
    units = [plan.Unit("trial", str(n), "d", "m", f"trial {n}") for n in range(4000)]
    states = [state_lib.State("running", started=time.time() - n) for n in range(1000)]
    states += 3000 * [state_lib.State("failed", message="broken")]
    lines = progress.table(units, progress.summarized(units, states)).splitlines()
    assert len(lines) == 1 + 2 * 9
    assert lines[1].endswith("trial 999") and lines[9] == "  and 992 more that run"
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
        "about 2:40 min left",
        "  running   40 s  1  trial 1",
        "  failed   2  trial 2: broken",
    ]
    assert all(len(line) <= 20 for line in progress.table(units, measured, 20).splitlines())
    progress.save(tmp_path, units)
    assert progress.load(tmp_path) == units
    with pytest.raises(launch.UserError, match="there is no sweep in"):
        progress.load(tmp_path / "trials")

"""Sweeps: which trials there are, how an attempt ends, what is counted and collected."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pyarrow.parquet as pq
import pytest

from experiments import launch, sweep
from experiments.sweeping import (
    collect,
    job as job_lib,
    plan,
    pools,
    progress,
    state as state_lib,
)

HEAD = """
from tests.experiments import tiny_config


def get_config():
    config = tiny_config.get_config()
    config.methods = {"rotation": config.methods.rotation}
    config.methods.rotation.learning_rate = (0.01,)
    return config


def sweep(add):
"""


@pytest.fixture
def config(tmp_path):
    def write(body):
        path = tmp_path / "config.py"
        path.write_text(HEAD + textwrap.indent(textwrap.dedent(body), "    "))
        return str(path)

    return write


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


BEGIN = """
import pathlib, sys
from experiments.sweeping import state
folders = [pathlib.Path(name) for name in sys.argv[1:]]
def begin(n):
    state.write(folders[n], state.begun(state.read(folders[n])))
def end(n, outcome="done", message=""):
    state.write(folders[n], state.ended(state.read(folders[n]), outcome, message, 1))
"""


def job(folders, program, **changed):
    """A process that runs a program with ``begin(n)`` and ``end(n)`` of its n-th unit."""
    folders = folders if isinstance(folders, list) else [folders]
    names = [str(folder) for folder in folders]
    head = BEGIN if "begin(" in program else ""
    values = {
        "command": [sys.executable, "-c", head + textwrap.dedent(program), *names],
        "folders": names,
        "environment": {"GREETING": "hello"},
        "cores": (),
        "owner": None,
        "retries": 1,
        "time_limit_s": 60.0,
        "memory_limit_gb": 0.0,
    }
    return job_lib.Job(**{**values, **changed})


def test_an_attempt_that_succeeds(tmp_path):
    core = min(os.sched_getaffinity(0))
    program = "import os; begin(0); print(os.environ['GREETING'], os.sched_getaffinity(0)); end(0)"
    assert job_lib.run(job(tmp_path / "a", program, cores=(core,))) == "done"
    state = state_lib.read(tmp_path / "a")
    assert (state.state, state.failures, state.message) == ("done", 0, "")
    assert state.finished >= state.started > 0
    assert (tmp_path / "a" / "log.txt").read_text() == f"hello {{{core}}}\n"
    # Started again, such as by a scheduler, it does nothing.
    assert job_lib.run(job(tmp_path / "a", "raise SystemExit(1)")) == "done"
    assert state_lib.read(tmp_path / "a") == state


def test_an_attempt_that_fails_is_tried_again_so_often(tmp_path):
    program = "begin(0); print('before'); sys.exit('error: no such thing')"
    assert job_lib.run(job(tmp_path, program)) == "failed"
    state = state_lib.read(tmp_path)
    assert (state.state, state.failures) == ("waiting", 1)
    assert state.message == "error: no such thing"
    assert job_lib.run(job(tmp_path, "raise SystemExit(3)")) == "failed"
    assert (state_lib.read(tmp_path).state, state_lib.read(tmp_path).failures) == ("failed", 2)
    for status, message in ((3, "exit status 3"), (0, "its process ended without a word")):
        silent = tmp_path / f"silent{status}"
        assert job_lib.run(job(silent, f"raise SystemExit({status})")) == "failed"
        assert state_lib.read(silent).message == message


def test_only_the_unit_that_was_at_work_is_charged(tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    program = "begin(0); end(0); begin(1); end(1, 'failed', 'bad'); begin(2); sys.exit('worse')"
    assert job_lib.run(job(folders, program)) == "failed"
    states = [state_lib.read(folder) for folder in folders]
    assert [(s.state, s.failures, s.message) for s in states] == [
        ("done", 0, ""),
        ("waiting", 1, "bad"),
        ("waiting", 1, "worse"),
        ("waiting", 0, ""),
    ]
    # What one says itself is not said again.
    job_lib.run(job(folders[1:], "begin(0); end(0, 'failed', 'bad'); sys.exit(1)"))
    states = [state_lib.read(folder) for folder in folders[1:]]
    assert [s.failures for s in states] == [2, 1, 0] and states[0].state == "failed"


def test_the_limit_of_time_is_that_of_one_unit(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    program = """
    import time
    for n in range(3):
        begin(n); time.sleep((6, 6, 300)[n]); end(n)
    """
    assert job_lib.run(job(folders, program, time_limit_s=10)) == "failed"
    assert [state_lib.read(folder).state for folder in folders] == ["done", "done", "waiting"]


SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
time.sleep(300)
"""


def gone(pid, patience_s=10.0):
    """Whether a process ends soon."""
    last = time.monotonic() + patience_s
    while time.monotonic() < last:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def first_pid(folder):
    """What the sleeper printed; it has, unless it was ended before it began."""
    return int((folder / "log.txt").read_text().split()[0])


def test_limits_of_time_and_memory(tmp_path):
    slow = tmp_path / "slow"
    assert job_lib.run(job(slow, SLEEPER, time_limit_s=6)) == "failed"
    assert state_lib.read(slow).message == "took longer than its limit of 0.1 minutes"
    assert gone(first_pid(slow))
    large = tmp_path / "large"
    program = "import time; held = bytearray(300_000_000); time.sleep(300)"
    assert job_lib.run(job(large, program, memory_limit_gb=0.2)) == "failed"
    assert "more than its limit of 0.2 GB" in state_lib.read(large).message


def test_a_killed_attempt_waits_to_go_on(tmp_path):
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert job_lib.run(job(tmp_path, program)) == "interrupted"
    state = state_lib.read(tmp_path)
    assert (state.state, state.failures, state.interruptions) == ("waiting", 0, 1)
    assert state.message == "killed by SIGKILL"


def test_a_job_that_is_told_to_stop_ends_its_processes(tmp_path):
    threading.Timer(5.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert job_lib.run(job(tmp_path, SLEEPER)) == "interrupted"
    assert state_lib.read(tmp_path).message == "told to stop"
    assert gone(first_pid(tmp_path))


def test_a_job_ends_with_the_sweep_that_owns_it(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    named = (owner.pid, psutil.Process(owner.pid).create_time())

    def end():
        owner.kill()
        owner.wait()

    threading.Timer(5.0, end).start()
    assert job_lib.run(job(tmp_path, SLEEPER, owner=named)) == "interrupted"
    assert state_lib.read(tmp_path).message == "the sweep ended"
    assert gone(first_pid(tmp_path))


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
    launch.claim(place, plan.variants(path)[0].config)
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
    assert said.splitlines()[0] == "trials: 1 done, 0 running, 0 waiting, 1 failed"
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
        "trials: 1 done, 1 running, 1 waiting, 1 failed; about 2:40 min left",
        "  running   40 s  1  trial 1",
        "  failed   2  trial 2: broken",
    ]
    progress.save(tmp_path, units)
    assert progress.load(tmp_path) == units
    with pytest.raises(launch.UserError, match="there is no sweep in"):
        progress.load(tmp_path / "trials")

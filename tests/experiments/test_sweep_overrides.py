"""A sweep takes values of its config from the command line, and survives a damaged state."""

import json
import pathlib
import re
import runpy
import sys

import pyarrow.parquet as pq
import pytest
from absl.testing import flagsaver

from experiments import launch, sweep, trial
from experiments.report import sweep as report_sweep
from experiments.sweeping import plan, pools, progress, state as state_lib, work
from experiments.sweeping.process import Limits
from tests.experiments import called, tiny_sweep

BODY = """
add(domains=("fog",))
add(domains=("contrast",))
"""


@pytest.fixture
def path(tmp_path):
    return tiny_sweep.write(tmp_path / "config.py", BODY)


def test_values_of_the_command_line_are_those_of_all_trials(path):
    plain, changed = plan.variants(path), plan.variants(path, {"adapt.severity": 3})
    assert [variant.config.adapt.severity for variant in changed] == [3, 3]
    assert {*map(plan.digest, plain)}.isdisjoint(map(plan.digest, changed))
    # As the process of a trial is told: lists, for JSON has no tuples.
    given = {"methods.rotation.learning_rate": (0.02, 0.05)}
    told = json.loads(trial.command(path, "folder", (), given)[-1].partition("=")[2])
    assert [*map(plan.digest, plan.variants(path, given))] == [
        *map(plan.digest, plan.variants(path, told))
    ]


def test_a_value_is_of_the_command_line_or_of_the_trials(tmp_path):
    path = tiny_sweep.write(tmp_path / "config.py", 'add(**{"adapt.severity": 4})')
    with pytest.raises(launch.UserError, match=r"sets adapt\.severity in its .*leave one out"):
        plan.variants(path, {"adapt.severity": 3})


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_program_takes_them_as_the_others_do(path, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(plan, "variants", lambda *values: given.extend(values) or [])
    arguments = [f"--config={path}", f"--workdir={tmp_path / 'w'}", "--config.adapt.severity=3"]
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    file = pathlib.Path(sweep.__file__)
    with flagsaver.flagsaver(), pytest.raises(SystemExit):
        runpy.run_path(str(file), run_name="__main__")
    assert given == [path, {"adapt.severity": 3}]


def test_the_program_says_that_it_needs_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", f"--workdir={tmp_path / 'w'}"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(pathlib.Path(sweep.__file__)), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: --config and --workdir are needed, or --status=DIR.\n"
    )


class Rows:
    """Writes one row and is done."""

    jobs = []  # noqa: RUF012 (of all)

    def __init__(self, job):
        self.jobs.append(job)

    def attempt(self, folder, stop):
        row = {"method": "source", "dataset": "d", "domain": "fog", "severity": 5, "seed": 0}
        row |= {"split_role": "reported", "status": "ok", "error": 0.5}
        if folder.parent.name == "trials":
            (folder / "results.jsonl").write_text(json.dumps(row) + "\n")
        return "done", ""

    def end(self):
        pass


@pytest.mark.parametrize("text", ['{"state": "do', "[]", '{"state": "odd"}'])
def test_a_damaged_state_is_unknown_and_the_rest_goes_on(path, tmp_path, monkeypatch, text):
    monkeypatch.setattr(work, "Process", Rows)
    folder = tmp_path / "sweep"
    local = lambda job: pools.LocalPool(job, [pools.Worker((), {})])  # noqa: E731
    assert sweep.run(path, str(folder), local, Limits()) == 0
    trials = [unit for unit in progress.load(folder) if unit.kind == "trial"]
    place = trials[0].folder(folder)
    (place / "state.json").write_text(text)
    assert state_lib.read(place).state == "unknown"
    said = sweep.status(str(folder))
    assert re.search(r"1 done, .*1 unknown", said) and "state.json is damaged" in said
    rows, counts, _, _ = report_sweep.read(folder)
    assert len(rows) == 2 and counts["waiting"] == 1
    assert sweep.run(path, str(folder), local, Limits()) == 0
    assert state_lib.read(place).state == "done"
    assert len(pq.read_table(folder / "results.parquet").to_pylist()) == 2


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_every_job_knows_the_command_that_was_typed(path, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "Process", Rows)
    monkeypatch.chdir(tmp_path)
    Rows.jobs.clear()
    arguments = [f"--config={path}", "--workdir=sweep", "--workers=1", "--cores=1", "--pack=1"]
    arguments += ["--config.adapt.severity=3"]
    assert called.program(monkeypatch, "experiments.sweep", *arguments) == 0
    said = "python -m experiments.sweep --config=config.py --workdir=sweep --workers=1 --cores=1 "
    said += "--pack=1 --config.adapt.severity=3"
    assert {job.environment["TTT_JAX_COMMAND"] for job in Rows.jobs} == {said}

"""One damaged file among many: one sentence with its name and what helps, or the rest goes on."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import launch, sweep, writers
from tests.experiments import called, report_rows, test_sweep, tiny_sweep

pytestmark = [
    pytest.mark.usefixtures("dense"),
    # Of ml_collections, which loads a config file so.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
CONFIG = f"--config={called.ROOT / 'tests' / 'experiments' / 'dense_config.py'}"
PART = ["--methods=source,rotation", "--domains=fog,clean", "--devices=1"]


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def fill(path):
    """Bytes that are no text, no JSON and no archive, as of another file."""
    path.write_bytes(b"\x00\xff\xfe other bytes\n")


@pytest.fixture(scope="module")
def adapted(dense_folder, tmp_path_factory):
    """A work folder with every file that ``adapt`` may leave."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    shutil.copytree(dense_folder / "checkpoints", folder / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        assert called.program(patch, "experiments.adapt", CONFIG, f"--workdir={folder}", *PART) == 0
    arrays = {name: np.zeros((1, 8, 8, 1), np.float16) for name in ("clean", "shifted")}
    arrays |= {name: np.zeros(1, int) for name in ("label", "before", "after")}
    launch.write_npz(folder / "examples.npz", {**arrays, "domain": np.array(["fog"])})
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program; returns its status, its output on one line, and its errors."""

    def of(name, *arguments):
        capsys.readouterr()
        status = called.program(monkeypatch, f"experiments.{name}", *arguments)
        out, err = capsys.readouterr()
        return status, " ".join(out.split()), err

    return of


ADAPT = [
    ("run.json", 2, "run.json is damaged (", "Use another --workdir, or remove the file if"),
    ("selection.json", 2, "selection.json is damaged (", "remove it."),
    ("checkpoints/seed_0/ttt_jax.json", 2, "ttt_jax.json is damaged or", "remove it and make it a"),
    ("checkpoints/seed_0/params/_METADATA", 2, "_METADATA of the", "remove it and make it again."),
    ("checkpoints/seed_0/params/*/0.0", 2, "leaf 'params/", "remove it and make it again."),
]


@pytest.mark.parametrize("damage", [cut, fill])
@pytest.mark.parametrize(("name", "status", "said", "mend"), ADAPT, ids=[a[0] for a in ADAPT])
def test_adapt_names_the_file_and_what_helps(
    adapted, tmp_path, run, damage, name, status, said, mend
):
    folder = shutil.copytree(adapted, tmp_path / "run")
    damage(sorted(folder.glob(name))[0])
    ended, _, err = run("adapt", CONFIG, f"--workdir={folder}", *PART)
    assert ended == status and len(err.splitlines()) == 1
    assert said in err and mend in err


@pytest.mark.parametrize("name", ["results.jsonl", "instances/*.npz", "examples.npz"])
def test_adapt_goes_on_after_a_file_that_was_cut(adapted, tmp_path, run, name):
    folder = shutil.copytree(adapted, tmp_path / "run")
    before = len((folder / "results.jsonl").read_text().splitlines())
    cut(sorted(folder.glob(name))[0])
    assert run("adapt", CONFIG, f"--workdir={folder}", *PART)[::2] == (0, "")
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == before and {json.loads(line)["status"] for line in lines} == {"ok"}


def test_a_line_that_is_no_row_is_named(adapted, tmp_path, run):
    folder = shutil.copytree(adapted, tmp_path / "run")
    path = folder / "results.jsonl"
    path.write_text('{"method": "sour\n' + path.read_text())
    for name, arguments in (("adapt", [CONFIG, *PART]), ("report", [])):
        ended, _, err = run(name, *arguments, f"--workdir={folder}")
        assert ended == 2 and len(err.splitlines()) == 1
        assert "results.jsonl, line 1: not a result row (" in err and "Remove the line, or" in err


REPORT = [
    ("run.json", "run.json could not be read ("),
    ("selection.json", "selection.json could not be read ("),
    ("results.jsonl", "The last line of results.jsonl"),
    ("instances/*.npz", ".npz is damaged ("),
    ("examples.npz", "examples.npz is damaged ("),
]


@pytest.mark.parametrize("damage", [cut, fill])
@pytest.mark.parametrize(("name", "said"), REPORT, ids=[name for name, _ in REPORT])
def test_the_report_shows_the_rest(adapted, tmp_path, run, damage, name, said):
    folder = shutil.copytree(adapted, tmp_path / "run")
    path = sorted(folder.glob(name))[0]
    damage(path)
    ended, out, err = run("report", f"--workdir={folder}")
    if (name, damage) == ("results.jsonl", fill):
        assert ended == 2 and len(err.splitlines()) == 1 and "line 1: not a result row" in err
        return
    assert (ended, err) == (0, "")
    assert f"note: {said}" in out or (said in out and path.name in out)
    assert (folder / "report.html").exists()


@pytest.mark.filterwarnings("default")
def test_a_saved_state_that_is_damaged_is_one_line_and_an_older_one_serves(
    tmp_path, run, monkeypatch
):
    folder = tmp_path / "run"

    def stop(self, step, values, seed):
        if step == 8:
            raise launch.UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(writers._JsonLines, "scalars", stop)
        assert run("train", CONFIG, f"--workdir={folder}")[0] == 2
    cut(sorted(folder.glob("training/seed_0/step_5/params/*/0.0"))[0])
    ended, out, err = run("train", CONFIG, f"--workdir={folder}")
    assert ended == 0 and "saved" in out and len(err.splitlines()) == 1, err
    assert err.startswith(f"warning: The state {folder}/training/seed_0/step_5 cannot be used, so ")


def test_a_line_that_a_killed_process_left_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with writers.open_writer(tmp_path) as writer:
            writer.scalars(1, {"loss": 0.5}, 0)
        with path.open("ab") as file:
            file.write(b'{"seed": 0, "st')
    with writers.open_writer(tmp_path) as writer:
        writer.scalars(2, {"loss": 0.5}, 0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1, 2]


@pytest.mark.parametrize("program", ["shuffle", "pacs"])
@pytest.mark.parametrize("damage", [cut, fill])
def test_a_set_to_be_prepared(tmp_path, run, damage, program):
    name = {"shuffle": "set.npz", "pacs": "photo.npz"}[program]
    np.savez(tmp_path / name, images=np.zeros((4, 2, 2, 3)))
    damage(tmp_path / name)
    source = {"shuffle": tmp_path / name, "pacs": f"{tmp_path}/{{domain}}.npz"}[program]
    target = tmp_path / ("new.npz" if program == "shuffle" else "new")
    status, _, err = run(f"prepare.{program}", f"--source={source}", f"--target={target}")
    assert status == 2 and len(err.splitlines()) == 1
    assert f"{name} is damaged (" in err and err.endswith("Make or fetch it again.\n")


@pytest.fixture
def swept(tmp_path, monkeypatch, request):
    """The command of a sweep of two trials that is finished, without jax, and its folder."""
    request.getfixturevalue("quick")
    path = tiny_sweep.write(
        tmp_path / "config.py", 'add(domains=("fog",))\nadd(domains=("frost",))'
    )
    folder = tmp_path / "sweep"
    assert sweep.run(path, str(folder), test_sweep.local) == 0
    for place in folder.glob("trials/*"):
        (place / "run.json").write_text('{"command": "python -m experiments.sweep"}')
    return [f"--config={path}", f"--workdir={folder}", "--workers=1", "--cores=1"], folder


quick = test_sweep.quick
SWEEP = {  # name: status and words of the report, of --status
    "plan.json": (0, "plan.json could not be read", 2, "plan.json is damaged"),
    "trials/*/state.json": (0, "1 waiting", 0, "state.json is damaged"),
    "trials/*/results.jsonl": (0, "", 0, "2 done"),
    "trials/*/run.json": (0, "run.json could not be read", 0, "2 done"),
    "results.parquet": (2, "results.parquet is damaged", 0, "2 done"),
}


@pytest.mark.parametrize("damage", [cut, fill])
@pytest.mark.parametrize("name", SWEEP)
def test_a_sweep_makes_again_what_is_damaged(swept, run, name, damage):
    arguments, folder = swept
    whole = pq.read_table(folder / "results.parquet").to_pylist()
    for path in folder.glob(name) if name.endswith("run.json") else [next(folder.glob(name))]:
        damage(path)
    ended, words, told, status = SWEEP[name]
    assert run("sweep", f"--status={folder}")[0] == told
    _, out, err = run("sweep", f"--status={folder}")
    assert status in out + err and len(err.splitlines()) <= 1
    got, out, err = run("report", f"--workdir={folder}")
    assert got == ended and words in out + err and len(err.splitlines()) <= 1
    assert run("sweep", *arguments)[::2] == (0, "")
    assert pq.read_table(folder / "results.parquet").to_pylist() == whole
    assert run("report", f"--workdir={folder}")[0] == 0


def test_a_trial_whose_rows_are_damaged_is_said_among_the_others(tmp_path, run, monkeypatch):
    """A sweep without its table, as one at work: the page has the rows of the other trials."""
    rows = [report_rows.row("source", "fog", seed, 0.4) for seed in (0, 1)]
    report_rows.put_sweep(tmp_path, {f"seeds={row['seed']}": [row] for row in rows})
    (tmp_path / "results.parquet").unlink(missing_ok=True)
    fill(sorted(tmp_path.glob("trials/*/results.jsonl"))[0])
    # Long messages are cut, and so would be a long path.
    monkeypatch.chdir(tmp_path)
    ended, out, err = run("report", "--workdir=.")
    assert (ended, err) == (0, "")
    assert "failed, 1 row: " in out and "trials/t0/results.jsonl, line" in out


def test_a_model_whose_checkpoint_is_gone_is_trained_again(swept, run, quick):
    arguments, folder = swept
    (model,) = folder.glob("models/*")
    (model / "run.json").write_text("{}")  # it was trained by a process of its own
    quick.done.clear()
    # Nothing needs it.
    assert run("sweep", *arguments)[0] == 0 and quick.done == []
    (folder / "trials").rename(folder / "gone")
    assert run("sweep", *arguments)[0] == 0
    assert quick.done == ["model, seed 0", "domains=fog", "domains=frost"]

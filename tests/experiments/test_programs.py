"""The programs: train, adapt, resume, refuse; on a dense model of the digits."""

import json
import os
import pathlib
import resource
import runpy
import shutil
import signal
import subprocess
import sys

import jax
import pytest
from absl.testing import flagsaver

from experiments import adapt, journal, launch, result_rows
from tests.experiments import dense_config
from ttt_jax import audit, evaluation

pytestmark = pytest.mark.usefixtures("dense")
ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "tests" / "experiments" / "tiny_config.py"
RATES = (0.01, 0.03)
TIMING = ("seconds", "samples_per_second", "compile_seconds")
REQUIRED = (
    "method dataset domain severity seed error num_examples num_steps scope split_role reset "
    "predict seconds samples_per_second checkpoint status"
).split()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# What most tests compare: the reported streams of two corruptions.
PART = adapt.Part(domains=("fog", "contrast"))


def rows_of_part(folder):
    return [row for row in rows_of(folder) if row["domain"] in PART.domains]


def without_timing(rows):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def assert_equal_rows(left, right):
    """Equal but for timing; probes and drift differ by rounding, as programs are compiled anew."""

    def steps_of(row):
        return row["num_examples"] if row.get("scope") == "stream" else row.get("num_steps", 0)

    left, right = (
        sorted(without_timing(rows), key=lambda row: str(journal.identity(row)))
        for rows in (left, right)
    )
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        names = {"aux_loss_before", "aux_loss_after", "cross_entropy", "drift"} & set(a)
        for name in names:
            limit = audit.tolerance(steps_of(a))
            assert a.pop(name) == pytest.approx(b.pop(name), rel=limit, abs=limit)
        # Sums of those differ by rounding too; the others are whole numbers.
        sums, others = (jax.tree.leaves_with_path(row.pop("sums", {})) for row in (a, b))
        for (path, leaf), (path_of_other, other) in zip(sums, others, strict=True):
            limit = audit.tolerance(steps_of(a)) if isinstance(leaf, float) else 0.0
            assert path == path_of_other and leaf == pytest.approx(other, rel=limit, abs=limit)
        assert a == b


def command(name, *arguments, config=CONFIG):
    return [sys.executable, "-m", f"experiments.{name}", f"--config={config}", *arguments]


def called(monkeypatch, name, *arguments):
    """A program run here, with flags of its own; returns its exit status."""
    monkeypatch.setattr(sys, "argv", command(name, *arguments)[2:])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__")
    return ended.value.code


def get_config():
    config = dense_config.get_config()
    config.methods.rotation.learning_rate = RATES
    return config


def run(folder, config=None, **options):
    """Adapts on one device; ``test_devices`` takes all."""
    return adapt.run(config or get_config(), str(folder), devices=1, **options)


@pytest.fixture(scope="module")
def trained(dense_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(dense_folder / "checkpoints", folder / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "run"
    shutil.copytree(trained, folder)
    assert run(folder) == 0
    return folder


def test_one_row_per_trial_with_the_whole_schema(adapted):
    rows = rows_of(adapted)
    assert len(rows) == 4 * (16 + 4)
    assert len({journal.identity(row) for row in rows}) == len(rows)
    for row in rows:
        assert [key for key in REQUIRED if key not in row] == []
        assert 0 <= row["error"] <= 1
        assert row["severity"] == (0 if row["domain"] == "clean" else 5)
    reported = [row for row in rows if row["split_role"] == "reported"]
    assert {row["num_examples"] for row in reported} == {30}
    # Of each row what the most frequent of its classes is not.
    (chance,) = {row["chance"] for row in reported}
    assert 0.7 < chance <= 0.9 and round(30 * chance, 6).is_integer()
    scopes = {row["method"]: row["scope"] for row in rows}
    assert scopes == {
        "source": "per_sample",
        "rotation": "per_sample",
        "rotation_online": "stream",
        "tent": "batch",
    }


def test_flips_and_curves_agree_with_the_errors(adapted):
    rows = {(r["method"], r["domain"]): r for r in rows_of(adapted)}
    for (method, domain), row in rows.items():
        change = row["turned_right"] - row["turned_wrong"]
        assert rows["source", domain]["error"] - row["error"] == pytest.approx(change, abs=1e-9)
        if method == "rotation":
            assert row["error_by_step"][0] == pytest.approx(rows["source", domain]["error"])
            assert row["error_by_step"][-1] == row["error"]
            assert row["aux_loss_before"] > 0


def test_settings_come_from_the_validation_candidates(adapted):
    selection = json.loads((adapted / "selection.json").read_text())
    tried = [entry for entry in selection["tried"] if entry["method"] == "rotation"]
    assert sorted(entry["params"]["learning_rate"] for entry in tried) == [0.01, 0.03]
    best = min(tried, key=lambda entry: (entry["error"], entry["cross_entropy"]))
    assert selection["chosen"]["rotation"] == best["params"]
    for row in rows_of(adapted):
        assert row["settings"] == selection["chosen"][row["method"]]


@pytest.mark.parametrize("mode", ["fingerprint", "orbax"])
def test_restore_modes_give_equal_rows(adapted, trained, tmp_path, mode):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    assert run(folder, restore=mode, part=PART) == 0
    assert_equal_rows(rows_of(folder), rows_of_part(adapted))


def test_a_finished_run_is_left_alone(adapted):
    before = (adapted / "results.jsonl").read_bytes()
    assert run(adapted) == 0
    assert (adapted / "results.jsonl").read_bytes() == before


def test_killed_in_the_middle_resumes_to_the_same_rows(adapted, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    environment = {
        # What this process compiled.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # As in conftest.py: on a GPU the default would be tf32.
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "KILL_AT_ROWS": "3",
    }
    config = CONFIG.with_name("killed_config.py")
    arguments = [f"--workdir={folder}", "--devices=1", "--methods=source,tent"]
    arguments += [f"--domains={','.join(PART.domains)}"]
    arguments += [f"--config.methods.rotation.learning_rate={RATES}"]
    killed = subprocess.run(
        command("adapt", *arguments, config=config), cwd=ROOT, env=os.environ | environment
    )
    assert killed.returncode == -signal.SIGKILL
    results = folder / "results.jsonl"
    assert results.read_bytes().count(b"\n") == 3
    with results.open("ab") as file:
        file.write(b'{"method": "source", "data')
    assert run(folder, part=PART) == 0
    assert_equal_rows(rows_of(folder), rows_of_part(adapted))


def test_parts_add_up_to_the_whole(adapted, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    config = get_config()
    some = PART._replace(methods=["rotation"])
    assert run(folder, config, part=some) == 0
    made = {(row["method"], row["domain"]) for row in rows_of(folder)}
    assert made == {("rotation", "fog"), ("rotation", "contrast")}
    assert run(folder, config, part=PART) == 0
    assert_equal_rows(rows_of(folder), rows_of_part(adapted))
    for part, message in (
        (adapt.Part(methods=["tnet"]), "unknown method 'tnet'; choose from"),
        (adapt.Part(domains=["fgo"]), "unknown domain 'fgo'; choose from"),
    ):
        with pytest.raises(launch.UserError, match=message):
            run(folder, config, part=part)


def test_a_failing_trial_is_a_row_and_runs_again(trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    rows_of_unit = evaluation.Evaluation.rows

    def fail_on_fog(self, label, method, streams):
        if label == "rotation" and "fog" in streams:
            raise ValueError("fog is too thick")
        return rows_of_unit(self, label, method, streams)

    monkeypatch.setattr(evaluation.Evaluation, "rows", fail_on_fog)
    assert run(folder, part=PART) == 1
    failed = [row for row in rows_of(folder) if row["status"] == "failed"]
    assert [(r["method"], r["domain"]) for r in failed] == [("rotation", "fog")]
    assert "fog is too thick" in failed[0]["message"] and "error" not in failed[0]
    monkeypatch.undo()
    assert run(folder, part=PART) == 0
    rows = rows_of(folder)
    assert len(rows) == 8 and {row["status"] for row in rows} == {"ok"}


def test_a_full_disk_keeps_what_was_written(adapted, tmp_path):
    """A limit on file size stands in for a full disk: the write of a row fails half way."""
    path = tmp_path / "results.jsonl"
    rows = rows_of(adapted)[:3]
    line = len(json.dumps(rows[0])) + 1
    book = journal.Journal(path)
    book.add(rows[0])
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (line + 20, old[1]))
    try:
        with pytest.raises(launch.UserError, match=r"cannot write .*results\.jsonl.*is intact"):
            book.add(rows[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert rows_of(tmp_path) == rows[:1]
    book = journal.Journal(path)
    book.add(rows[1])
    assert rows_of(tmp_path) == rows[:2]


def test_an_unwritable_workdir_is_one_sentence(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(launch.UserError, match=r"cannot write .*choose another --workdir"):
        adapt.run(get_config(), str(blocked / "run"))


def test_another_config_in_the_same_folder_is_refused(adapted):
    config = get_config()
    config.adapt.severity = 3
    with pytest.raises(launch.UserError, match=r"adapt.severity was 5, now 3"):
        run(adapted, config)


def test_no_checkpoint_says_how_to_train(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train one first: python -m experiments\.train"):
        adapt.run(get_config(), str(tmp_path))


def test_other_normalisation_constants_are_refused(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    config = get_config()
    config.data.mean = 0.25
    with pytest.raises(ValueError, match="mean"):
        run(folder, config)


# Of ml_collections, which loads a config file so.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("argument", "status", "words"),
    [
        ("--workdri=x", 2, ["workdri", "Did you mean", "workdir"]),
        ("--config.adapt.severty=3", 2, ["severty", 'Did you mean "severity"']),
        ("--config.adapt.severity=high", 2, ["adapt.severity", "high"]),
        ("--config.adapt.sequence=mixed", 2, ["no adapt.sequence, which is 'none' by", "add it"]),
        ("--config.methods.rotation.optimizer=adam", 2, ["no methods.rotation.optimizer", "add"]),
        ("--methods=", 2, ["--methods was given without a name; leave it out for all"]),
        ("--config.seeds=()", 2, ["config.seeds must list at least one integer", "got ()"]),
        ("--restore=disk", 2, ["restore", "memory|fingerprint|orbax"]),
    ],
)
def test_wrong_flags_name_the_nearest(tmp_path, argument, status, words, monkeypatch, capsys):
    assert called(monkeypatch, "adapt", f"--workdir={tmp_path}", argument) == status
    err = capsys.readouterr().err
    assert [word for word in words if word not in err] == []
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_program_ends_with_its_status(tmp_path):
    """Run as a person does, in a process of its own."""
    wrong = command("adapt", f"--workdir={tmp_path}", "--config.seeds=()")
    ended = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: config.seeds must list at")
    assert len(ended.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_a_value_that_was_wrong_can_be_corrected(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    config = get_config()
    part = adapt.Part(("source",), ("clean",))
    for section, key, value, words in (
        ("adapt", "severity", 7, r"adapt\.severity must be at least 1 and at most 5; got 7"),
        ("adapt", "batch_size", 0, r"adapt\.batch_size must be at least 1; got 0"),
        ("adapt", "corruption_seed", -1, r"adapt\.corruption_seed must be at least 0; got -1"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong[section][key] = value
        with pytest.raises(ValueError, match=words):
            run(folder, wrong, part=part)
    wrong = config.copy_and_resolve_references()
    wrong.methods.rotation.learning_rate = ()
    with pytest.raises(ValueError, match=r"methods\.rotation: learning_rate lists no candidate"):
        run(folder, wrong, part=part)
    assert run(folder, config, part=part) == 0


def test_a_method_that_could_not_adapt_is_named(capsys):
    def row(lost, method="rotation"):
        return {"method": method, "status": "ok", "non_finite": lost, "num_examples": 20}

    (line,) = result_rows.not_adapted([row(1), row(15), row(1, "memo"), row(1, "memo")])
    assert line.startswith("rotation: steps were not finite on 16 of 40 instances")


def test_an_unknown_method_is_refused(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    config = get_config()
    config.methods.rotate = {"num_steps": 1}
    with pytest.raises(ValueError, match=r"methods\.rotate: method must be a function of ttt_jax"):
        run(folder, config)


def test_two_programs_on_one_folder_are_refused(trained, tmp_path):
    with launch.locked(tmp_path):
        with pytest.raises(launch.UserError, match="in use by another program"):
            adapt.run(get_config(), str(tmp_path))


def test_rows_of_another_checkpoint_are_refused(adapted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(adapted, folder)
    lines = (folder / "results.jsonl").read_text().replace('"checkpoint": "', '"checkpoint": "0')
    (folder / "results.jsonl").write_text(lines)
    with pytest.raises(launch.UserError, match="rows of another checkpoint"):
        run(folder)
    selection = json.loads((folder / "selection.json").read_text())
    (folder / "selection.json").write_text(json.dumps(selection | {"checkpoint": "other"}))
    with pytest.raises(
        launch.UserError, match=r"selection\.json was made otherwise: checkpoint was"
    ):
        run(folder)

"""The diagnostics program goes on where it ended, and refuses rows of another run."""

import json
import shutil

import pytest

from experiments import diagnose, diagnose_record, journal, launch
from experiments.tasks import image_order
from tests.experiments.diagnosed import OPTIONS, get_config

pytestmark = pytest.mark.usefixtures("dense")


def test_finished_cells_are_skipped(diagnosed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(diagnosed[0], folder)
    made = []
    first_images = image_order.first_images

    def counted(config, source, domain, severity, **rest):
        made.append((domain, severity))
        return first_images(config, source, domain, severity, **rest)

    monkeypatch.setattr(image_order, "first_images", counted)
    path = folder / "diagnostics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])
    record = diagnose.run(get_config(), str(folder), OPTIONS)
    assert made == [("fog", 5)]
    timing = ("seconds", "compile_seconds")
    for again, row in zip(record["rows"], diagnosed[1]["rows"], strict=True):
        assert {k: v for k, v in again.items() if k not in timing} == {
            k: v for k, v in row.items() if k not in timing
        }
    diagnose.run(get_config(), str(folder), OPTIONS)
    assert made == [("fog", 5)]


def test_rows_of_other_options_are_refused(diagnosed):
    folder, _ = diagnosed
    with pytest.raises(launch.UserError, match=r"num_examples was 3, now 2.*another --workdir"):
        diagnose.run(get_config(), str(folder), OPTIONS._replace(num_images=2))


@pytest.mark.parametrize("corruptions", [("fog",), ("snow",)])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.test", "test[1:30]", r"data\.test was 'test\[:30\]', now 'test\[1:30\]'"),
        ("adapt.corruption_seed", 7, r"adapt\.corruption_seed was 0, now 7"),
        ("views.padding", 0, r"views\.padding was 1, now 0"),
        ("methods.rotation.num_steps", 1, r"settings\.num_steps was 2, now 1"),
        ("methods.rotation.momentum", 0.9, r"settings\.momentum was None, now 0\.9"),
    ],
)
def test_rows_made_otherwise_are_refused(diagnosed, corruptions, key, value, message):
    """The cells that are there, and others: one record is about one thing."""
    folder, record = diagnosed
    before = (folder / "diagnostics.jsonl").read_text()
    config = get_config()
    with config.unlocked():
        section = config
        for name in key.split(".")[:-1]:
            section = section[name]
        section[key.split(".")[-1]] = value
    with pytest.raises(launch.UserError, match=rf"was made otherwise: {message}\. Use another"):
        diagnose.run(config, str(folder), OPTIONS._replace(corruptions=corruptions))
    assert (folder / "diagnostics.jsonl").read_text() == before
    assert json.loads((folder / "diagnostics.json").read_text()) == record


def test_rows_of_the_other_split_are_asked_for_what_both_share(diagnosed, tmp_path):
    """The record has both, with one config."""
    config = get_config()
    book = journal.Journal(tmp_path / "diagnostics.jsonl")
    fields = diagnosed[1]["rows"][0]
    other = {"split_role": "validation", "num_examples": 2, "learning_rates": [0.03]}
    other["config"] = diagnose_record.made_with(config, "validation")
    book.add(fields | other)
    diagnose_record.require_same(book, fields, config)
    config.data.validation = "train[1260:1277]"
    with pytest.raises(launch.UserError, match=r"otherwise: data\.validation was 'train\[1257:12"):
        diagnose_record.require_same(book, fields, config)


def test_rows_that_do_not_say_what_made_them_are_refused(diagnosed, tmp_path):
    book = journal.Journal(tmp_path / "diagnostics.jsonl")
    fields = diagnosed[1]["rows"][0]
    book.add({name: value for name, value in fields.items() if name != "config"})
    with pytest.raises(launch.UserError, match="rows that do not say what made them, of an older"):
        diagnose_record.require_same(book, fields, get_config())

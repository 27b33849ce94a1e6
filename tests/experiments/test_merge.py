"""Parts of a table are the table: ranges of images, methods, domains; what cannot be joined."""

import json
import pathlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import adapt, launch, merge, result_rows, train
from experiments.merging import ranges
from experiments.report import __main__ as report, read
from experiments.sweeping import collect
from experiments.sweeping.unit import Unit
from experiments.tasks import image_metrics
from tests.experiments import team_config, tiny_model
from tests.experiments.test_programs import assert_equal_rows, rows_of
from ttt_jax import metrics
from ttt_jax.task import Metric

DOMAINS = ("clean", "saturate", "fog")
RANGES = ("test[:7]", "test[7:22]", "test[22:30]")
PER_SAMPLE = ("source", "rotation")


@pytest.fixture(scope="module", autouse=True)
def dense():
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.install(patch)
        yield


def get_config(**changed):
    config = team_config.get_config()
    config.model = {"name": "dense"}
    config.methods.rotation.num_steps = 1
    config.methods.rotation.learning_rate = (0.01, 0.03)
    config.train.num_steps = 40
    # All ranges have full batches, so that their programs are those of the whole.
    config.adapt.update({"batch_size": 5, "chunk_size": 3})
    config.seeds = (0, 1)
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changed.items()})
    return config


@pytest.fixture(scope="module")
def models(dense, tmp_path_factory):
    """The checkpoints of two seeds."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.run(get_config(), str(folder))
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def table(models, tmp_path_factory):
    """``table(name, ...)``: a work folder of that name with rows of a part, made once."""
    root = tmp_path_factory.mktemp("parts")

    def made(name, *, methods=(), domains=DOMAINS, choice=None, seeds=(0,), **changed):
        if not (root / name).exists():
            shutil.copytree(models, root / name / "checkpoints")
            if choice is not None:
                shutil.copy(root / choice / "selection.json", root / name)
            config = get_config(seeds=seeds, **changed)
            assert (
                adapt.run(config, str(root / name), part=adapt.Part(methods, domains), devices=1)
                == 0
            )
        return str(root / name)

    return made


@pytest.fixture(scope="module")
def whole(table):
    return pathlib.Path(table("whole"))


@pytest.fixture(scope="module")
def parts(table):
    """Three ranges of what takes one image at a time, and the rest by domain."""
    cut = [
        table(f"range{n}", data__test=test, methods=PER_SAMPLE, choice="range0" if n else None)
        for n, test in enumerate(RANGES)
    ]
    both = {"methods": ("rotation_online", "tent")}
    return [
        *cut,
        table("some", domains=DOMAINS[:2], **both),
        table("fog", domains=("fog",), **both),
    ]


def test_parts_are_the_table(whole, parts, tmp_path, capsys):
    assert merge.run(str(tmp_path), parts) == 0
    found = rows_of(tmp_path)
    assert f"{len(found)} rows of 5 parts" in capsys.readouterr().out
    assert_equal_rows(found, rows_of(whole))

    def rotated(folder):
        rows = rows_of(pathlib.Path(folder))
        return next(r for r in rows if (r["method"], r["domain"]) == ("rotation", "clean"))

    (joined, *cut) = map(rotated, (tmp_path, *parts[:3]))
    assert joined["num_examples"] == 30
    assert joined["seconds"] == pytest.approx(sum(row["seconds"] for row in cut))
    assert joined["samples_per_second"] == pytest.approx(30 / joined["seconds"])
    assert joined["compile_seconds"] == max(row["compile_seconds"] for row in cut)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["data"]["test"] == "test[:30]"
    assert [part["test"] for part in record["parts"]] == [*RANGES, *["test[:30]"] * 2]
    selection = json.loads((tmp_path / "selection.json").read_text())
    assert set(selection["chosen"]) == {*PER_SAMPLE, "rotation_online", "tent"}
    assert report.run(tmp_path) == 0
    frame = read.results(tmp_path).frame
    assert len(frame) == len(found) and "sums" not in frame


def test_sums_are_no_column_of_a_sweep(whole, tmp_path):
    unit = Unit("trial", "one", "", None, "")
    unit.folder(tmp_path).parent.mkdir(parents=True)
    shutil.copytree(whole, unit.folder(tmp_path))
    found = collect.rows(tmp_path, [unit])
    assert len(found) == len(rows_of(whole))
    assert "sums" not in pq.read_schema(collect.write(tmp_path, found)).names


def test_a_merged_table_is_resumed_and_merged_again(whole, models, parts, tmp_path):
    folder = tmp_path / "whole"
    merge.run(str(folder), parts[:3])
    before = rows_of(folder)
    shutil.copytree(models, folder / "checkpoints")
    part = adapt.Part(domains=DOMAINS)
    assert adapt.run(get_config(seeds=(0,)), str(folder), part=part, devices=1) == 0
    assert_equal_rows(rows_of(folder), rows_of(whole))
    # These parts lack the rows that adapt added.
    with pytest.raises(launch.UserError, match=r"these parts lack.*choose another --workdir"):
        merge.run(str(folder), parts[:3])
    # What was made after the merge has an origin of its own beside those of the parts.
    again = tmp_path / "copied"
    merge.run(str(again), [str(folder)])
    origins = json.loads((again / "run.json").read_text())["parts"]
    assert [origin["folder"] for origin in origins] == [*parts[:3], str(folder)]
    assert origins[-1]["runs"][-1]["devices"] >= 1
    other = tmp_path / "again"
    for _ in range(2):
        merge.run(str(other), parts[:3])
        assert rows_of(other) == before


def test_a_merge_replaces_no_larger_table(parts, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    merge.run(str(half), parts[:2])
    with pytest.raises(launch.UserError, match=r"is one of --parts, which a merge reads only"):
        merge.run(str(half), [str(half), parts[2]])
    # Of a part that was merged, the origins of its own parts are kept.
    merge.run(str(whole), [str(half), parts[2]])
    origins = json.loads((whole / "run.json").read_text())["parts"]
    assert [origin["folder"] for origin in origins] == parts[:3]
    for origin, part in zip(origins, parts, strict=False):
        own = json.loads((pathlib.Path(part) / "run.json").read_text())
        assert origin["commit"] == own["commit"] and origin["runs"] == own["runs"]
    before = (whole / "results.jsonl").read_text()
    with pytest.raises(launch.UserError, match=r"is a table of test\[:30\].*Name all parts"):
        merge.run(str(whole), parts[:2])
    assert (whole / "results.jsonl").read_text() == before
    merge.run(str(whole), parts[:3])
    # Three parts at once add in another order.
    at_once = rows_of(whole)
    (whole / "results.jsonl").write_text(before)
    assert_equal_rows(at_once, rows_of(whole))


def refusal(folder, parts):
    with pytest.raises(launch.UserError) as error:
        merge.run(str(folder), parts)
    assert not list(folder.glob("*.jsonl"))
    return str(error.value)


def edited(part, folder, name, change):
    """A copy of a part with one of its files changed."""
    shutil.copytree(part, folder)
    text = (folder / name).read_text()
    assert change(text) != text
    (folder / name).write_text(change(text))
    return str(folder)


def with_rows(part, folder, change):
    """A copy of a part whose rows ``change(row)`` changed in place."""

    def all_of(text):
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            change(row)
        return "".join(json.dumps(row) + "\n" for row in rows)

    return edited(part, folder, "results.jsonl", all_of)


def test_seeds_are_parts_with_the_choice_of_the_first(table, tmp_path):
    few = {"methods": PER_SAMPLE, "domains": ("clean",)}
    alone = pathlib.Path(table("alone", seeds=(0, 1), **few))
    first = table("first", **few)
    second = table("second", seeds=(1,), choice="first", **few)
    whole = tmp_path / "whole"
    merge.run(str(whole), [first, second])
    assert_equal_rows(rows_of(whole), rows_of(alone))
    assert json.loads((whole / "run.json").read_text())["config"]["seeds"] == [0, 1]
    selections = [json.loads((at / "selection.json").read_text()) for at in (whole, alone)]
    assert selections[0] == selections[1] and len(selections[0]["tried"]) == 2

    def rate(text):
        return text.replace('"learning_rate": 0.0', '"learning_rate": 0.5')

    other = edited(second, tmp_path / "other", "selection.json", rate)
    assert "put the selection.json of the first part" in refusal(tmp_path / "no", [first, other])


def test_two_models_are_no_seed(parts, tmp_path):
    other = with_rows(parts[4], tmp_path / "other", lambda row: row.update(checkpoint="0"))
    message = refusal(tmp_path / "no", [parts[3], other])
    assert "a seed is one model" in message and "checkpoint of seed 0 is '" in message


def test_what_is_missing_or_double(whole, parts, tmp_path):
    one, two, three, some, fog = parts
    message = refusal(tmp_path, [one, three])
    assert "domain clean, severity 0, seed 0, split_role reported cannot be joined" in message
    listed = f"test[:7] in {one}, test[22:30] in {three}, which must adjoin"
    assert listed in message and "run what is missing" in message
    message = refusal(tmp_path, [one, two, some])
    assert "without overlap and be test[:30] together" in message
    message = refusal(tmp_path, [one, two, three, str(whole)])
    assert f"test[:30] in {whole}, which must adjoin without overlap" in message
    copy = str(shutil.copytree(some, tmp_path / "copy"))
    message = refusal(tmp_path, [some, fog, copy])
    assert f"test[:30] in {some}, test[:30] in {copy}, which" in message
    assert "leave out what is double" in message
    assert "each once; got" in refusal(tmp_path, [one, one])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scope": "batch"}, "(a batch or a stream), so one part must have them all."),
        ({"scope": "stream"}, "(a batch or a stream), so one part must have them all."),
        ({"sequence": "gradual"}, "how severe its corruption is"),
        ({"num_steps": 3}, "num_steps is 3 and 1"),
        ({"program_steps": 4}, "program_steps is 4 and None"),
        ({"error_few": 0.5}, "error_few is 0.5 and None"),
    ],
)
def test_rows_that_are_not_cut(parts, tmp_path, change, message):
    def reported(row):
        if row["method"] == "rotation" and row["split_role"] == "reported":
            row.update(change)

    other = with_rows(parts[0], tmp_path / "other", reported)
    assert message in refusal(tmp_path / "no", [other, *parts[1:3]])


def test_ranges_without_sums_are_made_again(parts, tmp_path):
    """Rows of older releases say no sums: whole ones are taken, ranges are not joined."""
    old = [
        with_rows(part, tmp_path / f"{n}", lambda row: row.pop("sums"))
        for n, part in enumerate(parts)
    ]
    assert merge.run(str(tmp_path / "whole"), old[3:]) == 0
    message = refusal(tmp_path / "no", old[:3])
    assert "sums of their rows, which older releases did not write; make all parts" in message


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("run.json", '"batch_size": 5', '"batch_size": 10', "adapt.batch_size is 5 in"),
        ("selection.json", '"learning_rate": 0.0', '"learning_rate": 0.5', "chosen once"),
        ("results.jsonl", '"status": "ok"', '"status": "failed"', "6 failed of 6 rows"),
        (
            "results.jsonl",
            '"split_role": "validation"',
            '"split_role": "validation", "x": 1',
            "of the same images x is None in",
        ),
        ("run.json", "test[7:22]", "test[-8:]", "counted from the beginning"),
        ("run.json", "test[7:22]", "test[7%:22%]", "all in percent or all in images"),
        ("run.json", '"config"', '"configs"', "is damaged"),
        ("run.json", '"data": {', '"date": {', "is damaged"),
        ("selection.json", '"chosen"', '"choice"', "is damaged"),
    ],
)
def test_parts_that_are_not_of_one_table(parts, tmp_path, name, old, new, message):
    other = edited(parts[1], tmp_path / "other", name, lambda text: text.replace(old, new))
    # The first part knows neither of the methods that the others have.
    assert message in refusal(tmp_path / "whole", [parts[3], parts[0], other, parts[2]])


def test_a_folder_that_is_no_part(tmp_path):
    assert "has no results.jsonl" in refusal(tmp_path, [str(tmp_path / "none")])


def test_validation_rows_of_two_machines_differ_by_rounding(parts, tmp_path):
    def moved(by):
        def change(row):
            if row["split_role"] == "validation":
                row["cross_entropy"] *= by
                row["sums"]["cross_entropy"][0] *= by

        return change

    near = with_rows(parts[1], tmp_path / "near", moved(1 + 1e-6))
    assert merge.run(str(tmp_path / "whole"), [parts[0], near, parts[2]]) == 0
    far = with_rows(parts[1], tmp_path / "far", moved(1.01))
    message = refusal(tmp_path / "no", [parts[0], far, parts[2]])
    assert "of the same images cross_entropy is" in message and "same checkpoint" in message


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        (("test",), ("test", True)),
        (("test[:]",), ("test", True)),
        (("test[5:]",), ("test[5:]", True)),
        (("test[:100%]",), ("test", True)),
        (("test[50%:100%]", "test[0%:50%]"), ("test", True)),
        (("test[20:30]", "test[:20]"), ("test[:30]", True)),
        (("test[20:30]", "test[:10]"), ("test[:30]", False)),
        (("test[10:30]", "test[:20]"), ("test[:30]", False)),
        (("test", "test[5:]"), ("test", False)),
    ],
)
def test_ranges(texts, whole):
    assert ranges.joined(texts) == whole


def test_ranges_of_two_splits():
    with pytest.raises(launch.UserError, match="of one split"):
        ranges.joined(["test[:5]", "train[5:]"])


def summed(sums, places):
    """Sums over some instances, as a row has them after a round trip through JSON."""
    sums = [np.asarray(leaf)[places].sum(0).tolist() for leaf in sums]
    return json.loads(json.dumps(sums if len(sums) > 1 else sums[0]))


def test_sums_are_added_and_say_every_metric():
    """Of shapes that metrics have: shares, means, curves, counts of classes, tuples of shapes."""
    rng = np.random.default_rng(0)
    known = image_metrics.metrics(4, {"few": np.arange(2)})
    mixed = Metric(None, lambda sums: float(sums[0] / sums[1].sum()))
    known |= {"mean_iou": metrics.mean_iou(4), "mixed": mixed}
    ones = np.ones(10, int)
    each = {
        "error": (rng.integers(0, 2, 10), ones),
        "error_few": (rng.integers(0, 2, 10), rng.integers(1, 2, 10)),
        "cross_entropy": (rng.random(10), ones),
        "error_by_step": (rng.integers(0, 2, (10, 3)), np.ones((10, 3), int)),
        "predicted_classes_after": (np.eye(4, dtype=int)[rng.integers(0, 4, 10)],),
        "mean_iou": (rng.integers(0, 3, (10, 4)), rng.integers(3, 5, (10, 4))),
        "mixed": (rng.random(10), rng.integers(1, 3, (10, 2))),
    }
    row = {"scope": "per_sample", "seconds": 1.0, "compile_seconds": 2.0}
    row |= dict.fromkeys(("non_finite", "updated", "resets"), 1)
    rows = []
    for places in (slice(3), slice(3, 10)):
        sums = {name: summed(leaves, places) for name, leaves in each.items()}
        rows.append(row | dict.fromkeys(sums, 0.0) | {"sums": sums})
        rows[-1]["num_examples"] = len(ones[places])
    whole = result_rows.joined(rows, known)
    for name, leaves in each.items():
        sums = tuple(leaf.sum(0) for leaf in leaves)
        value = known[name].value(sums if len(sums) > 1 else sums[0])
        assert whole[name] == pytest.approx(value, rel=1e-12), name
    with pytest.raises(ValueError, match="no metric mixed in this release; merge with"):
        result_rows.joined(rows, {name: known[name] for name in each if name != "mixed"})
    assert whole["error"] == each["error"][0].sum() / 10
    assert whole["sums"]["error"] == [each["error"][0].sum(), 10]
    assert (whole["num_examples"], whole["updated"], whole["seconds"]) == (10, 2, 2.0)
    assert whole["compile_seconds"] == 2.0 and whole["samples_per_second"] == 5.0

"""Parts of a table are the table: ranges of images, methods, domains; what cannot be joined."""

import json
import pathlib
import shutil

import pytest

from experiments import adapt, launch, merge, report, train
from experiments.merging import ranges, rows as rows_lib
from tests.experiments import team_config, tiny_config
from tests.experiments.test_programs import assert_equal_rows, rows_of

DOMAINS = ("clean", "saturate", "fog")
RANGES = ("test[:7]", "test[7:22]", "test[22:30]")
PER_SAMPLE = ("source", "rotation")


def without_classes(rows):
    """Rows without the numbers of predicted classes, which rows of ranges cannot be joined to."""
    return [{k: v for k, v in row.items() if "predicted_classes" not in k} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train.run(team_config.get_config(), str(folder))
    return folder / "checkpoints" / "seed_0"


@pytest.fixture(scope="module")
def table(trained, tmp_path_factory):
    """``table(name, ...)``: a work folder of that name with rows of a part, made once."""
    root = tmp_path_factory.mktemp("parts")

    def made(name, *, test="test[:30]", methods=(), domains=DOMAINS):
        if not (root / name).exists():
            config = team_config.get_config()
            config.data.test = test
            part = adapt.Part(methods, domains)
            assert adapt.run(config, str(root / name), part=part, checkpoint_path=str(trained)) == 0
        return str(root / name)

    return made


@pytest.fixture(scope="module")
def parts(table):
    """Three ranges of what takes one image at a time, and the rest by domain."""
    cut = [table(f"range{n}", test=test, methods=PER_SAMPLE) for n, test in enumerate(RANGES)]
    whole = [table(f"all_{d}", methods=("rotation_online", "tent"), domains=(d,)) for d in DOMAINS]
    return cut + whole


def test_parts_are_the_table(table, parts, tmp_path, capsys):
    assert merge.run(str(tmp_path), parts) == 0
    alone = rows_of(pathlib.Path(table("whole")))
    found = rows_of(tmp_path)
    assert f"{len(found)} rows of 6 parts" in capsys.readouterr().out
    assert_equal_rows(*map(without_classes, (found, alone)))
    joined = next(r for r in found if r["method"] == "rotation" and r["domain"] == "clean")
    assert joined["num_examples"] == 30
    assert joined["seconds"] == pytest.approx(
        sum(
            row["seconds"]
            for part in parts[:3]
            for row in rows_of(pathlib.Path(part))
            if (row["method"], row["domain"]) == ("rotation", "clean")
        )
    )
    assert joined["compile_seconds"] == max(
        row["compile_seconds"]
        for part in parts[:3]
        for row in rows_of(pathlib.Path(part))
        if (row["method"], row["domain"]) == ("rotation", "clean")
    )
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["data"]["test"] == "test[:30]"
    assert [part["test"] for part in record["parts"]] == [*RANGES, *["test[:30]"] * 3]
    selection = json.loads((tmp_path / "selection.json").read_text())
    assert set(selection["chosen"]) == {*PER_SAMPLE, "rotation_online", "tent"}
    assert report.run(tmp_path) == 0


def test_a_merged_table_is_resumed_and_merged_again(table, trained, parts, tmp_path):
    folder = tmp_path / "whole"
    merge.run(str(folder), parts[:3])
    before = rows_of(folder)
    config = team_config.get_config()
    part = adapt.Part(domains=DOMAINS)
    assert adapt.run(config, str(folder), part=part, checkpoint_path=str(trained)) == 0
    whole = rows_of(pathlib.Path(table("whole")))
    assert_equal_rows(*map(without_classes, (rows_of(folder), whole)))
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
    assert (whole / "results.jsonl").read_text() == before


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """A folder with the models of two seeds."""
    config = team_config.get_config()
    config.seeds = (0, 1)
    folder = tmp_path_factory.mktemp("seeds") / "trained"
    train.run(config, str(folder))
    return folder / "checkpoints"


def run_seeds(folder, models, seeds, selection=None, domains=("clean",), sequence="none"):
    """Rows of the candidates' method; with the choice of another folder, if one is given."""
    folder.mkdir()
    shutil.copytree(models, folder / "checkpoints")
    if selection is not None:
        shutil.copy(selection / "selection.json", folder)
    config = tiny_config.get_config()
    config.seeds, config.adapt.sequence = seeds, sequence
    part = adapt.Part(PER_SAMPLE, domains)
    assert adapt.run(config, str(folder), part=part) == 0
    return str(folder)


def test_seeds_are_parts_with_the_choice_of_the_first(two_seeds, tmp_path):
    alone = run_seeds(tmp_path / "alone", two_seeds, (0, 1))
    first = run_seeds(tmp_path / "first", two_seeds, (0,))
    second = run_seeds(tmp_path / "second", two_seeds, (1,), selection=tmp_path / "first")
    merge.run(str(tmp_path / "whole"), [first, second])
    assert_equal_rows(rows_of(tmp_path / "whole"), rows_of(pathlib.Path(alone)))
    whole = tmp_path / "whole"
    assert json.loads((whole / "run.json").read_text())["config"]["seeds"] == [0, 1]
    selections = [
        json.loads((pathlib.Path(at) / "selection.json").read_text()) for at in (whole, alone)
    ]
    assert selections[0] == selections[1] and len(selections[0]["tried"]) == 2
    other = run_seeds(tmp_path / "other", two_seeds, (1,))
    text = (tmp_path / "other" / "selection.json").read_text()
    (tmp_path / "other" / "selection.json").write_text(
        text.replace('"learning_rate": 0.01', '"learning_rate": 0.5').replace(
            '"learning_rate": 0.03', '"learning_rate": 0.5'
        )
    )
    assert "put the selection.json of the first part" in refusal(tmp_path / "no", [first, other])


def test_two_models_are_no_seed(two_seeds, tmp_path):
    parts = []
    for number, domain in enumerate(DOMAINS[::2]):
        folder = tmp_path / domain
        config = team_config.get_config()
        part = adapt.Part(("source",), (domain,))
        assert (
            adapt.run(
                config, str(folder), part=part, checkpoint_path=str(two_seeds / f"seed_{number}")
            )
            == 0
        )
        parts.append(str(folder))
    assert "a seed is one model, but rows of seed 0" in refusal(tmp_path / "no", parts)


def test_a_gradual_sequence_is_not_cut(trained, tmp_path):
    parts = []
    for number, test in enumerate(("test[:15]", "test[15:30]")):
        config = team_config.get_config()
        config.adapt.sequence = "gradual"
        config.data.test = test
        part = adapt.Part(("source",), ("gradual",))
        folder = tmp_path / f"{number}"
        assert adapt.run(config, str(folder), part=part, checkpoint_path=str(trained)) == 0
        parts.append(str(folder))
    assert "how severe its corruption is" in refusal(tmp_path / "no", parts)


def refusal(folder, parts):
    with pytest.raises(launch.UserError) as error:
        merge.run(str(folder), parts)
    assert not list(folder.glob("*.jsonl"))
    return str(error.value)


def test_what_is_missing_or_double(table, parts, tmp_path):
    one, two, three, clean, _, fog = parts
    whole = table("whole")
    assert "on clean (severity 0, seed 0, reported) cannot be joined" in (
        message := refusal(tmp_path, [one, three])
    )
    assert "ranges test[:7] and test[22:30] leave images out" in message
    message = refusal(tmp_path, [one, two, clean])
    assert (
        "it is there for test[:22], and the parts are of test[:30]; run what is missing" in message
    )
    assert "test[:30] overlap" in refusal(tmp_path, [one, two, three, whole])
    assert f"{clean} and {tmp_path / 'copy'} both have it" in refusal(
        tmp_path, [clean, fog, str(shutil.copytree(clean, tmp_path / "copy"))]
    )
    assert "each once; got" in refusal(tmp_path, [one, one])


def test_what_adapts_together_is_not_cut(table, tmp_path):
    parts = [
        table(f"tent{n}", test=test, methods=("tent",), domains=("clean",))
        for n, test in enumerate(("test[:20]", "test[20:30]"))
    ]
    assert "(a batch or a stream), so one part must have them all." in refusal(tmp_path, parts)


def edited(part, folder, name, change):
    """A copy of a part with one of its files changed."""
    shutil.copytree(part, folder)
    text = (folder / name).read_text()
    assert change(text) != text
    (folder / name).write_text(change(text))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("run.json", '"batch_size": 20', '"batch_size": 10', "adapt.batch_size is 20 in"),
        (
            "selection.json",
            '"learning_rate": 0.01',
            '"learning_rate": 0.5',
            "chosen once for a table",
        ),
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


def test_ranges():
    assert [
        str(ranges.range_of(text)) for text in ("test", "test[:]", "test[5:]", "test[:100%]")
    ] == [
        "test",
        "test",
        "test[5:]",
        "test",
    ]
    halves = [ranges.range_of(text) for text in ("test[50%:100%]", "test[0%:50%]")]
    assert str(ranges.union(halves)) == "test"
    with pytest.raises(launch.UserError, match="of one split"):
        ranges.union([ranges.range_of("test[:5]"), ranges.range_of("train[5:]")])


def test_shares_are_numbers_of_images():
    """As a mean of rounded shares would not be: 1/3 of 3 and 2/7 of 7 are 3/10 exactly."""
    row = {"scope": "per_sample", "turned_right": 0.0, "turned_wrong": 0.0, "seconds": 1.0}
    rows = [
        row | {"error": 1 / 3, "num_examples": 3, "aux_loss_after": 1.0, "error_by_step": [1 / 3]},
        row | {"error": 2 / 7, "num_examples": 7, "aux_loss_after": 2.0, "error_by_step": [4 / 7]},
    ]
    whole = rows_lib.joined(rows)
    assert whole["error"] == 3 / 10 and whole["error_by_step"] == [5 / 10]
    assert whole["aux_loss_after"] == pytest.approx(1.7)
    assert whole["seconds"] == 2.0 and whole["samples_per_second"] == 5.0


@pytest.mark.parametrize(
    ("more", "message"),
    [({"num_steps": 3}, "num_steps is 2 and 3"), ({"error_few": 0.5}, "cut by --domains instead")],
)
def test_rows_that_are_not_of_one_method(more, message):
    row = {"scope": "per_sample", "num_steps": 2, "num_examples": 3, "seconds": 1.0}
    with pytest.raises(ValueError, match=message):
        rows_lib.joined([row, row | more])


def test_validation_rows_of_two_machines_differ_by_rounding(parts, tmp_path):
    def moved(by):
        def change(text):
            rows = [json.loads(line) for line in text.splitlines()]
            for row in rows:
                if row["split_role"] == "validation" and "aux_loss_after" in row:
                    row["aux_loss_after"] *= by
            return "".join(json.dumps(row) + "\n" for row in rows)

        return change

    near = edited(parts[1], tmp_path / "near", "results.jsonl", moved(1 + 1e-6))
    assert merge.run(str(tmp_path / "whole"), [parts[0], near, parts[2]]) == 0
    far = edited(parts[1], tmp_path / "far", "results.jsonl", moved(1.01))
    message = refusal(tmp_path / "no", [parts[0], far, parts[2]])
    assert "of the same images aux_loss_after is" in message and "same checkpoint" in message


def test_a_field_of_one_range_alone():
    row = {"scope": "per_sample", "num_examples": 3, "seconds": 1.0}
    for rows in ([row | {"program_steps": 4}, row], [row, row | {"program_steps": 4}]):
        with pytest.raises(ValueError, match="program_steps is"):
            rows_lib.joined(rows)

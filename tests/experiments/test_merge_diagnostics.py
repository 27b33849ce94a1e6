"""Parts of a diagnosis are the whole: corruptions, severities, seeds; what cannot be joined."""

import json
import shutil
import statistics

import pytest

from experiments import diagnose, launch, merge, train
from tests.experiments import tiny_model
from tests.experiments.diagnosed import OPTIONS, get_config, make, train_in

TIMES = ("seconds", "compile_seconds")


@pytest.fixture(scope="module", autouse=True)
def dense():
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.install(patch)
        yield


@pytest.fixture(scope="module")
def trained(dense, tmp_path_factory):
    return train_in(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    return make(trained, tmp_path_factory.mktemp("whole") / "run")


def diagnosed(folder, checkpoint, *, config=None, **options):
    """The work folder of a part."""
    config = get_config() if config is None else config
    options = OPTIONS._replace(**options)
    diagnose.run(config, str(folder), options, checkpoint_path=str(checkpoint))
    return str(folder)


@pytest.fixture(scope="module")
def parts(trained, tmp_path_factory):
    """One corruption, and the other one by severity."""
    root, model = tmp_path_factory.mktemp("parts"), trained / "checkpoints" / "seed_0"
    return [
        diagnosed(root / "contrast", model, corruptions=("contrast",)),
        diagnosed(root / "fog1", model, corruptions=("fog",), severities=(1,)),
        diagnosed(root / "fog5", model, corruptions=("fog",), severities=(5,)),
    ]


def untimed(rows):
    """The rows by cell, without times."""
    return {
        (row["domain"], row["severity"], row["seed"]): {
            name: value for name, value in row.items() if name not in TIMES
        }
        for row in rows
    }


def read(folder):
    return json.loads((folder / "diagnostics.json").read_text())


def join(folder, parts):
    assert merge.run(str(folder), [str(part) for part in parts], "diagnose") == 0
    return read(folder)


def refusal(folder, parts):
    with pytest.raises(launch.UserError) as error:
        merge.run(str(folder), [str(part) for part in parts], "diagnose")
    assert not list(folder.glob("diagnostics*"))
    return str(error.value)


def test_parts_are_the_whole_to_the_last_bit(whole, parts, tmp_path, capsys):
    record = join(tmp_path, parts)
    assert untimed(record["rows"]) == untimed(whole[1]["rows"]) and len(record["rows"]) == 4
    assert record["correlation"] == whole[1]["correlation"]
    lines = (tmp_path / "diagnostics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == record["rows"]
    page = (tmp_path / "diagnostics.html").read_text()
    assert "fog" in page and "contrast" in page
    assert [part["folder"] for part in record["parts"]] == parts
    assert [part["rows"] for part in record["parts"]] == [2, 1, 1]
    assert all("commit" in part and "device" in part for part in record["parts"])
    assert record["config"]["seeds"] == [0] and "experiments.merge" in record["command"]
    assert f"4 rows of rotation in {tmp_path / 'diagnostics.jsonl'}" in capsys.readouterr().out


def test_seeds_are_parts(trained, parts, tmp_path):
    config = get_config()
    config.seeds = (1,)
    train.run(config, str(tmp_path / "other"))
    model = tmp_path / "other" / "checkpoints" / "seed_1"
    second = diagnosed(tmp_path / "second", model, config=config, corruptions=("contrast",))
    record = join(tmp_path / "whole", [parts[0], second])
    assert record["config"]["seeds"] == [0, 1] and len(record["rows"]) == 4
    for number in (0, 1):
        shutil.copytree(
            (trained, tmp_path / "other")[number] / "checkpoints" / f"seed_{number}",
            tmp_path / "alone" / "checkpoints" / f"seed_{number}",
        )
    config.seeds = (0, 1)
    alone = diagnose.run(
        config, str(tmp_path / "alone"), OPTIONS._replace(corruptions=("contrast",))
    )
    assert untimed(record["rows"]) == untimed(alone["rows"])
    assert record["config"] == json.loads(json.dumps(alone["config"]))


def test_a_joined_record_is_joined_again_and_not_replaced(parts, tmp_path):
    half, folder = tmp_path / "half", tmp_path / "whole"
    join(half, parts[:2])
    record = join(folder, [half, parts[2]])
    # Of a part that was joined, the origins of its own parts are kept.
    assert [part["folder"] for part in record["parts"]] == parts
    assert untimed(join(folder, parts)["rows"]) == untimed(record["rows"])
    before = (folder / "diagnostics.json").read_text()
    with pytest.raises(launch.UserError, match=r"has 1 rows that these parts lack\. Name all"):
        merge.run(str(folder), parts[:2], "diagnose")
    with pytest.raises(launch.UserError, match="has the rows of several work folders; make others"):
        diagnose.run(get_config(), str(folder), OPTIONS)
    assert (folder / "diagnostics.json").read_text() == before
    # One that was cut off before its rows were there is made again.
    (folder / "diagnostics.jsonl").unlink()
    join(folder, parts)
    assert len((folder / "diagnostics.jsonl").read_text().splitlines()) == 4


def test_rows_that_were_measured_are_not_replaced(whole, parts, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    for name in ("diagnostics.json", "diagnostics.jsonl"):
        with pytest.raises(launch.UserError, match=r"experiments\.merge did not make"):
            merge.run(str(folder), parts, "diagnose")
        (folder / name).unlink()
    join(folder, parts)


def test_parts_that_overlap(whole, parts, tmp_path):
    message = refusal(tmp_path, [whole[0], parts[1]])
    assert "that of rotation on fog (severity 1, seed 0, reported) is in" in message
    assert f"is in {whole[0]} and in {parts[1]}; leave one of the two out." in message
    assert "each once; got" in refusal(tmp_path, [parts[0], parts[0]])


def test_ranges_of_images_make_no_row(trained, parts, tmp_path):
    config = get_config()
    config.data.test = "test[30:60]"
    model = trained / "checkpoints" / "seed_0"
    other = diagnosed(tmp_path / "other", model, config=config, corruptions=("contrast",))
    message = refusal(tmp_path / "no", [parts[0], other])
    assert "rows of two ranges of images cannot be joined; data.test is 'test[:30]' in" in message
    assert f"{parts[0]} and 'test[30:60]' in {other}" in message
    # Also where they are of other cells.
    assert "data.test is 'test[:30]' in" in refusal(tmp_path / "no", [parts[1], other])


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"adapt.corruption_seed": 7}, {}, "adapt.corruption_seed is 0 in"),
        ({"methods.rotation.num_steps": 1}, {}, "settings.num_steps is 2 in"),
        ({"adapt.batch_size": 10}, {"num_images": 2}, "joined; num_examples is 3 in"),
    ],
)
def test_parts_made_otherwise(trained, parts, tmp_path, changed, options, message):
    config = get_config()
    config.update_from_flattened_dict(changed)
    model = trained / "checkpoints" / "seed_0"
    few = {"corruptions": ("fog",), "severities": (5,)} | options
    other = diagnosed(tmp_path / "other", model, config=config, **few)
    assert message in refusal(tmp_path / "no", [*parts[:2], other])


def edited(part, folder, change):
    """A copy of a part whose rows are changed, in its record too."""
    shutil.copytree(part, folder)
    record = read(folder)
    record["rows"] = [change(row) for row in record["rows"]]
    (folder / "diagnostics.json").write_text(json.dumps(record))
    lines = [json.dumps(row) + "\n" for row in record["rows"]]
    (folder / "diagnostics.jsonl").write_text("".join(lines))
    return folder


def test_the_correlation_is_over_the_cells_of_all_parts(parts, tmp_path):
    """Of three images all gains are the same, so these are made up."""
    gains = [0.1, 0.3, -0.2, 0.5]
    left = iter(gains)
    some = [
        edited(part, tmp_path / str(number), lambda row: row | {"gain": next(left)})
        for number, part in enumerate(parts)
    ]
    record = join(tmp_path / "whole", some)
    inner = [row["inner_product"] for row in record["rows"]]
    r = pytest.approx(statistics.correlation(inner, gains), rel=1e-9)
    assert record["correlation"] == {"inner_product_and_gain": r, "sets": 4}
    page = (tmp_path / "whole" / "diagnostics.html").read_text()
    assert f"r = {record['correlation']['inner_product_and_gain']:.2f} over 4 sets" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"checkpoint": "other"}, "checkpoint is '"),
        (lambda row: row | {"checkpoint": "other", "split_role": "validation"}, "checkpoint is '"),
        (lambda row: row | {"method": "memo"}, "method is 'rotation' in"),
        (lambda row: row | {"learning_rates": [0.03]}, "learning_rates is [0.01, 0.03, 0.3] in"),
        (lambda row: {k: v for k, v in row.items() if k != "config"}, "do not say what made them"),
    ],
)
def test_rows_of_another_model_method_or_map(parts, tmp_path, change, message):
    other = edited(parts[2], tmp_path / "other", change)
    assert message in refusal(tmp_path / "no", [*parts[:2], other])


def test_the_other_split_may_have_other_images(trained, parts, tmp_path):
    model = trained / "checkpoints" / "seed_0"
    few = {"corruptions": ("spatter",), "severities": (5,), "num_images": 2}
    other = diagnosed(tmp_path / "other", model, split="validation", **few)
    record = join(tmp_path / "whole", [parts[2], other])
    assert [row["split_role"] for row in record["rows"]] == ["reported", "validation"]
    assert record["correlation"]["sets"] == 1


def test_a_part_that_is_not_finished(parts, tmp_path):
    assert "has no diagnostics.jsonl" in refusal(tmp_path / "no", [tmp_path / "none"])
    folder = shutil.copytree(parts[0], tmp_path / "cut")
    book, path = folder / "diagnostics.jsonl", folder / "diagnostics.json"
    row = json.loads(book.read_text().splitlines()[0])
    with book.open("a") as file:
        file.write(json.dumps(row | {"domain": "snow"}) + "\n")
    message = refusal(tmp_path / "no", [folder, parts[1]])
    assert f"{path} lacks rows of rotation that {book} has" in message and "to its end" in message
    for text in ('{"config": {}, "rows": []}', '{"config": {}}', "{"):
        path.write_text(text)
        assert f"{path} is damaged" in refusal(tmp_path / "no", [folder, parts[1]])
    path.unlink()
    assert f"{folder} has no diagnostics.json." in refusal(tmp_path / "no", [folder, parts[1]])


def test_the_programs_are_told_apart(parts, tmp_path):
    with pytest.raises(launch.UserError, match=r"has no results\.jsonl.*say --program=diagnose"):
        merge.run(str(tmp_path / "no"), parts)

"""Parts of a diagnosis are the whole: corruptions, severities, seeds; what cannot be joined."""

import json
import pathlib
import shutil
import statistics

import pytest

from experiments import diagnose, launch, merge, train
from tests.experiments import tiny_model
from tests.experiments.diagnosed import OPTIONS, get_config

TIMES = ("seconds", "compile_seconds")


@pytest.fixture(scope="module", autouse=True)
def dense():
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.install(patch)
        yield


@pytest.fixture(scope="module")
def diagnosed(dense, tmp_path_factory):
    """``diagnosed(name, ...)``: a work folder in which diagnose ran, with models of two seeds."""
    root, config = tmp_path_factory.mktemp("run"), get_config()
    config.seeds = (0, 1)
    train.run(config, str(root / "models"))

    def made(name, seeds, **options):
        shutil.copytree(root / "models" / "checkpoints", root / name / "checkpoints")
        config.seeds = seeds
        diagnose.run(config, str(root / name), OPTIONS._replace(**options))
        return str(root / name)

    return made


@pytest.fixture(scope="module")
def whole(diagnosed):
    """One run over two corruptions in two severities, with the models of both seeds."""
    return diagnosed("whole", (0, 1))


@pytest.fixture(scope="module")
def parts(diagnosed, whole, tmp_path_factory):
    """Of the first seed one corruption, and the other one by severity."""
    root = tmp_path_factory.mktemp("cut")

    def cut(name, **fields):
        return edited(
            whole, root / name, lambda row: row if fields.items() <= row.items() else None
        )

    return [
        cut("contrast", seed=0, domain="contrast"),
        diagnosed("fog1", (0,), corruptions=("fog",), severities=(1,)),
        cut("fog5", seed=0, domain="fog", severity=5),
    ]


@pytest.fixture(scope="module")
def second(diagnosed):
    return diagnosed("second", (1,))


def edited(part, folder, change):
    """A copy of a part whose rows are changed, in its record too; None leaves a row out."""
    shutil.copytree(part, folder)
    record = read(folder)
    record["rows"] = [new for row in record["rows"] if (new := change(row)) is not None]
    (folder / "diagnostics.json").write_text(json.dumps(record))
    lines = [json.dumps(row) + "\n" for row in record["rows"]]
    (folder / "diagnostics.jsonl").write_text("".join(lines))
    return str(folder)


def untimed(rows):
    """The rows by cell, without times."""
    return {
        (row["domain"], row["severity"], row["seed"]): {
            name: value for name, value in row.items() if name not in TIMES
        }
        for row in rows
    }


def read(folder):
    return json.loads((pathlib.Path(folder) / "diagnostics.json").read_text())


def join(folder, parts):
    assert merge.run(str(folder), [str(part) for part in parts], "diagnose") == 0
    return read(folder)


def refusal(folder, parts):
    with pytest.raises(launch.UserError) as error:
        merge.run(str(folder), [str(part) for part in parts], "diagnose")
    assert not list(folder.glob("diagnostics*"))
    return str(error.value)


def test_parts_are_the_whole_to_the_last_bit(whole, parts, second, tmp_path, capsys):
    """By corruption, by severity and by seed."""
    record, alone = join(tmp_path, [*parts, second]), read(whole)
    assert untimed(record["rows"]) == untimed(alone["rows"]) and len(record["rows"]) == 8
    assert record["correlation"] == alone["correlation"]
    assert record["config"] == alone["config"] and record["config"]["seeds"] == [0, 1]
    lines = (tmp_path / "diagnostics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == record["rows"]
    page = (tmp_path / "diagnostics.html").read_text()
    assert "fog" in page and "contrast" in page
    assert [part["folder"] for part in record["parts"]] == [*parts, second]
    assert [part["rows"] for part in record["parts"]] == [2, 1, 1, 4]
    assert all("commit" in part and "device" in part for part in record["parts"])
    assert "experiments.merge" in record["command"]
    assert f"8 rows of rotation in {tmp_path / 'diagnostics.jsonl'}" in capsys.readouterr().out


def test_a_joined_record_is_joined_again_and_not_replaced(parts, tmp_path):
    half, folder = tmp_path / "half", tmp_path / "whole"
    join(half, parts[:2])
    record = join(folder, [half, parts[2]])
    # Of a part that was joined, the origins of its own parts are kept.
    assert [part["folder"] for part in record["parts"]] == parts
    assert untimed(join(folder, parts)["rows"]) == untimed(record["rows"])
    before = (folder / "diagnostics.json").read_text()
    with pytest.raises(launch.UserError, match=r"1 of which these parts lack; .* Name all parts"):
        merge.run(str(folder), parts[:2], "diagnose")
    with pytest.raises(launch.UserError, match="has the rows of several work folders; make others"):
        diagnose.run(get_config(), str(folder), OPTIONS)
    assert (folder / "diagnostics.json").read_text() == before
    # One that was cut off before its rows were there is made again.
    (folder / "diagnostics.jsonl").unlink()
    join(folder, parts)
    assert len((folder / "diagnostics.jsonl").read_text().splitlines()) == 4


def test_rows_that_were_measured_are_not_replaced(parts, tmp_path):
    folder = shutil.copytree(parts[0], tmp_path / "run")
    for name in ("diagnostics.json", "diagnostics.jsonl"):
        with pytest.raises(launch.UserError, match=r"experiments\.merge did not make"):
            merge.run(str(folder), parts, "diagnose")
        (folder / name).unlink()
    join(folder, parts)


def test_parts_that_overlap(whole, parts, tmp_path):
    message = refusal(tmp_path, [whole, parts[1]])
    assert "a row is of one part, but method rotation, domain fog, severity 1, seed 0" in message
    assert f"is in {whole} and in {parts[1]}; leave one of the two out." in message
    assert "each once; got" in refusal(tmp_path, [parts[0], parts[0]])


def config_of(row, **changed):
    return row | {"config": row["config"] | changed}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"checkpoint": "other"}, "checkpoint of seed 0 is '"),
        (
            lambda row: row | {"checkpoint": "other", "split_role": "validation"},
            "checkpoint of seed 0 is '",
        ),
        (lambda row: row | {"method": "memo"}, "method is 'rotation' in"),
        (lambda row: row | {"learning_rates": [0.03]}, "learning_rates is [0.01, 0.03, 0.3] in"),
        (lambda row: row | {"num_examples": 2}, "num_examples is 3 in"),
        (lambda row: row | {"settings": row["settings"] | {"num_steps": 1}}, "num_steps is 2 in"),
        (lambda row: row | {"settings": {}}, "settings."),
        (lambda row: config_of(row, **{"adapt.corruption_seed": 7}), "corruption_seed is 0 in"),
        # Two ranges of the images make no row, also where they are of other cells.
        (
            lambda row: config_of(row, **{"data.test": "test[30:60]"}),
            "of two ranges of images cannot be joined; reported config.data.test is 'test[:30]' in",
        ),
        (lambda row: {k: v for k, v in row.items() if k != "config"}, "do not say what made them"),
    ],
)
def test_parts_made_otherwise(parts, tmp_path, change, message):
    other = edited(parts[2], tmp_path / "other", change)
    message_of_all = refusal(tmp_path / "no", [*parts[:2], other])
    assert message in message_of_all and other in message_of_all


def test_the_other_split_may_have_other_images(parts, tmp_path):
    def of_validation(row):
        config = dict(row["config"])
        config["data.validation"] = config.pop("data.test")
        other = {"split_role": "validation", "domain": "spatter", "num_examples": 2}
        return row | other | {"config": config}

    other = edited(parts[2], tmp_path / "other", of_validation)
    record = join(tmp_path / "whole", [parts[2], other])
    assert [row["split_role"] for row in record["rows"]] == ["reported", "validation"]
    assert record["correlation"]["sets"] == 1


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


def test_a_part_that_is_not_finished(parts, tmp_path):
    assert "has no diagnostics.jsonl" in refusal(tmp_path / "no", [tmp_path / "none"])
    folder = shutil.copytree(parts[0], tmp_path / "cut")
    book, path = folder / "diagnostics.jsonl", folder / "diagnostics.json"
    row = json.loads(book.read_text().splitlines()[0])
    with book.open("a") as file:
        file.write(json.dumps(row | {"domain": "snow"}) + "\n")
    message = refusal(tmp_path / "no", [folder, parts[1]])
    assert f"{path} is damaged, or lacks rows of its method" in message and "to its end" in message
    for text in ('{"config": {}, "rows": []}', '{"config": {}}', "{"):
        path.write_text(text)
        assert f"{path} is damaged" in refusal(tmp_path / "no", [folder, parts[1]])
    path.unlink()
    assert f"{folder} has no diagnostics.json." in refusal(tmp_path / "no", [folder, parts[1]])


def test_the_programs_are_told_apart(parts, tmp_path):
    with pytest.raises(launch.UserError, match=r"has no results\.jsonl.*say --program=diagnose"):
        merge.run(str(tmp_path / "no"), parts)

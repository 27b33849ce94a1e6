"""The numbers that pages show in prose are those of the raw rows."""

import importlib.util
import json
import pathlib
import re

import pytest

from experiments.report import headlines

HEADLINES = json.loads(pathlib.Path("experiments/results/headlines.json").read_text())
README = pathlib.Path("README.md").read_text()
PAGES = README + "".join(
    pathlib.Path("docs", f"{name}.md").read_text()
    for name in ("index", "results", "results_text", "results_reasoning", "speed")
)


def text_of(name):
    return f"{HEADLINES[name]['value']:,}"


@pytest.mark.parametrize("name", HEADLINES)
def test_a_headline_is_computed_from_the_rows_of_its_file(name):
    entry = HEADLINES[name]
    assert set(entry) == {"value", "unit", "device", "file", "select", "command"}
    module, function = entry["select"].split(":")
    record = json.loads(pathlib.Path(entry["file"]).read_text())
    value = getattr(importlib.import_module(module), function)(record)
    digits = len(str(entry["value"]).partition(".")[2])
    assert round(value, digits) == entry["value"]
    assert headlines.computed(entry) == entry
    for program in re.findall(r"python -m (\S+)", entry["command"]):
        assert importlib.util.find_spec(program), f"there is no program {program}"


@pytest.mark.parametrize("name", HEADLINES)
def test_a_headline_stands_on_a_page(name):
    shown = text_of(name)
    assert shown in PAGES or shown.replace(",", "") in PAGES, shown


def test_a_changed_row_changes_its_headline():
    record = json.loads(pathlib.Path("experiments/results/cifar10c_level5.json").read_text())
    before = headlines.joint_error(record)
    for row in record["rows"]:
        if row["method"] == "joint" and row["domain"] == "fog":
            row["error"] = 0.9
    assert headlines.joint_error(record) > before + 1


@pytest.mark.parametrize(
    "sentence",
    [
        "{rotation_rate_bf16} sample-steps per second in bfloat16, against {torch_vmap_rate} with",
        "of which {table_minutes} adapt",
        "masks a step runs at {mae_share} %",
        "jointly trained ResNet-26 {joint_error}, ten steps of rotation {rotation_error}, "
        "test-time augmentation {augmented_error}, MEMO over crops {memo_error}, online rotation "
        "{online_error}",
        "MEMO as published {published_memo_error}, from {memo_source_error} of its own",
        "`source` | nothing | {demo_source} ±",
    ],
)
def test_the_readme_says_what_the_headlines_say(sentence):
    wanted = sentence.format(**{name: text_of(name) for name in HEADLINES})
    assert wanted in " ".join(README.split())

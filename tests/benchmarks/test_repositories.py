"""Adapters of repositories: whose files are learned from, whose are read, and what is counted."""

import json
import lzma

import ml_collections
import numpy as np
import pytest

from benchmarks import repositories
from experiments import launch

CHUNK = repositories.SETTING.chunk
SETTINGS = {
    **{"weights": (), "repositories": 4, "learned": 20, "read": 2, "continued": 8},
    **{"window": 96, "at_once": 2, "smoke": True},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three repositories with files enough, one of too few, and files of too few characters."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    with lzma.open(folder / "code_python.jsonl.xz", "wt", encoding="utf-8") as lines:
        for source, count in (("one", 4), ("two", 4), ("small", 1), ("three", 4)):
            for number in range(count):
                letters = rng.choice(list("abcdef\n"), 2000 if number else 1999)
                row = {"source": source, "path": f"{source}/{number}.py", "text": "".join(letters)}
                lines.write(json.dumps(row) + "\n")
    return folder


def settings_of(texts, **changes):
    return ml_collections.ConfigDict({**SETTINGS, "texts": str(texts), **changes})


def test_the_file_that_is_read_is_not_learned_from(texts):
    def of(**changes):
        path = texts / "code_python.jsonl.xz"
        settings = settings_of(texts, **changes)
        return repositories.repositories(path, lambda text: list(text.encode()), settings)

    found = of()
    assert [each.name for each in found] == ["one", "three", "two"]
    for each in found:
        assert each.path not in each.files and len(each.files) == 1
        assert all(name.startswith(each.name) and "/0." not in name for name in each.files)
        assert each.learned.shape == (20, CHUNK) and each.tokens.shape == (2, CHUNK)
        assert each.following.shape == (8,)
    with pytest.raises(launch.UserError, match="got 0"):
        of(learned=10**6)


def test_the_program(texts, tmp_path, monkeypatch):
    # So small a net learns nothing by the step size that was chosen on a real one.
    monkeypatch.setattr(repositories, "RATE", 0.03)
    record = repositories.run(str(tmp_path / "made.json"), settings_of(texts))
    assert json.loads((tmp_path / "made.json").read_text())["rows"] == record["rows"]
    assert len(record["rows"]) == 3
    # Letters of a few kinds: whichever repository taught them, and without a step nothing did.
    for way in ("own", "other", "pristine_learning"):
        assert repositories.saved(record["rows"], way)[0] > 1
    assert repositories.saved(record["rows"], "pristine")[0] == 0

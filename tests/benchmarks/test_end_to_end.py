"""The benchmark of training through inner steps: passages, rows, controls and comparisons."""

import json

import ml_collections
import numpy as np
import pytest

from benchmarks import end_to_end, outer_training
from experiments import launch

VOCABULARY = 17
SETTINGS = {
    **{"nets": ("full", "bridge"), "width": 8, "depth": 2, "heads": 1, "window": 8, "chunk": 4},
    **{"length": 8, "rows": 2, "steps": 2, "bridge_steps": 1, "rate": 1e-2, "bridge_rate": 1e-2},
    **{"inner_rate": 1.0, "step_sizes": ("0.1", "1.0"), "remat": 1, "mixed": True, "curve": 8},
    **{"score_length": 16, "score_rows": 2, "books": 3, "dtype": "float32", "seed": 0},
    **{"seconds": 500.0, "smoke": False},
}


@pytest.fixture
def tokens(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"sizes": np.arange(1, VOCABULARY + 1)}
    for role, lengths in (("train", (30, 7, 20)), ("validation", (18, 16)), ("test", (16, 9, 40))):
        arrays[f"{role}_lengths"] = np.array(lengths)
        arrays[f"{role}_tokens"] = rng.integers(VOCABULARY, size=sum(lengths)).astype(np.uint16)
    path = tmp_path / "tokens.npz"
    np.savez(path, **arrays)
    return str(path)


def settings(tokens, **options):
    return ml_collections.ConfigDict(SETTINGS | {"tokens": tokens} | options)


def test_networks_are_trained_and_scored_beside_their_controls(tokens, tmp_path, capsys):
    record = end_to_end.run(str(tmp_path / "e.json"), settings(tokens))
    assert json.loads((tmp_path / "e.json").read_text())["rows"] == record["rows"]
    full, bridge = record["trained"]
    assert (full["steps"], full["tokens"], full["whole"]) == (2, 32, True)
    assert (bridge["steps"], bridge["tokens"]) == (1, 16)
    # The embedding of VOCABULARY tokens, two layers, and norms.
    assert record["parameters"] == 17 * 8 + 2 * (4 * 64 + 3 * 8 * 32 + 2 * 8 + 2 * 8) + 8
    assert record["documents"] == {"validation": 2, "test": 2}
    rows = {row["way"]: row for row in record["rows"]}
    assert list(rows) == [
        "full",
        *("full, steps off", "full, steps on"),
        *("bridge, steps off", "bridge, steps on"),
    ]
    for row in rows.values():
        assert len(row["curve"]) == 2 and len(row["documents"]) == 2
        due = (7 * row["curve"][0] + 8 * row["curve"][1]) / 15
        assert row["nats"] == pytest.approx(due, abs=1e-4)
    for name in ("full", "bridge"):
        on, off = rows[f"{name}, steps on"], rows[f"{name}, steps off"]
        assert on["zero_is_control"] and on["documents"] != off["documents"]
        tried = on["validation_nats"]
        assert set(tried) == {"0.1", "1"} and tried[f"{on['rate']:g}"] == min(tried.values())
    # A window as wide as a passage's first positions sees what full attention sees there.
    assert rows["full"]["curve"][0] == pytest.approx(rows["full, steps off"]["curve"][0], abs=1e-4)
    gain = record["gains"][0]
    assert (gain["way"], gain["other"]) == ("full, steps on", "full, steps off")
    due = rows["full, steps off"]["nats"] - rows["full, steps on"]["nats"]
    assert gain["gain"] == pytest.approx(due, abs=2e-5)
    assert "bridge, steps on" in capsys.readouterr().out


def test_no_network_is_begun_after_its_time(tokens, tmp_path):
    record = end_to_end.run(str(tmp_path / "e.json"), settings(tokens, seconds=0.0))
    assert record["rows"] == [] and record["trained"] == []


def test_passages_are_of_books_that_are_long_enough():
    books = [np.arange(100, 110), np.arange(3), np.arange(200, 205)]
    given = ml_collections.ConfigDict({"length": 4, "chunk": 2, "rows": 64})
    drawn = next(outer_training.draws(books, given, 0))
    assert drawn.shape == (64, 2, 2) and drawn.dtype == np.int32
    flat = drawn.reshape(64, 4)
    assert (np.diff(flat, axis=1) == 1).all()
    # Seven starts in the first book, two in the last.
    assert set(flat[:, 0]) == {*range(100, 107), 200, 201}
    np.testing.assert_array_equal(drawn, next(outer_training.draws(books, given, 0)))
    given.length = 40
    with pytest.raises(launch.UserError, match="no training book has 40 tokens"):
        next(outer_training.draws(books, given, 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nets": ("wide",)}, "unknown network 'wide'"),
        ({"nets": ("bridge",)}, "--nets must have full before bridge"),
        ({"length": 9}, "--length must be a multiple of --chunk; got 9 and 4"),
        ({"score_length": 400}, "no validation book has 400 tokens"),
    ],
)
def test_options_that_are_refused(tokens, tmp_path, options, words):
    with pytest.raises(launch.UserError, match=words):
        end_to_end.run(str(tmp_path / "e.json"), settings(tokens, **options))
    assert not (tmp_path / "e.json").exists()

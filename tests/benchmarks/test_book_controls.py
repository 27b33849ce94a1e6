"""Controls of documents: an adapter that all share, and another document's, on a tiny decoder."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from benchmarks import book_controls as program, books
from experiments import launch
from ttt_jax import models

pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

VOCABULARY = 12


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Documents that repeat a few tokens each, of two roles; one is too short."""
    rng = np.random.default_rng(0)
    arrays = {"sizes": np.full(VOCABULARY, 2)}
    for role, lengths in {"books": (40, 40, 30), "code_c": (40, 33, 6)}.items():
        rows = [rng.permutation(VOCABULARY)[:3][np.arange(n) % 3] for n in lengths]
        arrays |= {f"{role}_lengths": np.array(lengths), f"{role}_tokens": np.concatenate(rows)}
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    net = models.Decoder(
        vocabulary=VOCABULARY, width=16, depth=1, heads=2, window=16, sinks=2, attention="xla"
    )
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    monkeypatch.setattr(books, "load", lambda settings: books.Model(net, params))
    setting = books.Setting(books.LINEAR, 2, 8, (0.1,))
    monkeypatch.setattr(books, "SETTINGS", {"tiny": setting})


def settings(tokens, **changes):
    values = {"tokens": tokens, "weights": (), "roles": ("books", "code_c"), "seed": 0}
    values |= {"ways": program.WAYS, "setting": "tiny", "rate": 3e-2, "first": 32, "least": 8}
    values |= {"documents": 5, "window": 16, "unroll": 0, "settings": (), "smoke": False}
    return ml_collections.ConfigDict(values | changes)


def test_every_control_of_every_document(tokens, tmp_path, capsys):
    record = program.run(str(tmp_path / "a.json"), settings(tokens))
    assert record["rows"] == json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["role"], row["tokens"]) for row in record["rows"]] == [
        *[("books", 32), ("books", 32), ("books", 30)],
        *[("code_c", 32), ("code_c", 32)],
    ]
    bits = {name: np.array([row[name] for row in record["rows"]]) for name in program.WAYS}
    assert all(np.isfinite(values).all() for values in bits.values())
    # Its own three tokens are what an adapter learns; those of another document are others.
    assert (bits["adapted"] < bits["sliding"]).all()
    assert bits["adapted"].mean() < bits["crossed"].mean()
    assert bits["adapted"].mean() < bits["shared"].mean()
    assert "books, 3 documents: sliding" in capsys.readouterr().out
    # Without a step size all are the model as it is.
    still = program.run(str(tmp_path / "b.json"), settings(tokens, rate=0.0, roles=("books",)))
    for row in still["rows"]:
        for name in ("adapted", "shared", "crossed"):
            assert row[name] == pytest.approx(row["sliding"], rel=1e-5)


def test_rows_without_a_document_repeat_the_last_one():
    made = program.stacked([np.arange(5), np.arange(3) + 7], 4, 2, 3)
    assert made["tokens"].shape == made["mask"].shape == (4, 3, 2)
    assert made["mask"].sum((1, 2)).tolist() == [5, 3, 3, 3]
    np.testing.assert_array_equal(made["tokens"][3], made["tokens"][1])


def test_what_is_not_known_is_refused(tokens, tmp_path):
    with pytest.raises(launch.UserError, match="way"):
        program.run(str(tmp_path / "a.json"), settings(tokens, ways=("other",)))
    with pytest.raises(launch.UserError, match="setting"):
        program.run(str(tmp_path / "a.json"), settings(tokens, setting="other"))
    with pytest.raises(launch.UserError, match="must leave two documents of code_c; got 35"):
        program.run(str(tmp_path / "a.json"), settings(tokens, least=35, roles=("code_c",)))

"""The language model of layers that learn: texts, equal sizes, recall, needles, and the program."""

import json
import lzma
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from benchmarks import (
    layer_language,
    layer_needles,
    layer_nets,
    layer_pages,
    layer_recall,
    layer_scores,
    layer_texts,
)
from experiments import launch
from ttt_jax.losses.tokens import token_nats

pytest.importorskip("tokenizers", reason="the vocabulary is learned with tokenizers")
WORDS = ("the", "house", "of", "a", "man", "stood", "by", "water", "and", "in", "1852", "née")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Books of random words."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for place, name in enumerate(layer_texts.FILES.values()):
        with lzma.open(root / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            for book in range(2):
                text = " ".join(rng.choice(WORDS, 1500)) + "."
                file.write(json.dumps({"title": f"{place}{book}", "text": text}) + "\n")
    return root


@pytest.fixture(scope="module")
def tokens(folder):
    path = folder / "books.npz"
    layer_texts.write(str(path), str(folder), vocabulary=300, most=1000)
    return path


def test_ids_are_the_texts_and_every_digit_is_a_token(folder, tokens):
    texts = layer_texts.read(str(tokens))
    assert {role: len(books) for role, books in texts.books.items()} == dict.fromkeys(
        layer_texts.FILES, 2
    )
    with lzma.open(folder / f"{layer_texts.FILES['train']}.jsonl.xz", "rt") as file:
        rows = [json.loads(line) for line in file]
    for book, row in zip(texts.books["train"], rows, strict=True):
        assert texts.decode(book) == row["text"]
    assert texts.titles["test"] == ["20", "21"]
    assert all(len(book) == 1000 for book in texts.books["test"])
    assert [texts.decode([digit]) for digit in texts.digits] == list("0123456789")
    year = [int(token) for token in texts.books["train"][0] if token in texts.digits]
    assert len(year) == 4 * rows[0]["text"].count("1852")
    assert (
        texts.decode(texts.needle[0]) == layer_texts.NEEDLE and texts.decode(texts.needle[1]) == "."
    )
    with pytest.raises(launch.UserError, match="write it with --prepare"):
        layer_texts.read(str(folder / "none.npz"))
    with pytest.raises(launch.UserError, match="--texts names the folder"):
        layer_texts.write(str(tokens), str(folder / "none"), vocabulary=300, most=9)


def test_spans_are_apart_and_of_one_book():
    books = [np.arange(25), 100 + np.arange(9), 200 + np.arange(31)]
    rows, owners = layer_texts.spans(books, 10, 3)
    assert owners.tolist() == [0, 0, 2, 2, 2]
    assert rows[:, 0].tolist() == [0, 15, 200, 210, 221]
    np.testing.assert_array_equal(rows - rows[:, :1], np.arange(10)[None].repeat(5, 0))
    with pytest.raises(launch.UserError, match="no book has 40 tokens"):
        layer_texts.spans(books, 40, 3)


def counted(*lengths):
    """Books whose tokens count on, a hundred apart."""
    books = {"train": [100 * place + np.arange(n) for place, n in enumerate(lengths)]}
    return layer_texts.Texts(books, {}, [], (np.zeros(0), np.zeros(0)), np.zeros(0))


def test_pages_are_of_one_book_and_every_beginning_is_drawn():
    books = layer_pages.books_of(counted(6, 3, 8), 4)
    keys = jax.random.split(jax.random.key(0), 300)

    def draw(key):
        return layer_pages.page(books, layer_pages.place(books, key), 4)

    rows = np.asarray(jax.jit(jax.vmap(draw))(keys))
    np.testing.assert_array_equal(rows - rows[:, :1], np.arange(4)[None].repeat(300, 0))
    assert set(rows[:, 0].tolist()) == {0, 1, 2, 200, 201, 202, 203, 204}
    with pytest.raises(launch.UserError, match="no training book has 9 tokens"):
        layer_pages.books_of(counted(6, 3, 8), 9)


def test_pages_go_on_in_their_book_until_it_ends_or_they_begin_anew():
    net = layer_nets.net("ttt_linear", SIZES._replace(depth=1))
    books = layer_pages.books_of(counted(50, 3, 40), 16)
    how = {"length": 16, "rows": 40, "steps_per_call": 1}
    for fresh, at_least in ((0.0, 0.2), (0.5, 0.5)):
        training = layer_pages.on(net, **how, fresh=fresh)
        first, memory = training.draw(books, jax.random.key(0), training.memory)
        assert not np.asarray(memory.cache.length).any()
        memory = memory._replace(cache=memory.cache._replace(length=jnp.full(40, 16)))
        second, after = training.draw(books, jax.random.key(1), memory)
        goes_on = np.asarray(after.cache.length) == 16
        assert (second[:, 0] == first[:, -1] + 1)[goes_on].all()
        rows = np.asarray(second)
        np.testing.assert_array_equal(rows - rows[:, :1], np.arange(16)[None].repeat(40, 0))
        # Whose book has another page goes on, unless the share says otherwise.
        begun = np.asarray(first[:, 0])
        room = begun % 100 + 32 <= np.where(begun < 100, 50, 40)
        assert not (goes_on & ~room).any() and (fresh or (goes_on == room).all())
        assert at_least <= 1 - goes_on.mean() < 0.95 and goes_on.any()


def test_a_state_that_is_passed_is_that_of_the_page_before_and_has_no_gradient():
    net = layer_nets.net("ttt_linear", SIZES._replace(depth=1))
    params = layer_nets.fresh(net, 0)
    training = layer_pages.on(net, length=16, rows=2, steps_per_call=1, fresh=0.0)
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 300)
    _, memory = training.loss(params, tokens[:, :16], training.memory)
    value, after = training.loss(params, tokens[:, 16:], memory)
    logits = net.apply(params, tokens)
    due = token_nats(logits[:, 16:-1], tokens[:, 17:]).mean()
    np.testing.assert_allclose(value, due, rtol=1e-5)
    assert np.asarray(after.cache.length).tolist() == [32, 32]

    def left(params):
        _, memory = training.loss(params, tokens[:, :16], training.memory)
        return jax.tree.leaves(memory.cache.layers.memory)[0].sum()

    slopes = jax.grad(left)(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(slopes))


SIZES = layer_nets.Sizes(300, 64, 2, 256, 8, "mamba", "dual", "xla", jnp.float32, 32)


def test_nets_are_of_equal_size_and_their_products_are_counted():
    counts = {name: layer_nets.count(layer_nets.net(name, SIZES)) for name in layer_nets.NETS}
    full = counts["attention"]
    assert counts["window"] == full == 300 * 64 + 64 + 2 * (4 * 64**2 + 3 * 64 * 256 + 2 * 64)
    unit = 3 * 64 * 2 * 8
    assert all(abs(count - full) <= unit / 2 for count in counts.values())
    matrices = 2 * (full - 5 * 64)
    seen = sum(range(1, 17)) / 16
    flop = {n: layer_nets.flop_per_token(layer_nets.net(n, SIZES), 16) for n in layer_nets.NETS}
    assert flop["attention"] == matrices + 2 * 4 * 64 * seen
    assert flop["window"] == matrices + 2 * 4 * 64 * (sum(range(1, 9)) + 8 * 8) / 16
    net = layer_nets.net("ttt_linear", SIZES)
    own = 4 * 64**2 + 2 * 64 + 3 * 64 * net.mlp_width
    mixing = 2 * (8 * 32**2 + 6 * 32 * 16)
    assert flop["ttt_linear"] == 2 * (300 * 64 + 2 * own) + 2 * mixing


def test_the_schedule_rises_and_falls():
    sizes = [float(layer_nets.schedule(jnp.float32(n), jnp.float32(100))) for n in range(101)]
    assert sizes[0] == pytest.approx(0.1) and sizes[9] == pytest.approx(1.0)
    assert sizes[55] == pytest.approx(0.505) and sizes[100] == pytest.approx(0.01)


def test_training_stops_at_its_deadline_and_learns_before():
    """Of one weight that has to be the mean of what is drawn."""
    training = layer_nets.without_memory(
        lambda params, batch: (params["kernel"] - batch) ** 2,
        lambda data, key: data + 0.01 * jax.random.normal(key),
        steps_per_call=20,
    )
    program = layer_nets.program(training)
    how = {"seed": 0, "rate": 0.1, "calls": 5}
    deadline = time.monotonic() + 600
    made = layer_nets.fit(
        program, training, {"kernel": jnp.float32(1.0)}, jnp.float32(2.0), deadline=deadline, **how
    )
    assert made.finished and made.steps == 80 and made.losses[-1] < 0.05 < made.losses[0]
    late = layer_nets.fit(
        program, training, {"kernel": jnp.float32(1.0)}, jnp.float32(2.0), deadline=0.0, **how
    )
    assert not late.finished and late.losses == [] and float(late.params["kernel"]) == 1.0


@pytest.mark.parametrize("pairs", [1, 5, 8])
def test_recall_is_what_a_reader_would_answer(pairs):
    """Brute force: the first tokens as a dictionary; who asks is known, and nobody else."""
    length, vocabulary = 33, 64
    given = layer_recall.recall(
        jax.random.key(pairs), 50, pairs=pairs, length=length, vocabulary=vocabulary
    )
    gaps = []
    for tokens, answers, asked in zip(*map(np.asarray, given), strict=True):
        head = tokens[: 2 * pairs].tolist()
        table = dict(zip(head[::2], head[1::2], strict=True))
        assert len(table) == pairs and max(table) < 32 <= min(table.values())
        queries = [place for place in range(2 * pairs, length) if tokens[place] in table]
        assert queries == np.flatnonzero(asked).tolist()
        assert sorted(tokens[queries]) == sorted(table)
        assert [answers[place] for place in queries] == [table[tokens[p]] for p in queries]
        assert (0 <= tokens).all() and (tokens < vocabulary).all() and not answers[~asked].any()
        gaps += [(place - 2 * pairs) // 2 for place in queries]
    if pairs == 1:
        # Nearly as 1 / x: the first of 15 places has about three tenths.
        share = np.mean(np.array(gaps) == 0)
        assert 0.1 < share < 0.55
    with pytest.raises(ValueError, match="at least 4 \\* pairs; got length=9"):
        layer_recall.recall(jax.random.key(0), 1, pairs=3, length=9, vocabulary=64)


def test_needles_are_hidden_where_they_should_be(tokens):
    texts = layer_texts.read(str(tokens))
    books, _ = layer_texts.spans(texts.books["test"], 128, 1)
    given = layer_needles.needles(texts, books, lengths=(64, 128), depths=(0.0, 0.5), seed=0)
    assert given.tokens.shape == (2 * 2 * 3, 128)
    nats, guesses = np.zeros((12, 128)), np.zeros((12, 128), int)
    for row in range(12):
        length = given.length[row]
        text = texts.decode(given.tokens[row, :length])
        number = "".join(map(str, given.digits[row]))
        assert text.endswith(layer_texts.NEEDLE + number)
        assert [
            str(texts.digits.tolist().index(t)) for t in given.tokens[row, given.places[row]]
        ] == [*number]
        hidden = not np.isnan(given.depth[row])
        assert text.count(layer_texts.NEEDLE + number) == 1 + hidden
        if hidden:
            at = text.index(layer_texts.NEEDLE)
            assert (at == 0) == (given.depth[row] == 0) and at < 0.6 * len(text)
        nats[row, given.places[row]] = 2.0 if hidden else 3.0
        guesses[row, given.places[row]] = given.digits[row] if hidden else 10
    rows = layer_needles.rows_of(given, nats, guesses)
    assert [(row["length"], row["depth"]) for row in rows] == [
        (64, 0.0),
        (64, 0.5),
        (128, 0.0),
        (128, 0.5),
    ]
    for row in rows:
        assert (row["nats"], row["nats_without"]) == (2.0, 3.0)
        assert (row["right"], row["right_without"]) == (1.0, 0.0)


def test_gains_are_of_the_last_eighth_and_by_book(monkeypatch):
    """A scorer whose nats are known: less by the number of tokens that were seen."""
    length = 16
    texts = layer_texts.Texts(
        {"test": [np.zeros(8 * length, np.uint16), np.ones(8 * length, np.uint16)]},
        {},
        [b"ab", b"c"],
        (np.zeros(0), np.zeros(0)),
        np.zeros(0),
    )

    def score(params, tokens):
        nats = jnp.broadcast_to(1 - 0.001 * jnp.arange(tokens.shape[1])[None], tokens.shape)
        return nats.at[:, 0].set(0.0), jnp.zeros_like(tokens)

    settings = ml_collections.ConfigDict({"length": length, "spans": 1, "score_rows": 3, "rows": 5})
    row = layer_scores.positions(score, None, texts, settings)
    assert (row["sequences"], row["books"]) == (2, 2)
    # What was seen before a whole sequence's last eighth, and before its control's: 112 tokens.
    assert row["gain"] == pytest.approx(0.112) and row["late_gain"] == pytest.approx(0.112)
    assert len(row["curve"]) == len(row["curve_reset"]) == 32
    assert row["curve"][4] == pytest.approx(1 - 0.001 * np.mean([17, 18, 19]))
    assert row["curve_reset"][4] == pytest.approx(1 - 0.001 * np.mean([1, 2, 3]))
    seen = np.arange(128) % length != 0
    nats = (1 - 0.001 * np.arange(128))[seen].sum() * 2
    size = 3 * seen.sum()
    assert row["bits_per_byte"] == pytest.approx(nats / np.log(2) / size)


def settings(tokens, **changes):
    values = {"tokens": str(tokens), "prepare": False, "texts": "", "vocabulary": 300, "most": 9}
    values |= {"parts": ("language",), "nets": ("window", "ttt_linear"), "seeds": ("0",)}
    values |= {
        "form": "auto",
        "attention": "fused",
        "backbone": "mamba",
        "samples": ("ttt_linear",),
        "fresh": 1.0,
        "seconds": 600.0,
    }
    values |= {"smoke": True} | layer_language._SMOKE
    return ml_collections.ConfigDict(values | changes)


@pytest.fixture
def quick(monkeypatch):
    few = {"rates": ("1e-3",), "recall_rates": ("1e-3",)}
    monkeypatch.setattr(layer_language, "_SMOKE", layer_language._SMOKE | few)
    monkeypatch.setattr(layer_recall, "LENGTH", 16)
    monkeypatch.setattr(layer_recall, "PAIRS", (2, 4))


def test_the_program_trains_scores_asks_and_writes(tmp_path, tokens, quick, capsys):
    record = layer_language.run(str(tmp_path / "a.json"), settings(tokens))
    assert record == json.loads((tmp_path / "a.json").read_text())
    rows = {row["net"]: row for row in record["rows"] if row["part"] == "language"}
    assert rows["window"]["tokens"] == rows["ttt_linear"]["tokens"] == 4 * 4 * 16
    for row in rows.values():
        assert row["finished"] and len(row["training_losses"]) == 2
        assert len(row["curve"]) == len(row["curve_reset"]) == 32
        # The first length is the same with and without the control.
        np.testing.assert_allclose(row["curve"][:4], row["curve_reset"][:4], atol=2e-4)
        assert row["gain_interval"][0] <= row["gain"] <= row["gain_interval"][1]
    assert record["headlines"]["ttt_lm_loss_gain_8x"] == rows["ttt_linear"]["gain"]
    asked = [row for row in record["rows"] if row["part"] == "needle"]
    assert len(asked) == 2 * 2 * 3 and all(row["nats"] > 0 for row in asked)
    (sample,) = [row for row in record["rows"] if row["part"] == "sample"]
    assert sample["net"] == "ttt_linear" and " || " in sample["text"]
    assert "ttt_linear 0" in capsys.readouterr().out


def test_states_are_passed_to_nets_that_have_one(tokens):
    texts = layer_texts.read(str(tokens))
    for name, fresh, passed in (
        ("window", 0.2, False),
        ("ttt_mlp", 1.0, False),
        ("ttt_mlp", 0.2, True),
    ):
        net = layer_language.language(name, texts, settings(tokens, fresh=fresh), 0.0)
        assert isinstance(net.training.memory, layer_pages.Stopped) == passed


def test_recall_is_trained_and_its_step_size_chosen(tmp_path, tokens, quick):
    record = layer_language.run(
        str(tmp_path / "r.json"), settings(tokens, parts=("recall",), nets=("attention",))
    )
    (row,) = record["rows"]
    assert row["finished"] and row["chosen"] and list(row["right"]) == ["2", "4"]
    assert record["headlines"]["attention_recall"] == np.mean(list(row["right"].values()))


def test_a_net_whose_forms_differ_is_not_trained(tmp_path, tokens, quick, monkeypatch):
    gaps = {"window": {"loss": 0.0, "gradient": 1e-2}, "ttt_linear": {"loss": 0.0, "gradient": 0.5}}
    monkeypatch.setattr(layer_nets, "differences", lambda name, *rest: gaps[name])
    asked = []

    def rows(name, *rest):
        asked.append(name)
        return iter(())

    monkeypatch.setattr(layer_language, "language_rows", rows)
    parts = settings(tokens, parts=("compare", "language"))
    record = layer_language.run(str(tmp_path / "c.json"), parts)
    assert asked == ["window"]
    assert [row.get("right") for row in record["rows"]] == [True, False, None]
    assert record["rows"][-1]["message"] == "wrong" and not record["rows"][-1]["finished"]

    def broken(name, *rest):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(layer_language, "language_rows", broken)
    record = layer_language.run(str(tmp_path / "b.json"), settings(tokens))
    assert [row["message"] for row in record["rows"]] == ["RuntimeError: out of memory"] * 2
    late = settings(tokens, seconds=-1.0)
    record = layer_language.run(str(tmp_path / "d.json"), late)
    assert {row["message"] for row in record["rows"]} == {"no time left"}


def test_options_that_are_refused(tmp_path, tokens):
    for changes, words in (
        ({"nets": ("rnn",)}, "unknown net 'rnn'"),
        ({"parts": ("speed",)}, "unknown part 'speed'"),
        ({"seeds": ("0", "0")}, "'0' is there twice"),
    ):
        with pytest.raises(launch.UserError, match=words):
            layer_language.run(str(tmp_path / "x.json"), settings(tokens, **changes))
    assert not (tmp_path / "x.json").exists()

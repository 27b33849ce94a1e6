"""BIG-Bench Hard: adapters side by side, scores behind a shared prompt, and the program."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from benchmarks.bbh import __main__ as program, learning, sequences
from benchmarks.bbh.programs import logits_at
from experiments import launch
from ttt_jax import models

pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

SETTINGS = {"weights": (), "data": "", "tasks": (), "role": "reported", "seed": 0, "shots": 4}
SETTINGS |= {"queries": 3, "context": 512, "rank": 2, "rates": (1e-2,), "shared_factor": 0.5}
SETTINGS |= {"steps": (4,), "every": 2, "rows": 2, "tasks_at_once": 3, "batch": 4}
SETTINGS |= {"dtype": "float32", "remat": False, "unroll": 1, "smoke": True}
SETTINGS |= {"ways": ("in_context", "zero_shot", "adapted", "direct", "guarded")}


def settings(**changes):
    return ml_collections.ConfigDict(SETTINGS | changes)


@pytest.fixture(scope="module")
def bench():
    """The random decoder, with larger weights than it is drawn with, so that answers differ."""
    chosen = settings()
    base, _ = program.load_model(chosen)
    rng = np.random.default_rng(0)
    fast, frozen = learning.SELECTED.split(base.params)
    frozen = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype(a.dtype)),
        frozen,
    )
    base = base._replace(params=learning.SELECTED.merge(fast, frozen))
    return program.Bench(base, program.load_tasks(chosen), chosen)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_at_places_are_those_of_the_decoder(tied):
    module = models.Decoder(vocabulary=20, width=16, depth=1, heads=1, tied=tied, attention="xla")
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 20)
    places = jnp.array([[0, 5, 3], [2, 2, 4]])

    @jax.jit
    def both():
        params = module.init(jax.random.key(1), tokens)
        return module.apply(params, tokens), logits_at(module, params, tokens, places)

    whole, found = both()
    wanted = jnp.take_along_axis(whole, places[..., None], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.fixture(scope="module")
def log_probs(bench):
    """Of the next token behind each of a sequence, ``[T, V]``, read as a whole."""
    apply = models.decoder_function(bench.base.module)
    run = jax.jit(lambda tokens: jax.nn.log_softmax(apply(bench.base.params, tokens)[0]))

    def read(tokens):
        padded = np.zeros((1, 512), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(run(padded))[: len(tokens)]

    return read


def test_the_most_probable_answer_is_that_of_whole_sequences(bench, log_probs, monkeypatch):
    """Behind one prompt, in a batch that is not full, with unequal numbers of answers."""
    queries, seen, judge = bench.asked[0], [], bench.scorer._is_right
    assert {len(each.answers) for each in queries} == {2, 3}
    assert len(queries) < bench.scorer.batch

    def watched(query, nats, written):
        seen.append((query, nats))
        return judge(query, nats, written)

    monkeypatch.setattr(bench.scorer, "_is_right", watched)
    for prompt in (bench.prefixes[0], []):
        seen.clear()
        found = bench.scorer.right(bench.base.params, queries, prompt)
        for query, nats in seen:
            before = [*prompt, *query.question, query.last]
            wanted = []
            for answer in query.answers:
                rows = log_probs(before + answer)[len(before) - 1 : -1]
                wanted.append(-rows[np.arange(len(answer)), answer].sum())
            np.testing.assert_allclose(nats, wanted, rtol=1e-5)
            assert found[queries.index(query)] == (int(np.argmin(wanted)) == query.right)
        assert len(seen) == len(queries)


def test_a_free_answer_is_right_where_greedy_decoding_writes_it(bench, log_probs, monkeypatch):
    monkeypatch.setattr(bench.writer, "ends_alike", lambda answer, written: answer == written)
    before, asked = bench.prefixes[2], []
    for query in bench.asked[2][:2]:
        assert query.free
        tokens = [*before, *query.question, query.last]
        for _ in range(5):
            tokens.append(int(log_probs(tokens)[-1].argmax()))
        written = tokens[-5:]
        asked.append(query._replace(answers=[written]))
        asked.append(query._replace(answers=[[*written[:4], (written[4] + 1) % 256]]))
    found = bench.scorer.right(bench.base.params, asked, before)
    assert found.tolist() == [True, False, True, False]


@pytest.fixture(scope="module")
def learned(bench):
    return bench.private.learn(bench.rows["in_context"], 1e-2)


def same(one, other):
    return all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


def test_adapters_learn_apart_from_each_other(bench, learned):
    rows = bench.rows["in_context"]
    before = jax.device_get(bench.base.params)
    assert learned.losses.shape == (3, 4) and (learned.losses[:, -1] < learned.losses[:, 0]).all()
    assert learned.held_out.shape == (3, 0) and [len(each) for each in learned.fast] == [2, 2, 2]
    order = [2, 0, 1]
    moved = bench.private.learn([rows[place] for place in order], 1e-2)
    spoiled = [row._replace(targets=[0] * len(row.targets)) for row in rows[0]]
    others = bench.private.learn([spoiled, *rows[1:]], 1e-2)
    alone = bench.private.learn([rows[1]], 1e-2)
    for place in range(3):
        assert same(moved.fast[order.index(place)], learned.fast[place])
        assert same(others.fast[place], learned.fast[place]) == (place != 0)
    assert same(alone.fast[0], learned.fast[1])
    assert same(before, jax.device_get(bench.base.params))


def test_a_task_that_diverges_takes_no_step(bench, learned):
    rows = [list(each) for each in bench.rows["in_context"]]
    # The targets are outside the vocabulary, whose loss is not a number.
    rows[1] = [row._replace(targets=[999] * len(row.targets)) for row in rows[1]]
    made = bench.private.learn(rows, 1e-2)
    first = jax.tree.map(lambda leaf: leaf[1], bench.private.begin(bench.base.params).fast)
    assert same(made.fast[1], [first, first]) and not same(learned.fast[1][0], first)
    assert same(made.fast[0], learned.fast[0]) and same(made.fast[2], learned.fast[2])


def test_long_tasks_have_longer_rows(bench):
    learner = learning.Learner(bench.base, (20, 40), learning.Shape(2, 1, 8, 1))
    rows = [[sequences.Row([0] * size, [0], [0], 0)] for size in (30, 5, 20, 21, 9)]
    assert learner.groups(rows) == [([1, 4], 20), ([2, 3], 40), ([0], 40)]
    arrays = learner.arrays(rows, [0], 40)
    assert arrays["tokens"].shape == (2, 1, 1, 40) and arrays["mask"].sum() == 2


def test_the_program_keeps_every_row(bench, tmp_path, monkeypatch, capsys):
    # The programs that are compiled already serve this run, too.
    monkeypatch.setattr(program, "load_model", lambda _: (bench.base, "random"))
    monkeypatch.setattr(program, "Bench", lambda *_: bench)
    record = program.run(str(tmp_path / "a.json"), settings())
    rows = {row["way"]: row for row in record["rows"]}
    assert list(rows) == ["in_context", "zero_shot", "adapted", "direct", "guarded"]
    assert [about["rule"] for about in record["tasks"].values()] == ["options", "pair", "greedy"]
    assert all(len(bits) == 3 for row in rows.values() for bits in row["bits"].values())
    assert rows["adapted"]["nats"][1] < rows["adapted"]["nats"][0]
    assert set(rows["guarded"]["taken"].values()) <= {0, 2, 4}
    assert rows["in_context"]["summary"]["all"]["gain"][0] == 0.0
    assert "tasks harmed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": ("adapted",)}, r"--ways must have in_context"),
        ({"rates": (1e-3, 1e-2)}, r"--rates must be one value where it is reported; got \(0.001"),
        ({"steps": (0,)}, r"--steps must be larger than 0; got \(0,\)"),
        ({"steps": (6,), "every": 4}, r"--every must divide --steps; got 4 and \(6,\): 6 does"),
        ({"shots": 3}, r"--shots must be at least 4 for two folds; got 3"),
        ({"smoke": False}, r"--data must be a folder of \{task\}.json files; got ''"),
    ],
)
def test_wrong_settings_are_one_sentence(changes, message, tmp_path):
    with pytest.raises(launch.UserError, match=message):
        program.run(str(tmp_path / "a.json"), settings(**changes))

"""document_ttt against slow loops, its controls bit for bit, padding, order and faults."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core.compiling import quickly
from tests.methods import tiny_decoder as tiny
from ttt_jax import methods, models, readers

KEY = jax.random.key(0)
KEYS = ttt.sample_keys(KEY, np.arange(3))
PARAMS, TOKENS, LENGTH, CHUNKS = tiny.PARAMS, tiny.TOKENS, tiny.LENGTH, tiny.CHUNKS
RATE = 0.5
make = functools.partial(methods.document_ttt, select=tiny.DOWN, optimizer=optax.sgd(RATE))


def full_logits(params, tokens):
    """One forward over the whole document: no memory, no chunks."""
    return tiny.decode(params, tokens.reshape(1, -1))[0]


@pytest.fixture(scope="module")
def scores():
    """What document 0 is given by every reader at step size 0 and without a step, and adapted."""
    made = {}
    for name, (read, _) in tiny.READERS.items():
        made[name, "still"] = make(read, optimizer=optax.sgd(0.0))
        made[name, "control"] = make(read, num_steps=0)
        if name != "isolated":
            made[name, "adapted"] = make(read)
    made["recomputed", "two"] = make(tiny.PLAIN, num_steps=2)
    made["recomputed", "bos"] = make(tiny.PLAIN, num_steps=0, bos=5)

    def run(x):
        return {kind: predict(tiny.READERS[kind[0]][1], x, KEY) for kind, predict in made.items()}

    return quickly(run, tiny.document(0))


def with_down(fast):
    return {"params": PARAMS["params"] | {"down": {"kernel": fast}}}


@pytest.mark.parametrize(("kind", "steps"), [("adapted", 1), ("two", 2)])
def test_equals_a_loop_over_whole_prefixes(scores, kind, steps):
    """No reader, no cache, no adapter: autodiff of the nats of a chunk, and SGD by hand."""
    flat = TOKENS[0].reshape(-1)

    def mean_of(fast, chunk):
        logits = jax.nn.log_softmax(full_logits(with_down(fast), flat))
        nats = -jnp.take_along_axis(logits[:-1], flat[1:, None], 1)[:, 0]
        places = jnp.arange(1, flat.size)
        inside = (places // LENGTH == chunk).astype(jnp.float32)
        return (nats * inside).sum() / inside.sum(), nats * inside

    step = jax.jit(jax.value_and_grad(mean_of, has_aux=True))
    fast = PARAMS["params"]["down"]["kernel"]
    rows, losses = [], []
    for chunk in range(CHUNKS):
        for inner in range(steps):
            (loss, nats), grad = step(fast, chunk)
            losses.append(loss)
            if inner == 0:
                rows.append(np.concatenate([[0.0], nats])[chunk * LENGTH :][:LENGTH])
            fast = fast - RATE * grad
    output, info = scores["recomputed", kind]
    np.testing.assert_allclose(output, rows, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(info.loss, losses, rtol=2e-4)
    assert np.abs(output - scores["recomputed", "control"][0])[1:].max() > 0.05


def test_equals_a_loop_with_a_cache(scores):
    """Keys of older weights, through which no gradient goes: one chunk after the other."""
    flat = TOKENS[0].reshape(-1)
    inputs = np.concatenate([[0], flat[:-1]]).reshape(CHUNKS, LENGTH)
    positions = np.arange(-1, flat.size - 1).reshape(CHUNKS, LENGTH)

    layers = tiny.MODULE_PARAMS["params"]["layers"]

    @jax.jit
    def step(fast, cache, tokens, places, targets):
        def mean_of(fast):
            mlp = layers["mlp"] | {"down": {"kernel": fast}}
            params = tiny.MODULE_PARAMS["params"] | {"layers": layers | {"mlp": mlp}}
            given = {"tokens": tokens[None], "positions": places[None]}
            logits, after = tiny.MODULE.apply({"params": params}, given, cache)
            logits = jax.nn.log_softmax(logits[0])
            nats = -jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
            counted = jnp.where(places >= 0, nats, 0)
            return counted.sum() / (places >= 0).sum(), (counted, after)

        (_, (nats, after)), grad = jax.value_and_grad(mean_of, has_aux=True)(fast)
        return nats, after, fast - RATE * grad

    cache = tiny.MODULE.empty_cache(1, flat.size, LENGTH)
    fast = layers["mlp"]["down"]["kernel"]
    rows = []
    for chunk in range(CHUNKS):
        nats, cache, fast = step(fast, cache, inputs[chunk], positions[chunk], TOKENS[0, chunk])
        rows.append(nats)
    np.testing.assert_allclose(scores["cached", "adapted"][0], rows, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", tiny.READERS)
def test_step_size_zero_is_the_control_bit_for_bit(scores, name):
    (still, moved), (control, info) = scores[name, "still"], scores[name, "control"]
    np.testing.assert_array_equal(still, control)
    assert moved.loss.shape == (CHUNKS,) and info.loss.shape == (0,)
    assert not moved.updated and not info.updated and moved.ok and info.ok
    np.testing.assert_allclose(moved.loss[1:], control[1:].mean(1), rtol=1e-5)


def test_readers_agree_where_the_window_covers_the_document(scores):
    def both(tokens):
        cached = tiny.MODULE.apply(tiny.MODULE_PARAMS, tokens.reshape(1, -1))[0]
        return {"cached": cached, "recomputed": full_logits(PARAMS, tokens)}

    for name, logits in quickly(both, TOKENS[0]).items():
        output = scores[name, "control"][0].reshape(-1)
        assert output[0] == 0, "without bos the first token has no score"
        expected = tiny.nats_of(logits[:-1], TOKENS[0].reshape(-1)[1:])
        np.testing.assert_allclose(output[1:], expected, rtol=1e-4, atol=1e-5)


def test_isolated_windows_see_their_predecessor_and_themselves(scores):
    flat = TOKENS[0].reshape(-1)
    first = quickly(full_logits, PARAMS, flat[: LENGTH - 1])
    output = scores["isolated", "control"][0]
    np.testing.assert_allclose(
        output[0, 1:], tiny.nats_of(first, flat[1:LENGTH]), rtol=1e-4, atol=1e-5
    )
    third = quickly(full_logits, PARAMS, flat[2 * LENGTH - 1 : 3 * LENGTH - 1])
    np.testing.assert_allclose(output[2], tiny.nats_of(third, TOKENS[0, 2]), rtol=1e-4, atol=1e-5)


def test_bos_is_read_and_not_scored(scores):
    flat = TOKENS[0].reshape(-1)
    logits = quickly(full_logits, PARAMS, np.concatenate([[5], flat]).astype(np.int32))
    expected = tiny.nats_of(logits[:-1], flat)
    output = scores["recomputed", "bos"][0].reshape(-1)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def company():
    """``run(documents, keys)``, with a window and sinks: padding moves no slot of the cache."""
    module = tiny.MODULE.clone(window=8, sinks=2)
    predict = make(models.reader(module), optimizer=optax.adam(0.05))
    return jax.jit(lambda xs, keys: ttt.batched(predict)(tiny.MODULE_PARAMS, xs, keys))


def test_order_and_company_change_no_bit(company):
    """Every document is fresh: nothing of another one is left in its weights or its cache."""
    order = np.array([2, 0, 1])
    output, info = company(tiny.DOCUMENTS, KEYS)
    again = company(jax.tree.map(lambda leaf: leaf[order], tiny.DOCUMENTS), KEYS[order])
    jax.tree.map(
        lambda other, own: np.testing.assert_array_equal(other, own[order]), again, (output, info)
    )
    same = {name: np.stack([leaf[0]] * 3) for name, leaf in tiny.DOCUMENTS.items()}
    for row in company(same, KEYS)[0]:
        np.testing.assert_array_equal(row, output[0])
    assert info.updated.all() and info.ok.all()


def test_documents_of_unequal_length_side_by_side():
    """Half of a document, in the company of whole ones and of padding, is that half alone."""
    predict = make(readers.recomputed(tiny.decode, context=8))
    half = CHUNKS // 2
    tokens, mask = TOKENS.copy(), np.ones(TOKENS.shape, np.float32)
    tokens[1, half:], mask[1, half:] = 0, 0
    tokens[1, half - 1, -2:], mask[1, half - 1, -2:] = 7, 0

    def run(xs, keys):
        short = {name: leaf[1, :half] for name, leaf in xs.items()}
        return ttt.batched(predict)(PARAMS, xs, keys), predict(PARAMS, short, keys[1])

    (output, info), (alone, alone_info) = quickly(run, {"tokens": tokens, "mask": mask}, KEYS)
    np.testing.assert_allclose(output[1, :half], alone, rtol=1e-5, atol=1e-6)
    assert (output[1, half:] == 0).all() and (alone[-1, -2:] == 0).all()
    np.testing.assert_allclose(info.loss[1, :half], alone_info.loss, rtol=1e-5)
    assert (info.loss[1, half:] == 0).all() and (info.grad_norm[1, half:] == 0).all()


def test_padding_between_documents_is_read_by_nothing():
    """In one row, the first with padding in its last chunk: its tokens change no bit."""
    tokens, mask = TOKENS[:2].reshape(-1, LENGTH), np.ones((2 * CHUNKS, LENGTH), bool)
    mask[CHUNKS - 1, 2:] = False
    x = {"tokens": tokens, "mask": mask, "start": np.arange(2 * CHUNKS) % CHUNKS == 0}
    other = tokens.copy()
    other[CHUNKS - 1, 2:] = (tokens[CHUNKS - 1, 2:] + 1) % tiny.VOCABULARY

    def run(x, other):
        predict = make(tiny.PLAIN, bos=3)
        alone = {name: x[name][CHUNKS:] for name in ("tokens", "mask")}
        both = predict(PARAMS, x, KEY), predict(PARAMS, {**x, "tokens": other}, KEY)
        return *both, predict(PARAMS, alone, KEY)[0]

    result, changed, alone = quickly(run, x, other)
    jax.tree.map(np.testing.assert_array_equal, changed, result)
    np.testing.assert_allclose(result[0][CHUNKS:], alone, rtol=1e-5, atol=1e-6)
    assert (result[0][CHUNKS - 1, 2:] == 0).all() and (result[0][CHUNKS - 1, :2] > 0).all()


def test_padding_to_twice_the_length_changes_no_bit(company):
    """Scores, losses and gradients, whatever tokens the padding has."""
    pads = np.random.default_rng(3).integers(tiny.VOCABULARY, size=(2, 3, CHUNKS, LENGTH))
    mask = np.concatenate([tiny.DOCUMENTS["mask"], np.zeros(TOKENS.shape, np.float32)], 1)
    output, info = company(tiny.DOCUMENTS, KEYS)
    for pad in pads.astype(np.int32):
        padded = {"tokens": np.concatenate([TOKENS, pad], 1), "mask": mask}
        longer, longer_info = company(padded, KEYS)
        np.testing.assert_array_equal(longer[:, :CHUNKS], output)
        for name in ("loss", "grad_norm"):
            left, right = getattr(longer_info, name), getattr(info, name)
            np.testing.assert_array_equal(left[:, :CHUNKS], right)
            assert (np.asarray(left)[:, CHUNKS:] == 0).all()


def test_a_chunk_that_is_not_scored_is_read_and_not_learned_from():
    """A prompt changes what follows by the cache alone; weights, moments and count stay."""
    predict, control = make(tiny.PLAIN), make(tiny.PLAIN, num_steps=0)
    mask = np.ones(TOKENS[0].shape, bool)
    mask[0] = False

    def run(x):
        return predict(PARAMS, x, KEY), control(PARAMS, x, KEY)[0]

    (output, info), plain = quickly(run, {"tokens": TOKENS[0], "mask": mask})
    assert info.loss[0] == 0 and info.grad_norm[0] == 0 and (output[0] == 0).all()
    np.testing.assert_array_equal(output[1], plain[1])
    assert np.abs(output[2] - plain[2]).max() > 1e-3
    nats = quickly(lambda x: control(PARAMS, x, KEY)[0], TOKENS[0])
    np.testing.assert_array_equal(plain[1:], nats[1:])


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_broken_chunk_is_neither_learned_from_nor_remembered(num_steps):
    """Token 12 has a nan embedding; the other chunks are as if its chunk had not been there."""
    table = PARAMS["params"]["embedding"].at[12].set(jnp.nan)
    broken = {"params": PARAMS["params"] | {"embedding": table}}
    predict = make(tiny.PLAIN, num_steps=num_steps)
    tokens = np.where(TOKENS[:2] == 12, 0, TOKENS[:2])
    tokens[0, 1, 2] = 12

    def run(xs):
        return ttt.batched(predict)(broken, {"tokens": xs}, KEYS[:2])

    output, info = quickly(run, tokens)
    clean = tokens.copy()
    clean[0, 1, 2] = 0
    expected, whole = quickly(run, clean)
    assert list(info.ok) == [False, True] and whole.ok.all()
    assert np.isnan(output[0, 1]).any() and np.isfinite(output[0, [0, 2, 3]]).all()
    np.testing.assert_array_equal(output[0, 0], expected[0, 0])
    np.testing.assert_array_equal(output[1], expected[1])
    assert np.abs(output[0, 2] - expected[0, 2]).max() > 1e-3, "chunk 1 was not remembered"


def test_a_chunk_of_a_negative_weight_is_not_learned_from():
    """It would be unlearned: the step would climb."""
    mask = np.ones(TOKENS[0].shape, np.float32)
    mask[1, 2] = -1.0
    run = jax.jit(make(tiny.PLAIN))
    nats, info = run(PARAMS, {"tokens": TOKENS[0], "mask": mask}, KEY)
    assert not info.ok and np.isfinite(nats).all()
    mask[1, 2] = 0.0
    assert run(PARAMS, {"tokens": TOKENS[0], "mask": mask}, KEY)[1].ok


BAD = {
    "rank": (TOKENS, r"integer tokens \[T, L\].*got shape \(3, 4, 6\)"),
    "dtype": (TOKENS[0].astype(np.float32), "integer tokens.*float32"),
    "mask": ({"tokens": TOKENS[0], "mask": np.ones(LENGTH)}, r"mask shaped.*\(4, 6\); got \(6,\)"),
    "leaves": (
        {"tokens": TOKENS[0], "label": 1},
        r"'tokens' and.*'mask'; got \['label', 'tokens'\]",
    ),
    "none": ({"text": "a"}, r"'tokens'.*got \['text'\]"),
    "empty": (TOKENS[0][:0], r"at least one chunk of at least one token; got shape \(0, 6\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_documents(case):
    x, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        make(tiny.PLAIN)(PARAMS, x, KEY)


def test_bad_arguments():
    words = re.escape("read must be a Reader; got a Decoder: make one with models.reader(module)")
    with pytest.raises(TypeError, match=words):
        methods.document_ttt(tiny.MODULE)
    with pytest.raises(ValueError, match="num_steps"):
        make(tiny.PLAIN, num_steps=-1)
    with pytest.raises(ValueError, match="bos"):
        make(tiny.PLAIN, bos=-2)
    with pytest.raises(TypeError, match="apply"):
        readers.isolated(tiny.MODULE)
    with pytest.raises(ValueError, match="context"):
        readers.recomputed(tiny.MODULE.apply, context=0)


def test_documents_one_after_another_are_each_alone(scores):
    """Three documents in one row, with starts, score as each does by itself."""
    names = [("cached", "adapted"), ("cached", "control")]
    read, params = tiny.READERS["cached"]
    ways = {"adapted": make(read), "control": make(read, num_steps=0)}
    row = {
        "tokens": jnp.concatenate([tiny.document(index)["tokens"] for index in (1, 0)]),
        "mask": jnp.concatenate([tiny.document(index)["mask"] for index in (1, 0)]),
        "start": jnp.arange(2 * CHUNKS) % CHUNKS == 0,
    }
    made = quickly(lambda x: {n: ways[n[1]](params, x, KEY)[0] for n in names}, row)
    for name in names:
        np.testing.assert_allclose(made[name][CHUNKS:], scores[name][0], rtol=1e-5, atol=1e-6)
        assert made[name][CHUNKS, 0] == 0  # the first token of a document has no score
    unmarked = {name: leaf for name, leaf in row.items() if name != "start"}
    leaked = quickly(lambda x: ways["adapted"](params, x, KEY)[0], unmarked)
    assert np.abs(leaked[CHUNKS:] - made["cached", "adapted"][CHUNKS:]).max() > 1e-3
    with pytest.raises(ValueError, match="a bool per chunk"):
        ways["control"](params, row | {"start": jnp.zeros(3, bool)}, KEY)

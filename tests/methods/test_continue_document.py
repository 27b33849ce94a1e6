"""Learning from a document, then continuing it: against updates and generation taken apart."""

import jax
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import small_reader
from ttt_jax import generation, losses, methods, select

CHUNKS, LENGTH, TOKENS = 3, 4, 5
KEYS = ttt.sample_keys(jax.random.key(2), np.arange(2))
RNG = np.random.default_rng(0)
DOCUMENTS = RNG.integers(0, small_reader.VOCABULARY, (2, CHUNKS, LENGTH)).astype(np.int32)
PROMPT = RNG.integers(0, small_reader.VOCABULARY, (2, 3)).astype(np.int32)
MASK = np.ones(DOCUMENTS.shape, bool)
MASK[1, -1, 2:] = False
READ, PARAMS = small_reader.READER, small_reader.draw_params()
LEARN = {"optimizer": optax.adam(0.05), "num_steps": 1}


@pytest.fixture(scope="module")
def adapters():
    """What the two documents leave, and the info of it."""
    predict = methods.document_adapter(READ, **LEARN)
    return jax.jit(ttt.batched(predict))(PARAMS, {"tokens": DOCUMENTS, "mask": MASK}, KEYS)


@jax.jit
def step_by_hand(fast, opt_state, memory, inputs, targets):
    def score(fast):
        full = select.lora().merge(fast, select.lora().split(PARAMS)[1])
        logits, after = small_reader.read(full, memory, inputs)
        return losses.tokens.token_nats(logits[0], targets).mean(), after

    grads, memory = jax.grad(score, has_aux=True)(fast)
    updates, opt_state = LEARN["optimizer"].update(grads, opt_state, fast)
    return optax.apply_updates(fast, updates), opt_state, memory


@pytest.mark.parametrize("row", [0, 1])
def test_the_adapter_is_that_of_a_loop_by_hand(row, adapters):
    """Chunk by chunk with the memory passed on, padding left out."""
    document = DOCUMENTS[row].reshape(-1)[MASK[row].reshape(-1)]
    fast = select.lora().split(PARAMS)[0]
    state = fast, LEARN["optimizer"].init(fast), small_reader.init(1, 20, LENGTH)
    for first in range(0, len(document), LENGTH):
        # Token t is read to predict token t + 1; the first has no predecessor.
        places = np.arange(max(first - 1, 0), min(first + LENGTH, len(document)) - 1)
        inputs = {"tokens": document[None, places], "positions": places[None]}
        state = step_by_hand(*state, inputs, document[places + 1])
    found = jax.tree.map(lambda leaf: leaf[row], adapters[0])
    assert jax.tree.structure(found) == jax.tree.structure(state[0])
    ttt.audit.require_close(found, state[0], num_steps=CHUNKS)
    assert adapters[1].loss.shape == (2, CHUNKS) and adapters[1].updated.all()


@pytest.fixture(scope="module")
def fresh_cache(adapters):
    """Generation after the document and the prompt, under its adapter, from an empty cache."""
    wide = np.zeros((2, CHUNKS * LENGTH + 3), np.int32)
    mask = np.zeros(wide.shape, bool)
    for row in range(2):
        document = DOCUMENTS[row].reshape(-1)[MASK[row].reshape(-1)]
        joined = np.concatenate([document, PROMPT[row]])
        wide[row, : len(joined)], mask[row, : len(joined)] = joined, True
    predict = ttt.adapted(generation.generate(READ, num_tokens=TOKENS), select=select.lora())
    x = {"tokens": wide, "mask": mask}
    return jax.jit(ttt.batched(predict))(PARAMS, (adapters[0], x), KEYS)[0]


X = {"tokens": DOCUMENTS, "mask": MASK, "prompt": PROMPT}


def run(x=X, **settings):
    predict = methods.continue_document(READ, num_tokens=TOKENS, **(LEARN | settings))
    return jax.jit(ttt.batched(predict))(PARAMS, x, KEYS)


def test_a_recomputed_cache_has_no_key_of_an_older_adapter(fresh_cache):
    made, info = run()
    np.testing.assert_array_equal(made.tokens, fresh_cache.tokens)
    np.testing.assert_allclose(made.nats, fresh_cache.nats, rtol=1e-4, atol=1e-5)
    assert info.loss.shape == (2, CHUNKS) and info.ok.all() and info.updated.all()


def test_a_kept_cache_is_another_one_and_says_so(fresh_cache):
    made, _ = run(cache="kept")
    assert np.abs(made.nats - fresh_cache.nats).max() > 1e-3
    # Without an update no key is older than another.
    kept, recomputed = (run(cache=cache, num_steps=0)[0] for cache in ("kept", "recomputed"))
    np.testing.assert_array_equal(kept.tokens, recomputed.tokens)
    np.testing.assert_allclose(kept.nats, recomputed.nats, rtol=1e-4, atol=1e-5)


def test_an_empty_cache_leaves_the_adapter_alone(adapters):
    made, _ = run(cache="empty")
    predict = ttt.adapted(generation.generate(READ, num_tokens=TOKENS), select=select.lora())
    due, _ = jax.jit(ttt.batched(predict))(PARAMS, (adapters[0], PROMPT), KEYS)
    np.testing.assert_array_equal(made.tokens, due.tokens)
    np.testing.assert_allclose(made.nats, due.nats, rtol=1e-4, atol=1e-5)


def test_generating_before_and_after_learning_uses_no_key_twice(fresh_cache):
    """Generate, adapt, generate, in one program: the last is as if nothing had come before."""
    generate = generation.generate(READ, num_tokens=TOKENS)
    learn = methods.continue_document(READ, num_tokens=TOKENS, **LEARN)

    def both(params, x, key):
        first, _ = generate(params, x["prompt"], key)
        second, info = learn(params, x, key)
        return (first, second), info

    (first, second), _ = jax.jit(ttt.batched(both))(PARAMS, X, KEYS)
    np.testing.assert_array_equal(second.tokens, fresh_cache.tokens)
    np.testing.assert_allclose(second.nats, fresh_cache.nats, rtol=1e-4, atol=1e-5)
    alone, _ = jax.jit(ttt.batched(generate))(PARAMS, PROMPT, KEYS)
    np.testing.assert_array_equal(first.tokens, alone.tokens)


@pytest.mark.parametrize("bos", [None, 1])
def test_without_a_prompt_the_document_itself_goes_on(bos):
    """Also of unequal length, and with a token before the first; nothing is learned here."""
    x = {"tokens": DOCUMENTS, "mask": MASK}
    made, _ = run(x, num_steps=0, bos=bos, cache="kept")
    begins = [] if bos is None else [bos]
    predict = jax.jit(generation.generate(READ, num_tokens=TOKENS))
    for row in range(2):
        document = DOCUMENTS[row].reshape(-1)[MASK[row].reshape(-1)]
        wide = np.zeros(CHUNKS * LENGTH + 1, np.int32)
        joined = np.concatenate([begins, document]).astype(np.int32)
        wide[: len(joined)] = joined
        x = {"tokens": wide, "mask": np.arange(len(wide)) < len(joined)}
        due, _ = predict(PARAMS, x, KEYS[row])
        np.testing.assert_array_equal(made.tokens[row], due.tokens)
        np.testing.assert_allclose(made.nats[row], due.nats, rtol=1e-4, atol=1e-5)


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match=r"cache must be one of .*got 'stale'"):
        methods.continue_document(READ, num_tokens=2, cache="stale")
    with pytest.raises(ValueError, match=r"num_steps of methods.document_adapter must be at least"):
        methods.document_adapter(READ, num_steps=0)
    learn = methods.continue_document(READ, num_tokens=2, cache="empty")
    document = {"tokens": DOCUMENTS[0], "mask": MASK[0]}
    for x, sentence in (
        (document, "cache='empty' needs x with a 'prompt'"),
        ({"prompt": PROMPT[0]}, r"needs a document with 'tokens'.*got \[\]"),
        ({**document, "tokens": DOCUMENTS[0, 0]}, r"tokens \[T, L\]"),
        ({**document, "mask": MASK[0, 0]}, "mask shaped as its tokens"),
        ({**document, "prompt": PROMPT}, r"one prompt \[P\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            learn(PARAMS, x, KEYS[0])

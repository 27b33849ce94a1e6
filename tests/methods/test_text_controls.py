"""A decoder trained here for seconds: its controls are in their order, and adapting helps.

Its language is a chain in which the last two tokens say what likely comes next. Every document
of test is of a dialect, in which some pairs are followed by another token.
"""

import jax
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, methods, models, readers, select

VOCABULARY, TRAINED, WINDOW, SINKS = 8, 32, 16, 2
MODULE = models.Decoder(
    vocabulary=VOCABULARY, width=24, depth=2, heads=2, mlp_width=48, context=TRAINED
)
ROLLING = MODULE.clone(window=WINDOW, sinks=SINKS)
DOWN = select.paths(".*mlp/down/kernel")
DOCUMENTS, TOKENS = 4, 256


def language(seed):
    """Probabilities ``[V, V, V]`` of the next token: one has 0.9."""
    best = np.random.default_rng(seed).integers(VOCABULARY, size=(VOCABULARY, VOCABULARY))
    return 0.9 * np.eye(VOCABULARY)[best] + 0.1 / VOCABULARY


def dialect(seed):
    """The language with a fifth of its rows from another one."""
    changed = np.random.default_rng(seed).uniform(size=(VOCABULARY, VOCABULARY, 1)) < 0.2
    return np.where(changed, language(seed), language(0))


def speak(rows, count, length, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCABULARY, size=(count, length)).astype(np.int32)
    totals = rows.cumsum(-1)
    for place in range(2, length):
        likely = totals[tokens[:, place - 2], tokens[:, place - 1]]
        tokens[:, place] = (rng.uniform(size=(count, 1)) > likely).sum(-1)
    return tokens


@pytest.fixture(scope="module")
def params():
    loss = losses.next_token(MODULE.apply, batch=True)
    batches = speak(language(0), 250 * 16, TRAINED, 1).reshape(250, 16, TRAINED)
    optimizer = optax.adam(1e-2)

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch, jax.random.key(0))
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def train(key):
        params = MODULE.init(key, batches[0, :, :4])
        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return params, values

    params, values = train(jax.random.key(0))
    # The entropy of a row is 0.52 nats, of a token at random 2.08.
    assert values[-10:].mean() < 1.0 < values[:10].mean()
    return params


@pytest.fixture(scope="module")
def scores(params):
    """Nats ``[N, T, L]`` of the documents under every control, and adapted."""
    tokens = np.concatenate([speak(dialect(seed), 1, TOKENS, seed) for seed in (11, 12, 13, 14)])
    read = models.reader(ROLLING)

    def chunked(length):
        return tokens.reshape(DOCUMENTS, -1, length)

    def score(params, read, length, **options):
        predict = methods.document_ttt(read, select=DOWN, **options)
        keys = ttt.sample_keys(jax.random.key(0), np.arange(DOCUMENTS))
        return ttt.batched(predict)(params, chunked(length), keys)[0]

    @jax.jit
    def run(params):
        half = WINDOW // 2
        return {
            "isolated": score(params, readers.isolated(MODULE.apply), WINDOW, num_steps=0),
            "sinks": score(params, read, half, num_steps=0),
            "still": score(params, read, half, optimizer=optax.adam(0.0)),
            "adapted": score(params, read, half, optimizer=optax.adam(1e-2)),
        }

    made = jax.device_get(run(params))
    return {name: nats.reshape(DOCUMENTS, TOKENS) for name, nats in made.items()}


def test_a_window_with_sinks_is_never_worse_than_isolated_windows(scores):
    """Of the same length, on any document: a rolling cache that lost its sinks could be."""
    isolated, sinks = scores["isolated"].mean(1), scores["sinks"].mean(1)
    assert (sinks < isolated).all(), (sinks, isolated)
    # Where an isolated window begins, it has one token to go by.
    first = scores["isolated"].reshape(DOCUMENTS, -1, WINDOW)[:, 1:, 0]
    same = scores["sinks"].reshape(DOCUMENTS, -1, WINDOW)[:, 1:, 0]
    assert first.mean() > same.mean() + 0.1


def test_step_size_zero_is_the_control_bit_for_bit(scores):
    np.testing.assert_array_equal(scores["still"], scores["sinks"])


def test_adapting_learns_the_dialect(scores):
    """Against the control with the same window, on every document, and more the later."""
    saved = (scores["sinks"] - scores["adapted"]).reshape(DOCUMENTS, 4, -1).mean(-1)
    assert (saved.mean(1) > 0).all() and saved[:, 3].mean() > 0.02 + saved[:, 0].mean(), saved

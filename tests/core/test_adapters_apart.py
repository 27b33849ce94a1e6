"""Adapters side by side share a base and nothing else: each goes as if it were alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import small_reader
from ttt_jax import losses, methods, models, optimizers, select
from ttt_jax.methods.document_ttt import chunks_of, learning_stream

COUNT, CHUNKS, LENGTH = 3, 2, 4
READ, PARAMS = small_reader.READER, small_reader.draw_params()
SELECT = select.lora()
DOCUMENTS = np.random.default_rng(1).integers(0, 15, (COUNT, CHUNKS, LENGTH)).astype(np.int32)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(COUNT))
FAST = jax.tree.map(lambda leaf: jnp.stack([leaf] * COUNT), SELECT.split(PARAMS)[0])
ADAMW, SGD = 0, 1
SETTINGS = {
    "step_size": jnp.array([0.05, 0.02, 0.1]),
    "decay": jnp.array([0.0, 0.1, 0.5]),
    "optimizer": jnp.array([ADAMW, ADAMW, SGD]),
}


def one(params, settings, fast, document, key):
    """Learns one document with settings of its own, all of them traced."""
    adamw = optax.adamw(settings["step_size"], weight_decay=settings["decay"])
    sgd = optax.sgd(settings["step_size"], momentum=0.9)
    optimizer = optimizers.chosen(settings["optimizer"], adamw, sgd)
    learn = methods.document_adapter(READ, optimizer=optimizer)
    return ttt.adapted(learn, select=SELECT)(params, (fast, document), key)


many = jax.jit(jax.vmap(one, (None, 0, 0, 0, 0)))
ROWS = (SETTINGS, FAST, DOCUMENTS, KEYS)


@functools.cache
def together():
    return jax.device_get(many(PARAMS, *ROWS))


def rows_of(tree, places):
    return jax.tree.map(lambda leaf: leaf[np.asarray(places)], tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def changed(place, **settings):
    return SETTINGS | {name: SETTINGS[name].at[place].set(v) for name, v in settings.items()}


def broken_row():
    return jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), FAST)


NEIGHBORS = {
    "nan": (SETTINGS, broken_row(), DOCUMENTS, KEYS),
    "weight decay": (changed(1, decay=3.0), *ROWS[1:]),
    "step size": (changed(1, step_size=1.0), *ROWS[1:]),
    "optimizer": (changed(1, optimizer=SGD), *ROWS[1:]),
    "document": (*ROWS[:2], np.concatenate([DOCUMENTS[:1], DOCUMENTS[:1], DOCUMENTS[2:]]), KEYS),
}


@pytest.mark.parametrize("what", NEIGHBORS)
def test_what_one_does_its_neighbors_never_notice(what):
    fast, info = jax.device_get(many(PARAMS, *NEIGHBORS[what]))
    assert_equal(rows_of((fast, info), [0, 2]), rows_of(together(), [0, 2]))
    due = together()[0]["params"]["key_lora_b"][1]
    assert (fast["params"]["key_lora_b"][1] != due).any()
    assert info.ok[1] == (what != "nan") and info.ok[[0, 2]].all()


def test_the_order_is_of_no_consequence():
    order = [2, 0, 1]
    found = jax.device_get(many(PARAMS, *rows_of(ROWS, order)))
    assert_equal(found, rows_of(together(), order))


def test_many_at_once_are_each_alone_and_leave_the_base():
    before = jax.tree.map(np.array, PARAMS)
    alone = [jax.device_get(many(PARAMS, *rows_of(ROWS, [place]))) for place in range(COUNT)]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *alone)
    ttt.audit.require_close(joined, together(), num_steps=CHUNKS)
    assert together()[1].updated.all()
    assert_equal(before, jax.device_get(PARAMS))


@pytest.mark.parametrize("place", [0, 2])
def test_the_chosen_optimizer_is_that_optimizer(place):
    size, decay = float(SETTINGS["step_size"][place]), float(SETTINGS["decay"][place])
    optimizer = (
        optax.sgd(size, momentum=0.9) if place == 2 else optax.adamw(size, weight_decay=decay)
    )
    learn = jax.jit(methods.document_adapter(READ, optimizer=optimizer))
    found, _ = learn(PARAMS, DOCUMENTS[place], KEYS[place])
    ttt.audit.require_close(found, rows_of(together()[0], place), num_steps=CHUNKS)


def test_an_index_is_known_or_cut():
    pair = optax.sgd(1.0), optax.sgd(10.0)
    with pytest.raises(ValueError, match=r"index must be from 0 to 1.*got 2"):
        optimizers.chosen(2, *pair)
    with pytest.raises(ValueError, match=r"must be at least one; got \(\)"):
        optimizers.chosen(0)

    def update(index):
        optimizer = optimizers.chosen(index, *pair)
        return optimizer.update(jnp.ones(()), optimizer.init(jnp.ones(())))[0]

    np.testing.assert_array_equal(jax.vmap(update)(jnp.array([-1, 0, 1, 7])), [-1, -1, -10, -10])


def test_a_padded_rank_makes_the_same_updates_beside_any_other():
    """Rank 1 padded to 2, in one batch with rank 2; the factor alpha / rank is 1 in both."""
    narrow = small_reader.draw_params(rank=1)
    learn = jax.jit(methods.document_adapter(READ, optimizer=optax.adamw(0.05, weight_decay=0.1)))
    due, info = learn(narrow, DOCUMENTS[1], KEYS[1])
    wide = models.pad_rank(SELECT.split(narrow)[0], small_reader.RANK)
    fast = jax.tree.map(lambda leaf, row: leaf.at[1].set(row), FAST, wide)
    settings = changed(1, step_size=0.05, decay=0.1)
    found, infos = jax.device_get(many(PARAMS, settings, fast, DOCUMENTS, KEYS))
    ttt.audit.require_close(
        rows_of(found, 1), models.pad_rank(due, small_reader.RANK), num_steps=CHUNKS
    )
    np.testing.assert_allclose(infos.loss[1], info.loss, rtol=1e-5)
    assert (found["params"]["key_lora_a"][1, :, 1] == 0).all()
    assert (found["params"]["key_lora_b"][1, 1] == 0).all()
    assert_equal(rows_of(found, [0, 2]), rows_of(together()[0], [0, 2]))


LOSS = losses.next_token(small_reader.model)
ADAPTER = ttt.gradient_adapter(LOSS, optax.adam(0.05), select=SELECT)
TOKENS = DOCUMENTS.reshape(COUNT, -1)
step = jax.jit(ADAPTER.step)


def steps(places, states):
    """Steps on these documents in this order, each with the state of its own document."""
    for place in places:
        states[place], _ = step(PARAMS, states[place], TOKENS[place], KEYS[place])
    return states


def test_interleaved_steps_are_those_of_separate_runs():
    start = {0: ADAPTER.init(PARAMS), 1: ADAPTER.init(PARAMS)}
    mixed = steps([0, 1, 1, 0, 1, 0], dict(start))
    apart = steps([1, 1, 1], steps([0, 0, 0], dict(start)))
    assert_equal(mixed, apart)
    assert int(mixed[0].count) == 3 and (mixed[0].fast["params"]["key_lora_b"] != 0).any()


def test_a_fresh_adapter_steps_against_its_own_gradient_after_any_history():
    state, params = ADAPTER.init(PARAMS), PARAMS
    for _ in range(3):
        state, _ = step(PARAMS, state, TOKENS[0], KEYS[0])
    fresh, _ = step(params, ADAPTER.init(params), TOKENS[1], KEYS[1])
    fast, frozen = SELECT.split(params)
    grads = jax.grad(lambda fast: LOSS(SELECT.merge(fast, frozen), TOKENS[1], KEYS[1]))(fast)
    for moved, leaf, grad in zip(*map(jax.tree.leaves, (fresh.fast, fast, grads)), strict=True):
        due = np.where(np.abs(grad) > 1e-5, -0.05 * np.sign(grad), np.asarray(moved - leaf))
        np.testing.assert_allclose(moved - leaf, due, rtol=1e-3, atol=1e-6)
    assert np.abs(grads["params"]["key_lora_b"]).max() > 1e-5
    # The moments of the history would have given another step.
    stale, _ = step(params, state._replace(fast=fast), TOKENS[1], KEYS[1])
    assert (
        np.abs(stale.fast["params"]["key_lora_b"] - fresh.fast["params"]["key_lora_b"]).max() > 1e-3
    )


def test_a_skipped_document_leaves_no_trace():
    wanted = ttt.filtered(ADAPTER, lambda params, x, key: x[0] < 0)
    state = steps([0], {0: ADAPTER.init(PARAMS)})[0]
    after, info = jax.jit(wanted.step)(PARAMS, state, TOKENS[1], KEYS[1])
    assert_equal(after, state)
    assert info.finite and info.loss == 0


def test_a_chunk_that_is_not_finite_leaves_no_trace_in_the_cache_either():
    """Token 15, which no document has, is broken in the base."""
    embedding = PARAMS["params"]["embedding"].at[15].set(jnp.nan)
    stream = learning_stream(READ, (CHUNKS * LENGTH, LENGTH), optax.adam(0.05), SELECT, 1)
    broken = {"params": PARAMS["params"] | {"embedding": embedding}}
    document = np.array([[1, 2, 3, 4], [5, 15, 6, 7]], np.int32)
    chunks = chunks_of(jnp.asarray(document), jnp.ones(document.shape), None)
    read = jax.jit(stream.step)
    # The head is the embedding, too: the first chunk is read with the base that is whole.
    first, _ = read(PARAMS, stream.init(PARAMS), rows_of(chunks, 0), KEYS[0])
    after, (_, info) = read(broken, first, rows_of(chunks, 1), KEYS[0])
    assert_equal(after, first)
    assert not info.ok and not info.updated and int(first.count) == 1


def test_an_adapter_that_was_on_the_host_goes_on_bitwise():
    state = steps([0, 0], {0: ADAPTER.init(PARAMS)})[0]
    parked = jax.device_get(state)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(parked))
    compiled = step._cache_size()
    back = jax.device_put(parked)
    assert_equal(steps([0, 0], {0: back})[0], steps([0, 0], {0: state})[0])
    assert step._cache_size() == compiled, "it was compiled again"

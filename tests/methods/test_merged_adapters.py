"""Adapters of clusters, trained at once as one by one, and their mean by likeness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core.compiling import quickly
from tests.methods import tiny_decoder as tiny
from ttt_jax import audit, methods, passages

KEY, PARAMS = jax.random.key(0), tiny.PARAMS
RNG = np.random.default_rng(6)
POOL = {
    "tokens": RNG.integers(tiny.VOCABULARY, size=(10, 7)).astype(np.int32),
    "mask": np.ones((10, 7), np.float32),
}
SETS = passages.in_clusters(POOL, np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2]), size=3)
CENTERS = np.eye(3, 5, dtype=np.float32) * 0.6 + 0.8 * np.eye(3, 5, 1, dtype=np.float32)
KEYS = ttt.sample_keys(KEY, np.arange(3))
train = functools.partial(
    methods.passages_adapter, tiny.PLAIN, optimizer=optax.adam(0.05), select=tiny.DOWN
)


def features(params, x):
    """Five numbers of a passage: shares of the tokens by their remainder."""
    tokens = jax.nn.one_hot(x["tokens"] % 5, 5) * x["mask"][..., None]
    return tokens.sum(1)


@pytest.fixture(scope="module")
def adapters():
    return quickly(lambda sets: ttt.batched(train(num_epochs=2))(PARAMS, sets, KEYS), SETS)


def test_trained_at_once_equals_one_by_one(adapters):
    fast, info = adapters
    for index in range(3):
        x = {name: leaf[index] for name, leaf in SETS.items()}
        alone, own = quickly(lambda x: train(num_epochs=2)(PARAMS, x, KEY), x)
        own_kernel = alone["params"]["down"]["kernel"]
        kernel = fast["params"]["down"]["kernel"][index]
        np.testing.assert_allclose(kernel, own_kernel, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(info.loss[index], own.loss, rtol=1e-4)
    assert fast["params"]["embedding"] is None
    losses = info.loss.reshape(3, 2, 3)
    assert (losses[:, 1].mean(-1) < losses[:, 0].mean(-1)).all(), "a second epoch knows the first"


def test_padding_teaches_nothing(adapters):
    longer = passages.in_clusters(POOL, np.array([0] * 3 + [1] * 4 + [2] * 3), size=5)
    x = {name: leaf[0] for name, leaf in longer.items()}
    order = [list(map(tuple, SETS["tokens"][0])).index(tuple(row)) for row in x["tokens"][:3]]
    plain = {name: leaf[0][order] for name, leaf in SETS.items()}

    def both(x, plain):
        return train()(PARAMS, x, KEY)[0], train()(PARAMS, plain, KEY)[0]

    padded, expected = quickly(both, x, plain)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), padded, expected
    )


def merged(adapters, **options):
    return methods.merged_adapters(
        tiny.PLAIN, adapters, CENTERS, features=features, select=tiny.DOWN, **options
    )


def test_the_mean_by_hand(adapters):
    """Softmax over the two nearest centers, a mean of matrices, scores of the rest under it."""
    fast = adapters[0]
    tokens = tiny.document(0)["tokens"]

    def run(fast, temperature):
        predict = merged(fast, k=2, temperature=temperature)
        return predict(PARAMS, tiny.document(0), KEY)

    output, info = quickly(run, fast, 0.2)
    query = np.bincount(tokens[0] % 5, minlength=5).astype(np.float64)
    near = CENTERS.astype(np.float64) @ (query / np.linalg.norm(query))
    places = np.argsort(-near, kind="stable")[:2]
    shares = np.exp(near[places] / 0.2) / np.exp(near[places] / 0.2).sum()
    kernel = np.tensordot(shares, fast["params"]["down"]["kernel"][places], 1).astype(np.float32)
    own = {"params": PARAMS["params"] | {"down": {"kernel": kernel}}}

    def nats(params):
        logits = quickly(lambda flat: tiny.decode(params, flat[None])[0], tokens.reshape(-1))
        rest = tiny.nats_of(logits[:-1], tokens.reshape(-1)[1:])
        return np.concatenate([[0], rest]).reshape(tokens.shape)

    expected = np.concatenate([nats(PARAMS)[:1], nats(own)[1:]])
    np.testing.assert_allclose(output, expected, rtol=2e-4, atol=1e-5)
    assert np.abs(output - nats(PARAMS))[1:].max() > 0.01 and info.loss.shape == (0,)


def test_pristine_adapters_are_the_control_and_nothing_looks_ahead(adapters):
    pristine = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tiny.DOWN.split(PARAMS)[0])
    control = methods.document_ttt(tiny.PLAIN, num_steps=0)

    def run(x):
        return merged(pristine, k=1)(PARAMS, x, KEY)[0], control(PARAMS, x, KEY)[0]

    output, expected = quickly(run, tiny.document(1))
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)
    audit.score_before_update(jax.jit(merged(adapters[0], k=2)), PARAMS, tiny.document(0), KEY)


def test_bad_input(adapters):
    x = tiny.document(0)
    other = {"params": {name: None for name in PARAMS["params"]}}
    few = jax.tree.map(lambda leaf: leaf[:2], adapters[0])
    for wrong in (few, other | {"params": other["params"] | {"head": np.ones((3, 2))}}):
        with pytest.raises(ValueError, match="selected leaves of 3 adapters on a leading"):
            merged(wrong)(PARAMS, x, KEY)
    with pytest.raises(ValueError, match="k must be an integer from 1 to the 3 rows"):
        merged(adapters[0], k=4)(PARAMS, x, KEY)
    with pytest.raises(ValueError, match="temperature"):
        merged(adapters[0], temperature=0.0)
    with pytest.raises(ValueError, match="num_epochs"):
        train(num_epochs=0)

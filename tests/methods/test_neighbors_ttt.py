"""neighbors_ttt against a loop by hand; what it seeks by, what it chooses, and what it refuses."""

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

KEY, PARAMS, K, RATE = jax.random.key(0), tiny.PARAMS, 3, 0.5
RNG = np.random.default_rng(5)
CORPUS = {
    "tokens": RNG.integers(tiny.VOCABULARY, size=(9, 7)).astype(np.int32),
    "mask": np.ones((9, 7), np.float32),
}
CORPUS["mask"][4, 5:] = 0
make = functools.partial(
    methods.neighbors_ttt, tiny.PLAIN, k=K, select=tiny.DOWN, optimizer=optax.sgd(RATE)
)


def predictor(**options):
    method = make(**options)

    def predict(params, x, key):
        return method.build(method.measure(params, CORPUS))(params, x, key)

    return predict


def counts(tokens):
    return np.sqrt(np.bincount(tokens, minlength=tiny.VOCABULARY) / len(tokens))


def by_hand(query, order=None):
    """The places of the nearest passages, the losses of the steps on them, and the matrix after."""
    rows = np.stack(
        [counts(t[m != 0]) for t, m in zip(CORPUS["tokens"], CORPUS["mask"], strict=True)]
    )
    places = np.argsort(-(rows @ counts(query)), kind="stable")[:K] if order is None else order

    @jax.jit
    def step(kernel, tokens, mask):
        def mean_of(kernel):
            params = {"params": PARAMS["params"] | {"down": {"kernel": kernel}}}
            logits = jax.nn.log_softmax(tiny.decode(params, tokens[None])[0])
            nats = -jnp.take_along_axis(logits[:-1], tokens[1:, None], 1)[:, 0]
            return (nats * mask[1:]).sum() / mask[1:].sum()

        loss, grad = jax.value_and_grad(mean_of)(kernel)
        return loss, kernel - RATE * grad

    kernel, losses = PARAMS["params"]["down"]["kernel"], []
    for place in places:
        loss, kernel = step(kernel, CORPUS["tokens"][place], CORPUS["mask"][place])
        losses.append(loss)
    return places, losses, {"params": PARAMS["params"] | {"down": {"kernel": kernel}}}


def nats_under(params, tokens):
    logits = quickly(lambda flat: tiny.decode(params, flat[None])[0], tokens.reshape(-1))
    rest = tiny.nats_of(logits[:-1], tokens.reshape(-1)[1:])
    return np.concatenate([[0], rest]).reshape(tokens.shape)


@pytest.fixture(scope="module")
def results():
    """Document 0 by its first chunk, and by all of it."""

    def run(x):
        return [predictor(query_chunks=chunks)(PARAMS, x, KEY) for chunks in (1, None)]

    return quickly(run, tiny.document(0))


def test_equals_a_loop_by_hand(results):
    """The query's chunk under the pristine weights, the others under the learned ones."""
    output, info = results[0]
    tokens = tiny.document(0)["tokens"]
    _, losses, adapted = by_hand(tokens[0])
    np.testing.assert_allclose(info.loss, losses, rtol=1e-4)
    expected = np.concatenate([nats_under(PARAMS, tokens)[:1], nats_under(adapted, tokens)[1:]])
    np.testing.assert_allclose(output, expected, rtol=2e-4, atol=1e-5)
    assert info.ok and info.updated and info.loss.shape == (K,)


def test_the_whole_document_as_query(results):
    output, info = results[1]
    tokens = tiny.document(0)["tokens"]
    places, losses, adapted = by_hand(tokens.reshape(-1))
    assert set(places) != set(by_hand(tokens[0])[0]), "another query, other passages"
    np.testing.assert_allclose(info.loss, losses, rtol=1e-4)
    np.testing.assert_allclose(output, nats_under(adapted, tokens), rtol=2e-4, atol=1e-5)


def test_only_the_first_chunks_are_sought_by():
    audit.score_before_update(jax.jit(predictor()), PARAMS, tiny.document(0), KEY)
    with pytest.raises(audit.AuditError, match="a token that comes later"):
        audit.score_before_update(
            jax.jit(predictor(query_chunks=None)), PARAMS, tiny.document(0), KEY
        )


def test_other_features_and_another_choice():
    """SIFT over a user's features; its order of choice is the order of learning."""

    def features(params, x):
        rows = params["params"]["embedding"][x["tokens"]] * x["mask"][..., None]
        return rows.sum(1) / x["mask"].sum(1, keepdims=True)

    choose = functools.partial(passages.sift, noise=0.1)

    def run(x):
        query = {"tokens": x["tokens"][:1], "mask": x["mask"][:1]}
        chosen = choose(features(PARAMS, query)[0], features(PARAMS, CORPUS), K)
        return chosen, predictor(features=features, choose=choose)(PARAMS, x, KEY)

    order, (_, info) = quickly(run, tiny.document(0))
    _, losses, _ = by_hand(None, order)
    np.testing.assert_allclose(info.loss, losses, rtol=1e-4)


def test_company_order_and_padding():
    """Documents side by side, one of them shorter, equal one at a time; keys have no part in it."""
    keys = ttt.sample_keys(KEY, np.arange(3))
    xs = {name: leaf.copy() for name, leaf in tiny.DOCUMENTS.items()}
    xs["mask"][1, 2:] = 0
    changed = {**xs, "tokens": xs["tokens"].copy()}
    changed["tokens"][1, 2:] = 0

    def run(xs, other):
        many = ttt.batched(predictor())
        return many(PARAMS, xs, keys), many(PARAMS, other, keys[::-1])

    (output, info), (again, _) = quickly(run, xs, changed)
    np.testing.assert_array_equal(again, output)
    one, _ = quickly(lambda x: predictor()(PARAMS, x, KEY), {k: v[1] for k, v in xs.items()})
    np.testing.assert_allclose(output[1], one, rtol=1e-5, atol=1e-6)
    assert (output[1, 2:] == 0).all() and info.updated.all()


def test_bad_input():
    with pytest.raises(TypeError, match="read must be a Reader"):
        methods.neighbors_ttt(tiny.decode)
    with pytest.raises(ValueError, match=r"query_chunks=4 chunks.*got a document of 4"):
        predictor(query_chunks=4)(PARAMS, tiny.document(0), KEY)
    with pytest.raises(ValueError, match="k must be an integer from 1 to the 9 rows"):
        predictor(k=10)(PARAMS, tiny.document(0), KEY)
    with pytest.raises(ValueError, match=r"methods.neighbors_ttt needs integer tokens"):
        make().measure(PARAMS, CORPUS["mask"])

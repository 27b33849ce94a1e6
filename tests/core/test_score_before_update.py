"""The audit of scores along a document: what keeps the rule passes, and every cheat is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.methods import tiny_decoder as tiny
from ttt_jax import audit, losses, methods, predictors

KEY = jax.random.key(0)
PARAMS, X = tiny.PARAMS, tiny.document(0)
make = functools.partial(methods.document_ttt, select=tiny.DOWN, optimizer=optax.sgd(0.5))
AHEAD, FRESH, REACTS = "depends on a token that comes later", "same scores after", "reads nothing"


def scores(params, x):
    """Nats of every token under fixed weights, from one causal pass."""
    tokens = x["tokens"].reshape(1, -1)
    logits = jax.nn.log_softmax(tiny.decode(params, tokens))[0, :-1]
    nats = -jnp.take_along_axis(logits, tokens[0, 1:, None], 1)[:, 0]
    return jnp.concatenate([jnp.zeros(1), nats]).reshape(x["tokens"].shape)


def next_token(params, x, key):
    return losses.next_token(tiny.decode)(params, x["tokens"].reshape(-1), key)


ADAPTER = ttt.gradient_adapter(next_token, optax.sgd(0.5), select=tiny.DOWN)


def learn_before_score(params, x, key):
    """Every chunk is learned from first, with the score that comes out then."""

    def step(state, chunk):
        state, _ = ADAPTER.step(params, state, {"tokens": chunk[None]}, key)
        return state, scores(ADAPTER.merge(params, state), {"tokens": chunk[None]})[0]

    _, output = jax.lax.scan(step, ADAPTER.init(params), x["tokens"])
    return output, predictors.no_steps()


class Leaky:
    """Keeps what it learned from one document for the next."""

    def __init__(self):
        self.state = ADAPTER.init(PARAMS)
        self.run = jax.jit(
            lambda state, x: (
                scores(ADAPTER.merge(PARAMS, state), x),
                ADAPTER.step(PARAMS, state, x, KEY)[0],
            )
        )

    def __call__(self, params, x, key):
        output, self.state = self.run(self.state, x)
        return output, predictors.no_steps()


def with_a_glance(params, x, key):
    """The rule is kept but for the last token, which turns the first score a little."""
    return scores(params, x) + 1e-6 * x["tokens"][-1, -1], predictors.no_steps()


def bidirectional(params, x, key):
    """A model that is not causal, without any learning."""
    return scores(params, x) + scores(params, x).mean(), predictors.no_steps()


@pytest.mark.parametrize("reader", tiny.READERS)
@pytest.mark.parametrize("num_steps", [0, 1])
def test_document_ttt_passes(reader, num_steps):
    read, params = tiny.READERS[reader]
    found = audit.score_before_update(jax.jit(make(read, num_steps=num_steps)), params, X, KEY)
    assert [finding.difference for finding in found] == [0, 0, 0]
    assert all(finding.limit == 0 for finding in found)


CHEATS = {
    "learn before score": (jax.jit(learn_before_score), AHEAD),
    "rescoring": (jax.jit(ttt.episodic(ADAPTER, scores, num_steps=2)), AHEAD),
    "leak": (Leaky(), FRESH),
    "glance": (jax.jit(with_a_glance), AHEAD),
    "bidirectional": (jax.jit(bidirectional), AHEAD),
    "constant": (
        lambda params, x, key: (np.zeros(x["tokens"].shape), predictors.no_steps()),
        REACTS,
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_named(name):
    predictor, words = CHEATS[name]
    with pytest.raises(audit.AuditError, match=words) as error:
        audit.score_before_update(predictor, PARAMS, X, KEY)
    if name != "leak":
        # Each for its own fault; what leaks fails in both ways.
        assert len(str(error.value).splitlines()) == 1


def test_every_place_and_arrays_of_tokens():
    seen = []

    def predict(params, x, key):
        seen.append(np.asarray(x).reshape(-1))
        return (scores(params, {"tokens": x}),), predictors.no_steps()

    tokens = X["tokens"][:1, :5]
    audit.score_before_update(
        predict, PARAMS, tokens, KEY, scores=lambda output: output[0], places=[1, 3]
    )
    np.testing.assert_array_equal(seen[0], seen[-1])
    changed = [set(np.flatnonzero(row != seen[0])) for row in seen[1:-1]]
    assert changed[0] == {1} and changed[1] == {1, 2, 3, 4} and changed[3] == {3}
    assert all(min(places) >= 1 for places in changed[:3] if places)
    assert all(min(places) >= 3 for places in changed[3:] if places)


@pytest.mark.parametrize(
    ("x", "more", "words"),
    [
        (X, {"places": [24]}, r"places must lie in 1 to 23.*got 24"),
        (X, {"places": [0]}, r"got 0"),
        (X, {"places": []}, "at least one token"),
        (X, {"scores": lambda output: output[0]}, r"shaped as the tokens, \(4, 6\); got \(6,\)"),
        ({"text": 1}, {}, r"'tokens'; got \['text'\]"),
        (np.ones((2, 3), np.int32), {}, "two different ones"),
        (np.ones((2, 3)), {}, "integer tokens"),
    ],
)
def test_bad_input(x, more, words):
    def predict(params, x, key):
        return scores(params, x), predictors.no_steps()

    with pytest.raises(ValueError, match=words):
        audit.score_before_update(predict, PARAMS, x, KEY, **more)

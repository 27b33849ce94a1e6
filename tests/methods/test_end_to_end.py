"""TTT-E2E: its steps are those of the formula, and its outer training makes them help."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.methods import tiny_decoder as tiny
from ttt_jax import methods, readers

KEY = jax.random.key(0)
READ = readers.isolated(tiny.decode)


def mean_nats(down, inputs, targets):
    """Of tokens given those before them in a window of one chunk."""
    params = {"params": {**tiny.PARAMS["params"], "down": {"kernel": down}}}
    logits = tiny.decode(params, inputs[None])[0]
    return -jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets].mean()


@pytest.mark.parametrize(("rate", "limit"), [(1.0, 1.0), (0.5, 0.2)])
def test_steps_are_clipped_gradients_of_the_last_score(rate, limit):
    tokens = tiny.TOKENS[0]
    optimizer = optax.chain(optax.clip_by_global_norm(limit), optax.sgd(rate))
    predict = methods.end_to_end(READ, select=tiny.DOWN, optimizer=optimizer)
    nats, info = jax.jit(predict)(tiny.PARAMS, tokens, KEY)
    down = tiny.PARAMS["params"]["down"]["kernel"]
    flat = jnp.asarray(tokens.reshape(-1))
    losses, sizes = [], []
    for start in range(0, len(flat), tiny.LENGTH):
        # The first token of a document has no score.
        first = max(start, 1)
        given = flat[first - 1 : start + tiny.LENGTH - 1], flat[first : start + tiny.LENGTH]
        value, gradient = jax.value_and_grad(mean_nats)(down, *given)
        size = float(jnp.sqrt(jnp.square(gradient).sum()))
        down = down - rate * gradient * min(1.0, limit / size)
        losses.append(float(value))
        sizes.append(size)
    # The smaller limit is one for each of these gradients.
    assert limit == 1.0 or min(sizes) > limit
    np.testing.assert_allclose(info.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(info.grad_norm, sizes, rtol=1e-5)
    np.testing.assert_allclose(nats.sum(1), np.array(losses) * [5, 6, 6, 6], rtol=1e-5)


def test_outer_training_makes_steps_help():
    """Documents that repeat a random pair of tokens: only the steps can know which."""
    rng = np.random.default_rng(0)

    def documents(count):
        pairs = rng.integers(tiny.VOCABULARY, size=(count, 1, 2))
        return np.tile(pairs, (1, tiny.CHUNKS, tiny.LENGTH // 2)).astype(np.int32)

    def outer(num_steps):
        predict = methods.end_to_end(READ, select=tiny.DOWN, num_steps=num_steps)

        def loss(params, x, key):
            # Second tokens of a chunk: predictable from its first one in later chunks alone.
            return predict(params, x, key)[0][1:, 1].mean()

        return jax.jit(ttt.meta.value_and_grad(loss))

    through, still = outer(1), outer(0)
    keys = ttt.sample_keys(KEY, range(16))
    params, optimizer = tiny.PARAMS, optax.adam(0.02)
    state, held_out = optimizer.init(params), documents(16)
    before = through(params, held_out, keys)[0]
    for _ in range(60):
        updates, state = optimizer.update(through(params, documents(16), keys)[1], state, params)
        params = optax.apply_updates(params, updates)
    after, without = (run(params, held_out, keys)[0] for run in (through, still))
    assert after < 0.7 * before and after < 0.8 * without

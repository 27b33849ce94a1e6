"""A document is an instance: a stream along its leading axis, many side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core.models import classify, make_images, make_params, snapshot, turn
from ttt_jax import losses, resets, select

from .compiling import quickly

PARAMS = make_params()
DOCUMENTS = jnp.stack([make_images(4, seed=seed) for seed in range(3)])
KEYS = ttt.sample_keys(jax.random.key(0), jnp.arange(3))


ADAPTER = ttt.gradient_adapter(losses.rotation(turn), optax.sgd(0.1), select=select.norm_affine())


def stream(predict="before", num_steps=2, reset=None):
    return ttt.online(
        ADAPTER,
        ttt.unbatched(classify),
        num_steps=num_steps,
        reset=reset or resets.never(),
        predict=predict,
    )


def test_it_is_the_stream_chunk_by_chunk():
    steps = stream()
    outputs, info = quickly(ttt.unroll(steps), PARAMS, DOCUMENTS[0], KEYS[0])
    carry, expected, losses_seen = steps.init(PARAMS), [], []

    def read(params, carry, document, key, t):
        return steps.step(params, carry, document[t], jax.random.fold_in(key, t))

    step = jax.jit(read)
    for t in range(len(DOCUMENTS[0])):
        carry, (output, chunk_info) = step(PARAMS, carry, DOCUMENTS[0], KEYS[0], t)
        expected.append(output)
        losses_seen.append(chunk_info.loss)
    ttt.audit.require_close(outputs, np.stack(expected), num_steps=8)
    ttt.audit.require_close(info.loss, np.concatenate(losses_seen), num_steps=8)
    assert info.loss.shape == (8,) and bool(info.ok) and bool(info.updated)


def test_a_score_never_sees_its_own_chunk_or_a_later_one():
    predict = jax.jit(ttt.unroll(stream("before")))
    outputs, _ = predict(PARAMS, DOCUMENTS[0], KEYS[0])
    other, _ = predict(PARAMS, DOCUMENTS[0].at[2:].add(0.5), KEYS[0])
    assert (outputs[:2] == other[:2]).all() and (outputs[3] != other[3]).any()


def test_many_documents_keep_the_promises():
    before = snapshot(PARAMS)
    ttt.audit.check(ttt.unroll(stream()), PARAMS, DOCUMENTS, KEYS, num_steps=8)
    assert snapshot(PARAMS) == before


def test_reset_at_every_chunk_is_episodic():
    def both(params, document, key):
        steps = ttt.unroll(stream("after", reset=resets.every(1)))
        predict = ttt.episodic(ADAPTER, ttt.unbatched(classify), num_steps=2)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(4))
        return steps(params, document, key)[0], ttt.batched(predict)(params, document, keys)[0]

    outputs, expected = quickly(both, PARAMS, DOCUMENTS[0], KEYS[0])
    ttt.audit.require_close(outputs, expected, num_steps=2)


@pytest.mark.parametrize(
    "x", [jnp.ones(()), jnp.ones((0, 2)), {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}]
)
def test_an_instance_without_chunks_is_refused(x):
    with pytest.raises(ValueError, match="one leading axis of at least one chunk"):
        ttt.unroll(stream())(PARAMS, x, KEYS[0])

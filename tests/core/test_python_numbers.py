"""A Python number among the parameters is the array that a compiled call makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from ttt_jax import diagnostics, losses, resets, select

WEIGHT = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.0]])
PARAMS = {"w": WEIGHT, "temperature": 1.0, "width": 3, "on": True}
X, KEY = jnp.array([0.4, -1.1]), jax.random.key(0)


def model(params, x):
    return x @ params["w"] * params["temperature"]


def adapter(**options):
    loss = losses.entropy(model)
    return ttt.gradient_adapter(loss, optax.adam(0.1), select=select.everything(), **options)


def test_eager_and_compiled_calls_adapt_the_same_leaves():
    predict = ttt.episodic(adapter(anchor=0.1), ttt.unbatched(model), num_steps=2)
    held = {**PARAMS, "temperature": jnp.float32(1.0)}
    eager, info = predict(PARAMS, X, KEY)
    assert info.updated
    for other in (jax.jit(predict)(PARAMS, X, KEY), predict(held, X, KEY)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (eager, info), tuple(other)
        )


def test_a_description_names_it():
    description = select.describe(select.everything(), PARAMS)
    assert description.paths == ("temperature", "w")
    assert description == jax.tree.map(
        lambda leaf: leaf, select.describe(select.everything(), jax.tree.map(jnp.asarray, PARAMS))
    )


def test_streams_fisher_and_drift():
    stream = ttt.online(adapter(), ttt.unbatched(model), reset=resets.every(2))
    step = jax.jit(stream.step)
    carry, wanted = stream.init(PARAMS), stream.init(PARAMS)
    carry, (output, _) = stream.step(PARAMS, carry, X, KEY)
    wanted, (expected, _) = step(PARAMS, wanted, X, KEY)
    np.testing.assert_allclose(output, expected, rtol=1e-5)

    fisher = losses.fisher_diagonal(model, select=select.everything())
    assert fisher(PARAMS, X[None])["temperature"] == jax.jit(fisher)(PARAMS, X[None])["temperature"]
    moved = {**PARAMS, "temperature": 2.0}
    assert diagnostics.drift(PARAMS, moved, select.paths("temperature")) == 1

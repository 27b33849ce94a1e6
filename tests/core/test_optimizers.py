"""Optimizers that need the loss: steps equal a hand-written loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import ttt_jax as ttt
from ttt_jax import losses, select

KEY = jax.random.key(0)
X = np.array([0.3, -1.0, 0.7], np.float32)
P = {"w": np.eye(3, dtype=np.float32), "b": np.array([0.1, 0.0, -0.2], np.float32)}
LOSS = losses.entropy(lambda params, x: x @ params["w"] + params["b"][None])
OPTIMIZERS = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "polyak_sgd": optax.polyak_sgd(0.5),
    "reduce_on_plateau": optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)),
    "momo": contrib.momo(0.3),
    "adam": optax.adam(0.1),
}
ANCHOR = 0.3


def by_hand(optimizer, num_steps):
    def objective(fast):
        squares = [jnp.sum((fast[name] - P[name]) ** 2) for name in P]
        return LOSS(fast, X, KEY) + ANCHOR / 2 * sum(squares)

    optimizer = optax.with_extra_args_support(optimizer)
    fast = jax.tree.map(jnp.asarray, P)
    state = optimizer.init(fast)
    for _ in range(num_steps):
        value, grad = jax.value_and_grad(objective)(fast)
        search = {"value": value, "grad": grad, "value_fn": objective}
        updates, state = optimizer.update(grad, state, fast, **search)
        fast = optax.apply_updates(fast, updates)
    return fast


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_a_loop_by_hand(name):
    adapter = ttt.gradient_adapter(
        LOSS, OPTIMIZERS[name], select=select.everything(), anchor=ANCHOR
    )
    state, info = jax.jit(ttt.inner_loop(adapter, 3))(P, adapter.init(P), X, KEY)
    expected = jax.jit(lambda: by_hand(OPTIMIZERS[name], 3))()
    for leaf in P:
        np.testing.assert_allclose(state.fast[leaf], expected[leaf], rtol=1e-4, atol=1e-5)
    assert info.finite.all()


def test_a_line_search_goes_with_sharpness():
    adapter = ttt.sharpness_aware_adapter(LOSS, optax.lbfgs(), select=select.everything(), rho=0.05)
    info = jax.jit(ttt.inner_loop(adapter, 2))(P, adapter.init(P), X, KEY)[1]
    assert info.finite.all() and info.loss[1] < info.loss[0]


def adapted_by(optimizer):
    adapter = ttt.gradient_adapter(LOSS, optimizer, select=select.everything())
    return adapter.step(P, adapter.init(P), X, KEY)


def test_lookahead_is_refused():
    with pytest.raises(ValueError, match=r"one copy .*optax.lookahead.*give the optimizer within"):
        adapted_by(optax.lookahead(optax.sgd(0.1), 3, 0.5))


def test_an_optimizer_that_needs_more_is_refused():
    def update(grads, state, params=None, *, oracle, **rest):
        return grads, state

    needy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    with pytest.raises(ValueError, match=r"value, grad, value_fn .*oracle"):
        adapted_by(needy)


def test_an_optimizer_that_takes_nothing_further():
    def update(grads, state, params=None):
        return jax.tree.map(lambda grad: -grad, grads), state

    plain = optax.GradientTransformationExtraArgs(lambda params: (), update)
    assert adapted_by(plain)[1].finite

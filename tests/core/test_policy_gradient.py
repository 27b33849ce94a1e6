"""The policy gradient against its formula, and against the exact gradient of a bandit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, rewards
from ttt_jax.losses.policy import advantages_of

ARMS = 5
PAYS = jnp.array([0.0, 1.0, 0.2, 0.7, 0.1])
PARAMS = {"logits": jnp.array([0.3, -0.2, 0.5, 0.0, -1.0])}


def sample(count):
    def draw(params, x, key):
        return jax.random.categorical(key, params["logits"], shape=(count,))

    return draw


def log_prob(params, x, arms):
    return jax.nn.log_softmax(params["logits"])[arms]


def pays(x, arms):
    return PAYS[arms]


def bandit(count=8, **arguments):
    reward = arguments.pop("reward", rewards.verifier(pays))
    return losses.policy_gradient(sample(count), log_prob, reward, **arguments)


def test_the_expected_gradient_is_that_of_the_expected_reward():
    """Without the division the estimate is biased by 1 - 1/G alone."""
    loss = bandit(4096, advantages="centered")
    keys = jax.random.split(jax.random.key(0), 64)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, None, 0)))(PARAMS, 0, keys)["logits"]
    exact = jax.grad(lambda p: -(jax.nn.softmax(p["logits"]) * PAYS).sum())(PARAMS)["logits"]
    np.testing.assert_allclose(grads.mean(0), exact, atol=4 * float(grads.std(0).max()) / 8)
    assert np.abs(exact).max() > 0.05


@pytest.mark.parametrize("kind", ["group", "centered", "fixed"])
def test_advantages_are_those_of_the_formula(kind):
    value = np.array([0.0, 1.0, 0.25, 0.75, 9.0], np.float32)
    used = np.array([True, True, True, True, False])
    made = advantages_of(rewards.Reward(jnp.asarray(value), jnp.asarray(used), {}), kind)
    kept = value[used]
    wanted = {
        "group": (kept - kept.mean()) / kept.std(),
        "centered": kept - kept.mean(),
        "fixed": 2 * kept - 1,
    }[kind]
    np.testing.assert_allclose(made[:4], wanted, rtol=1e-6)
    assert made[4] == 0


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("kind", ["group", "centered"])
def test_equal_rewards_make_no_step(kind, value):
    """The mean of 0.1 over 7 is not 0.1 in float32: a remainder over a tiny deviation is large."""
    loss = bandit(
        7,
        reward=rewards.verifier(lambda x, arms: jnp.full(arms.shape, value)),
        advantages=kind,
        kl=0.5,
        pristine=jax.tree.map(lambda leaf: leaf + jnp.arange(ARMS), PARAMS),
    )
    adapter = ttt.gradient_adapter(loss, optax.adam(0.1), select=ttt.select.everything())
    state = adapter.init(PARAMS)
    after, info = adapter.step(PARAMS, state, 0, jax.random.key(1))
    assert float(info.loss) == 0 and float(info.grad_norm) == 0 and bool(info.finite)
    assert int(after.count) == 0
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(before, now)


def test_a_reward_that_is_not_finite_is_no_equal_one():
    def reward(x, arms, key):
        return rewards.Reward(jnp.full(arms.shape, jnp.nan), jnp.arange(arms.size) < x, {})

    loss = bandit(4, reward=reward)
    assert np.isnan(loss(PARAMS, 2, jax.random.key(0)))
    assert float(loss(PARAMS, 0, jax.random.key(0))) == 0


def test_the_divergence_is_measured_from_the_pristine_model():
    moved = {"logits": PARAMS["logits"] + jnp.array([1.0, 0, 0, -1.0, 0])}
    key = jax.random.key(3)
    without, with_it = bandit(16), bandit(16, kl=0.3, pristine=PARAMS)
    arms = sample(16)(moved, 0, jax.random.split(key)[0])
    d = log_prob(PARAMS, 0, arms) - log_prob(moved, 0, arms)
    wanted = 0.3 * float(jnp.mean(jnp.exp(d) - d - 1))
    assert wanted > 1e-3
    difference = with_it(moved, 0, key) - without(moved, 0, key)
    assert float(difference) == pytest.approx(wanted, rel=1e-4)
    at_home = [jax.grad(loss)(PARAMS, 0, key)["logits"] for loss in (without, with_it)]
    np.testing.assert_allclose(*at_home, atol=1e-6)
    with pytest.raises(ValueError, match=r"kl=0.3 needs pristine"):
        bandit(kl=0.3)


def test_what_is_not_used_cannot_poison():
    """A rollout whose log-probability is not finite, unused or beyond the trained ones."""

    def infinite(params, x, arms):
        return log_prob(params, x, arms) - jnp.where(jnp.arange(arms.size) % 2 == 1, jnp.inf, 0.0)

    def half(x, arms, key):
        return rewards.Reward(pays(x, arms), jnp.arange(arms.size) % 2 == 0, {})

    loss = losses.policy_gradient(sample(8), infinite, half, advantages="fixed")
    value, grads = jax.value_and_grad(loss)(PARAMS, 0, jax.random.key(0))
    assert np.isfinite(value) and np.isfinite(grads["logits"]).all() and grads["logits"].any()


def test_tokens_are_averaged_over_each_rollout():
    mask = jnp.array([[True, True, False], [True, False, False]])

    def draw(params, x, key):
        return jnp.array([[1, 3, 0], [2, 0, 0]])

    def of_tokens(params, x, arms):
        return jax.nn.log_softmax(params["logits"])[arms], mask

    reward = rewards.verifier(lambda x, arms: jnp.array([1.0, 0.0]))
    loss = losses.policy_gradient(draw, of_tokens, reward, advantages="fixed")
    lp = np.asarray(jax.nn.log_softmax(PARAMS["logits"]))
    wanted = -((lp[1] + lp[3]) / 2 - lp[2]) / 2
    assert float(loss(PARAMS, 0, jax.random.key(0))) == pytest.approx(wanted, rel=1e-6)


def test_only_the_first_rollouts_are_learned_from():
    counts = []

    def counted(params, x, arms):
        counts.append(arms.shape)
        return log_prob(params, x, arms)

    loss = losses.policy_gradient(
        sample(8), counted, rewards.verifier(pays), num_trained=3, report=True
    )
    _value, aux = loss(PARAMS, 0, jax.random.key(0))
    assert counts == [(3,)]
    arms = sample(8)(PARAMS, 0, jax.random.split(jax.random.key(0))[0])
    assert float(aux["reward"]) == pytest.approx(float(PAYS[arms].mean()))
    with pytest.raises(ValueError, match="at most the 8 rollouts that sample draws; got 9"):
        bandit(num_trained=9)(PARAMS, 0, jax.random.key(0))

"""Discovery on a reader of one layer: find the sequence that a program scores highest."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import small_reader
from ttt_jax import losses, methods
from ttt_jax.readers import Reader

# The package gives the function by this name.
MODULE = sys.modules["ttt_jax.methods.discover"]
NONE = MODULE._NONE
LENGTH, PROBLEMS, STEPS = 3, 4, 8
READ = small_reader.READER


@functools.cache
def params():
    """Flat enough that every token is drawn now and then."""
    return jax.tree.map(lambda leaf: 0.3 * leaf, small_reader.draw_params())


def problems(seed=0):
    """Hidden sequences; a solution scores by how near its tokens are."""
    rng = np.random.default_rng(seed)
    return {"target": rng.integers(0, small_reader.VOCABULARY, (PROBLEMS, LENGTH)).astype(np.int32)}


def starts(x):
    return jnp.zeros((1, LENGTH), jnp.int32)


def prompt(x, state):
    return jnp.concatenate([jnp.array([1], jnp.int32), state])


def solution(x, generated):
    return generated.tokens


def score(x, states):
    """The negative distance; the token 15 cannot be scored."""
    distance = jnp.abs(states - x["target"][None]).sum(-1)
    return jnp.where((states == 15).any(-1), jnp.nan, -distance.astype(jnp.float32))


def predictor(**arguments):
    settings = {
        "num_tokens": LENGTH,
        "optimizer": optax.adam(0.05),
        "select": ttt.select.everything(),
        "num_steps": STEPS,
        "num_starts": 2,
        "num_rollouts": 16,
        "pool_size": 8,
    }
    return methods.discover(READ, starts, prompt, solution, score, **settings | arguments)


KEYS = ttt.sample_keys(jax.random.key(0), np.arange(PROBLEMS))


@functools.cache
def run_of(**arguments):
    run = jax.jit(ttt.batched(predictor(**arguments)))
    return jax.device_get(run(params(), problems(), KEYS))


def test_the_best_is_what_it_scores_and_never_falls():
    found, info = run_of()
    for row in range(PROBLEMS):
        x = {"target": problems()["target"][row]}
        assert float(score(x, found.solution[row][None])[0]) == found.score[row]
        assert float(score(x, starts(x))[0]) == found.first[row]
    best = info.aux["best"]
    assert best.shape == (PROBLEMS, STEPS) and (np.diff(best, axis=1) >= 0).all()
    np.testing.assert_array_equal(best[:, -1], found.score)
    assert (found.score >= found.first).all() and (found.score > found.first).sum() >= 3
    assert info.updated.all() and info.ok.all()


def test_learning_raises_the_mean_of_the_rollouts():
    still = run_of(optimizer=optax.sgd(0.0), reuse=False)[1].aux["mean"]
    learned = run_of(reuse=False)[1].aux["mean"]
    np.testing.assert_array_equal(still[:, 0], learned[:, 0])
    assert learned[:, -2:].mean() > still[:, -2:].mean() + 1


def test_problems_at_once_equal_one_after_another_in_any_order():
    found, info = run_of()
    order = np.array([3, 1, 0, 2])
    run = jax.jit(ttt.batched(predictor()))
    mixed = run(params(), {"target": problems()["target"][order]}, KEYS[order])
    for leaf, other in zip(jax.tree.leaves((found, info)), jax.tree.leaves(mixed), strict=True):
        np.testing.assert_array_equal(leaf[order], other)
    one = jax.jit(predictor())(params(), {"target": problems()["target"][2]}, KEYS[2])
    for leaf, single in zip(jax.tree.leaves((found, info)), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(leaf[2], single, rtol=1e-3, atol=1e-3)


def test_a_problem_that_diverges_harms_no_other_and_the_base_stays():
    """Of one problem the prompt has a mark at which the model has no logits."""
    mark, bad = small_reader.VOCABULARY - 1, 1

    def read(given, memory, inputs):
        logits, memory = small_reader.read(given, memory, inputs)
        begun = (inputs["tokens"][:, :1] == mark) & (inputs["positions"][:, :1] == 0)
        return jnp.where(begun[..., None], jnp.nan, logits), memory

    def marked(x, state):
        first = jnp.where(x["target"][0] < 0, mark, 1)
        return jnp.concatenate([jnp.atleast_1d(first), state])

    settings = {"num_tokens": LENGTH, "select": ttt.select.everything(), "num_steps": 3}
    run = jax.jit(
        ttt.batched(
            methods.discover(
                Reader(small_reader.init, read),
                starts,
                marked,
                solution,
                score,
                **settings,
                num_starts=2,
                num_rollouts=4,
                pool_size=4,
            )
        )
    )
    before = jax.tree.map(np.array, params())
    spoiled = {"target": problems()["target"].copy()}
    spoiled["target"][bad, 0] = -1
    (due, well), (found, info) = (run(params(), x, KEYS) for x in (problems(), spoiled))
    rest = np.arange(PROBLEMS) != bad
    assert well.ok.all() and well.updated.all()
    np.testing.assert_array_equal(info.ok, rest)
    for leaf, other in zip(
        jax.tree.leaves((due, well)), jax.tree.leaves((found, info)), strict=True
    ):
        np.testing.assert_array_equal(leaf[rest], other[rest])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params()))


def test_what_cannot_be_scored_is_never_kept():
    always = methods.discover(
        READ,
        starts,
        prompt,
        solution,
        lambda x, states: jnp.full(len(states), jnp.nan),
        num_tokens=LENGTH,
        num_steps=2,
        num_starts=2,
        num_rollouts=4,
        pool_size=4,
    )
    found, info = jax.jit(ttt.batched(always))(params(), problems(), KEYS)
    assert (found.score == -np.inf).all() and not info.updated.any() and info.ok.all()
    np.testing.assert_array_equal(info.aux["scored"], 0)
    np.testing.assert_array_equal(found.solution, 0)


def pool_of(states, scores, size=4):
    states, scores = np.array(states), np.array(scores, np.float32)
    given = lambda _: jnp.asarray(scores)  # noqa: E731
    return MODULE._begun(jnp.asarray(states), given, size)


def test_the_pool_keeps_the_best_distinct_solutions():
    search = pool_of([[1], [2]], [0.0, 3.0])
    states = jnp.array([[[2], [3], [4]], [[1], [5], [6]]])
    scores = jnp.array([[3.0, 5.0, NONE], [0.0, 2.0, 1.0]])
    after = MODULE._after(search, jnp.array([1, 0]), states, scores, True)
    np.testing.assert_array_equal(after.pool.states[:, 0], [3, 2, 5, 6])
    np.testing.assert_array_equal(after.pool.scores, [5, 3, 2, 1])
    np.testing.assert_array_equal(after.pool.best, [NONE, 5, NONE, NONE])
    np.testing.assert_array_equal(after.pool.visits, [0, 1, 0, 0])
    assert (int(after.state[0]), float(after.score)) == (3, 5.0)
    kept = MODULE._after(search, jnp.array([1, 0]), states, scores, False)
    np.testing.assert_array_equal(kept.pool.states, search.pool.states)
    assert float(kept.score) == 5.0


def test_the_most_promising_are_by_worth_and_by_visits():
    promising = MODULE._promising
    pool = pool_of([[1], [2], [3]], [1.0, 2.0, 0.0]).pool
    np.testing.assert_array_equal(promising(pool, 3, 0.0), [1, 0, 2])
    np.testing.assert_array_equal(promising(pool, 4, 0.0), [1, 0, 2, 1])
    led = pool._replace(best=jnp.array([NONE, NONE, 9.0, NONE]))
    assert int(promising(led, 1, 0.0)[0]) == 2
    worn = pool._replace(visits=jnp.array([0.0, 50.0, 0.0, 0.0]))
    assert int(promising(worn, 1, 5.0)[0]) == 0


@pytest.mark.parametrize("budget", [0.1, np.log(2)])
def test_entropic_weights_spend_their_budget(budget):
    """The divergence of the weights from equal ones is the budget; the order is the rewards'."""
    value = jnp.array([0.1, 0.2, 0.9, 1.0, 0.0])
    used = jnp.array([True, True, True, True, False])
    made = np.asarray(losses.entropic_advantages(budget)(value, used))
    weights = (made[:4] + 1) / 4
    assert weights.sum() == pytest.approx(1, rel=1e-5) and made[4] == 0
    assert (weights * np.log(4 * weights)).sum() == pytest.approx(budget, rel=1e-3)
    slopes = np.diff(np.log(weights)) / np.diff(np.asarray(value[:4]))
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-3)
    assert not np.asarray(losses.entropic_advantages(budget)(jnp.full(5, 0.3), used)).any()


def test_more_starts_than_places_are_refused():
    with pytest.raises(ValueError, match="at most pool_size; got 9 and 8"):
        predictor(num_starts=9)
    with pytest.raises(ValueError, match=r"1 to 8 solutions \[M, A\]; got shape \(3,\)"):
        methods.discover(
            READ, lambda x: jnp.zeros(3), prompt, solution, score, num_tokens=1, pool_size=8
        )(params(), {"target": problems()["target"][0]}, KEYS[0])

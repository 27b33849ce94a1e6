"""Resets: when they fire, and that nothing survives them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, resets, select

from . import models
from .compiling import quickly
from .streaming import (
    IMAGES,
    KEY,
    KEYS,
    PARAMS,
    N,
    adam_with_memory,
    assert_equal,
    classify,
    rows,
    run,
    scanned,
    walk,
    walk_stream,
)


class TestEvery:
    @pytest.mark.parametrize("kind", ["memory", "sharpness", "statistics"])
    def test_a_reset_restores_every_leaf_bitwise(self, kind):
        """Optimizer moments, memory and count included."""
        xs, apply = IMAGES, classify
        if kind == "memory":
            adapter = adam_with_memory()
        elif kind == "sharpness":
            adapter = ttt.sharpness_aware_adapter(
                losses.entropy(models.classify),
                optax.sgd(0.1, momentum=0.9),
                select=select.norm_affine(),
                rho=0.05,
            )
        else:
            adapter = ttt.statistics_adapter(models.batch_moments, momentum=0.9)
            xs, apply = models.make_images(N, batch=4), models.classify
        _, (_, info), carries = run(adapter, reset=resets.every(3), xs=xs, apply=apply)
        np.testing.assert_array_equal(info.reset, [False, False, True] * 2)
        pristine = adapter.init(PARAMS)
        for place in (2, 5):
            assert_equal(rows(carries.state, place), pristine)
        for leaf, start in zip(
            jax.tree.leaves(rows(carries.state, 1)), jax.tree.leaves(pristine), strict=True
        ):
            assert (np.asarray(leaf) != np.asarray(start)).any()

    def test_identical_samples_in_a_row_get_identical_predictions(self):
        """The symptom by which moments that survive a reset give themselves away."""
        xs = jnp.stack([IMAGES[0]] * 3)
        keys = ttt.sample_keys(KEY, [7, 7, 7])
        adapter = adam_with_memory(losses.rotation(models.turn, augment=models.jitter))

        def after(period):
            stream = ttt.online(adapter, classify, num_steps=2, reset=resets.every(period))
            return scanned(stream, PARAMS, xs, keys)[1]

        results = quickly(lambda periods: jax.lax.map(after, periods), np.array([1, 4]))
        forgetful, (outputs, _) = rows(results, 0), rows(results, 1)
        assert_equal(rows(forgetful, 0), rows(forgetful, 1))
        assert_equal(rows(forgetful, 0), rows(forgetful, 2))
        assert (np.abs(np.diff(outputs, axis=0)).max(axis=1) > 1e-4).all()

    def test_equals_episodic(self):
        adapter = adam_with_memory()
        predict = ttt.episodic(adapter, classify, num_steps=2)

        def both(xs, keys):
            stream = ttt.online(adapter, classify, num_steps=2, reset=resets.every(1))
            return scanned(stream, PARAMS, xs, keys)[1], ttt.batched(predict)(PARAMS, xs, keys)

        (outputs, info), (episodes, episode_info) = quickly(both, IMAGES, KEYS)
        ttt.audit.require_close(outputs, episodes, num_steps=2)
        ttt.audit.require_close(info.loss, episode_info.loss, num_steps=2)
        assert info.reset.all()

    def test_period_maps(self):
        def fired(n):
            return scanned(
                ttt.online(walk(), lambda w, x: w, reset=resets.every(n)),
                jnp.asarray(0.0),
                jnp.ones(N),
                KEYS,
            )[1][1].reset

        found = quickly(jax.vmap(fired), np.array([1, 2, 4]))
        expected = [[(i + 1) % n == 0 for i in range(N)] for n in (1, 2, 4)]
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("n", [0, -1, 2.0, True])
    def test_errors(self, n):
        with pytest.raises(ValueError, match=f"integer of at least 1, got {n}"):
            resets.every(n)


class TestNever:
    def test_nothing_is_restored(self):
        _, (_, info), carries = walk_stream(range(1, N + 1), reset=resets.never())
        assert not info.reset.any()
        np.testing.assert_array_equal(carries.state.count, np.arange(1, N + 1))


class TestOnCollapse:
    """The statistic is the output itself, which walks along 4, 2, ...: halves of x."""

    def test_moving_average_and_restart(self):
        reset = resets.on_collapse(lambda output, info: output, 1.2, decay=0.5)
        xs = [8.0, 0.0, 0.0, 8.0, 0.0, 0.0]
        carry, (outputs, info), carries = walk_stream(xs, reset=reset)
        # The average is 4, then (4 + 2) / 2, (3 + 1) / 2, (2 + 4.5) / 2, and so on.
        np.testing.assert_allclose(outputs, [4, 2, 1, 4.5, 2.25, 1.125])
        assert not info.reset.any()
        np.testing.assert_allclose(carry.reset.value, 1.9375)
        _, (outputs, info), carries = walk_stream([8.0, 0, 0, 0, 0, 8.0], reset=reset)
        np.testing.assert_array_equal(info.reset, [False, False, False, False, True, False])
        np.testing.assert_allclose(outputs, [4, 2, 1, 0.5, 0.25, 4])
        np.testing.assert_array_equal(carries.state.fast[4], 0)
        assert not carries.reset.started[4]
        np.testing.assert_allclose(carries.reset.value[5], 4)

    def test_starts_at_the_first_value(self):
        """Not at zero, which would fire at once."""
        reset = resets.on_collapse(lambda output, info: info.loss[-1], 0.5)
        _, (_, info), _ = walk_stream([2.0, 2.0], reset=reset, rate=1e-3)
        assert not info.reset.any()

    def test_fires_on_the_first_value_too(self):
        reset = resets.on_collapse(lambda output, info: output, 5.0)
        _, (_, info), carries = walk_stream([2.0, 2.0], reset=reset)
        assert info.reset.all() and (carries.state.fast == 0).all()

    def test_values_that_are_not_finite_are_left_out(self):
        reset = resets.on_collapse(lambda output, info: info.loss[0], 0.1, decay=0.5)
        _, (_, info), carries = walk_stream([2.0, np.nan, 2.0], reset=reset, rate=0.5)
        np.testing.assert_array_equal(info.ok, [True, False, True])
        np.testing.assert_allclose(carries.reset.value, [2, 2, (2 + 0.5) / 2])
        assert not info.reset.any()

    def test_restores_the_whole_state(self):
        adapter = adam_with_memory()
        reset = resets.on_collapse(lambda output, info: -info.loss[0] * 0, 1.0)
        _, (_, info), carries = run(adapter, reset=reset)
        assert info.reset.all()
        assert_equal(rows(carries.state, 0), adapter.init(PARAMS))

    def test_threshold_and_decay_map(self):
        def fired(threshold, decay):
            reset = resets.on_collapse(lambda output, info: output, threshold, decay=decay)
            stream = ttt.online(walk(0.5), lambda w, x: w, reset=reset)
            xs = jnp.array([8.0, 0, 0, 0, 0, 0])
            return scanned(stream, jnp.asarray(0.0), xs, KEYS)[1][1].reset.any()

        found = quickly(jax.vmap(fired), np.array([0.0, 1.2, 1.2]), np.array([0.5, 0.5, 0.99]))
        np.testing.assert_array_equal(found, [False, True, False])

    def test_statistic_must_be_scalar(self):
        reset = resets.on_collapse(lambda output, info: jnp.ones(3), 0.5)
        with pytest.raises(ValueError, match=r"must be a scalar; got shape \(3,\)"):
            walk_stream([1.0], reset=reset)


class TestStochasticRestore:
    def test_all_or_nothing(self):
        adapter = adam_with_memory()

        def after(p):
            stream = ttt.online(adapter, classify, reset=resets.stochastic_restore(p))
            carry, (_, info), _ = scanned(stream, PARAMS, IMAGES, KEYS)
            return carry.state, info.reset

        probabilities = np.array([0.0, 1.0], np.float32)
        states, fired = quickly(lambda values: jax.lax.map(after, values), probabilities)
        start = adapter.init(PARAMS)
        for place, restored in enumerate([False, True]):
            assert (np.asarray(fired[place]) == restored).all()
            last = rows(states, place)
            leaves = zip(jax.tree.leaves(start.fast), jax.tree.leaves(last.fast), strict=True)
            for old, new in leaves:
                assert (np.asarray(old) == np.asarray(new)).all() == restored
            assert last.count == N
            assert (last.opt_state[0].mu["params"]["head"]["kernel"] != 0).all()
            assert (last.memory["center"] != 0).all()

    def test_share_of_elements(self):
        """Elementwise, about p of them, and other ones at every step."""
        params = {"a": jnp.zeros((60, 60)), "b": jnp.zeros(400)}
        adapter = ttt.gradient_adapter(
            lambda params, x, key: jnp.sum(params["a"]) + jnp.sum(params["b"]),
            optax.sgd(1.0),
            select=select.everything(),
        )
        _, _, carries = run(
            adapter,
            reset=resets.stochastic_restore(0.2),
            params=params,
            xs=np.zeros(2, np.float32),
            keys=KEYS[:2],
            apply=lambda params, x: x,
        )
        fast = carries.state.fast
        first, second = (np.asarray(fast["a"][i]) for i in (0, 1))
        np.testing.assert_allclose((first == 0).mean(), 0.2, atol=0.03)
        np.testing.assert_allclose((second == 0).mean(), 0.2, atol=0.03)
        # A weight restored at the first step only has moved once since.
        np.testing.assert_allclose((second == -1).mean(), 0.8 * 0.2, atol=0.03)
        restored_b = np.asarray(fast["b"][0]) == 0
        assert (restored_b != (first.ravel()[:400] == 0)).any()

    def test_probability_maps(self):
        adapter = ttt.gradient_adapter(
            lambda params, x, key: jnp.sum(params), optax.sgd(1.0), select=select.everything()
        )

        def share(p):
            stream = ttt.online(adapter, lambda w, x: x, reset=resets.stochastic_restore(p))
            params = jnp.zeros(500)
            carry, _ = stream.step(params, stream.init(params), 1.0, KEY)
            return (carry.state.fast == 0).mean()

        values = np.array([0.0, 0.3, 1.0], np.float32)
        np.testing.assert_allclose(quickly(jax.vmap(share), values), values, atol=0.07)

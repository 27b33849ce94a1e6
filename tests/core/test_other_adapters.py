"""Sharpness-aware steps, carried statistics and filters, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import select

from . import models
from .compiling import quickly
from .stepping import (
    ALL_W,
    KEY,
    PARAMS,
    A,
    W,
    gradient_of,
    quadratic,
    quartic,
    run,
    sgd,
)


class TestSharpnessAware:
    def test_two_steps(self):
        adapter = ttt.sharpness_aware_adapter(quartic, optax.sgd(0.1), select=ALL_W, rho=0.3)
        state, info = run(adapter, 2)
        w, values, norms = W.astype(np.float64), [], []
        for _ in range(2):
            ascent = 4 * 0.7 * (w - A) ** 3
            sharp = 4 * 0.7 * (w + 0.3 * ascent / np.linalg.norm(ascent) - A) ** 3
            values.append(0.7 * np.sum((w - A) ** 4))
            norms.append(np.linalg.norm(sharp))
            w = w - 0.1 * sharp
        np.testing.assert_allclose(state.fast["w"], w, rtol=1e-4)
        np.testing.assert_allclose(info.loss, values, rtol=1e-4)
        np.testing.assert_allclose(info.grad_norm, norms, rtol=1e-4)

    def test_another_loss_at_the_peak(self):
        """It is built from the weights before the climb: |w - start|^2 has gradient 2 rho g/|g|."""

        def peak_loss(before):
            return lambda params, x, key: jnp.sum((params["w"] - before["w"]) ** 2)

        adapter = ttt.sharpness_aware_adapter(
            quartic, optax.sgd(1.0), select=ALL_W, rho=0.3, peak_loss=peak_loss
        )
        state, info = run(adapter, 1)
        ascent = (W.astype(np.float64) - A) ** 3
        expected = W - 2 * 0.3 * ascent / np.linalg.norm(ascent)
        np.testing.assert_allclose(state.fast["w"], expected, rtol=1e-4)
        np.testing.assert_allclose(info.loss, [0.09], rtol=1e-4)

    def test_norm_is_taken_over_all_selected_leaves(self):
        params = {"a": jnp.asarray(1.0), "b": jnp.asarray(1.0)}

        def loss(params, x, key):
            return 1.5 * params["a"] ** 2 + 2.0 * params["b"] ** 2

        adapter = ttt.sharpness_aware_adapter(
            loss, optax.sgd(1.0), select=select.everything(), rho=0.5
        )
        state, _ = run(adapter, 1, params=params)
        # The gradient is (3, 4), of norm 5, so the peak is at (1.3, 1.4).
        np.testing.assert_allclose(state.fast["a"], 1 - 3 * 1.3, rtol=1e-5)
        np.testing.assert_allclose(state.fast["b"], 1 - 4 * 1.4, rtol=1e-5)

    def test_zero_gradient_stays_put(self):
        params = {"w": jnp.asarray(A), "frozen": jnp.asarray(2.0)}
        adapter = ttt.sharpness_aware_adapter(quadratic, optax.sgd(0.1), select=ALL_W, rho=0.3)
        state, info = run(adapter, 1, params=params)
        np.testing.assert_array_equal(state.fast["w"], A)
        assert info.finite.all() and state.count == 0


class TestStatisticsAdapter:
    PARAMS = models.make_params()
    BATCH = models.make_images(8)

    def test_two_steps(self):
        adapter = ttt.statistics_adapter(models.batch_moments, momentum=0.8)
        state, info = run(adapter, 2, x=self.BATCH, params=self.PARAMS)
        hidden = np.asarray(quickly(models.hidden, self.PARAMS, self.BATCH))
        for name, new in (("mean", hidden.mean(axis=0)), ("var", hidden.var(axis=0))):
            old = np.asarray(self.PARAMS["batch_stats"]["norm"][name])
            expected = 0.8 * (0.8 * old + 0.2 * new) + 0.2 * new
            np.testing.assert_allclose(state.fast["batch_stats"]["norm"][name], expected, rtol=1e-4)
        assert jax.tree.leaves(state.fast["params"]) == []
        np.testing.assert_array_equal(info.loss, [0, 0])
        np.testing.assert_array_equal(info.grad_norm, [0, 0])
        assert info.finite.all() and state.count == 2

    def test_collect_sees_the_statistics_carried_so_far(self):
        def collect(params, x):
            holes = jax.tree.map(lambda leaf: None, params["params"])
            doubled = jax.tree.map(lambda leaf: 2 * leaf, params["batch_stats"])
            return {"params": holes, "batch_stats": doubled}

        adapter = ttt.statistics_adapter(collect, momentum=0.0)
        state, _ = run(adapter, 3, x=self.BATCH, params=self.PARAMS)
        old = self.PARAMS["batch_stats"]["norm"]["mean"]
        np.testing.assert_allclose(state.fast["batch_stats"]["norm"]["mean"], 8 * old, rtol=1e-6)

    def test_nan_is_reported(self):
        adapter = ttt.statistics_adapter(models.batch_moments, momentum=0.8)
        _, info = run(adapter, 1, x=self.BATCH.at[0, 0].set(jnp.nan), params=self.PARAMS)
        assert not info.finite.any()

    def test_wrong_layout(self):
        adapter = ttt.statistics_adapter(lambda p, x: p["batch_stats"], momentum=0.8)
        with pytest.raises(
            ValueError, match=r"(?s)layout of select\.statistics\(\); got.*expected"
        ):
            jax.eval_shape(adapter.step, self.PARAMS, adapter.init(self.PARAMS), self.BATCH, KEY)

    def test_wrong_shape(self):
        def collect(params, x):
            return jax.tree.map(jnp.mean, models.batch_moments(params, x))

        adapter = ttt.statistics_adapter(collect, momentum=0.8)
        with pytest.raises(ValueError, match=r"shapes that params has; got \[\(\), \(\)\]"):
            jax.eval_shape(adapter.step, self.PARAMS, adapter.init(self.PARAMS), self.BATCH, KEY)

    def test_no_statistics(self):
        adapter = ttt.statistics_adapter(models.batch_moments, momentum=0.8)
        with pytest.raises(ValueError, match="batch_stats"):
            adapter.init({"params": self.PARAMS["params"]})


class TestFiltered:
    def test_skipped_instance_keeps_its_state(self):
        adapter = ttt.filtered(
            ttt.gradient_adapter(quadratic, optax.adam(0.1), select=ALL_W),
            lambda params, x, key: x > 0,
        )

        def go(x):
            return ttt.inner_loop(adapter, 2)(PARAMS, adapter.init(PARAMS), x, KEY)

        state, info = quickly(jax.vmap(go), np.array([0.7, -0.7], np.float32))
        start = adapter.init(PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), state, start)
        np.testing.assert_array_equal(info.loss[1], [0, 0])
        np.testing.assert_array_equal(info.grad_norm[1], [0, 0])
        assert info.finite.all()
        assert state.count[0] == 2 and (state.fast["w"][0] != W).all()

    def test_keep_sees_the_parameters_of_the_moment(self):
        """It stops once the first weight has passed a mark."""
        adapter = ttt.filtered(sgd(), lambda params, x, key: params["w"][0] < 0.35)
        state, info = run(adapter, 4)
        assert state.count == 1
        np.testing.assert_allclose(state.fast["w"], W - 0.1 * gradient_of(W, 0.7), rtol=1e-5)
        assert (info.loss[1:] == 0).all() and info.loss[0] > 0

    def test_a_rejected_nan_is_no_failure(self):
        adapter = ttt.filtered(sgd(), lambda params, x, key: jnp.isfinite(x))
        state, info = run(adapter, 1, x=jnp.nan)
        assert info.finite.all() and state.count == 0
        np.testing.assert_array_equal(state.fast["w"], W)

    def test_keep_returns_one_bool(self):
        adapter = ttt.filtered(sgd(), lambda params, x, key: jnp.ones(3, bool))
        with pytest.raises(ValueError, match=r"one bool per instance; got shape \(3,\).*weight="):
            jax.eval_shape(adapter.step, PARAMS, adapter.init(PARAMS), 0.7, KEY)

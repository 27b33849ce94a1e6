"""Inner steps against numbers worked out in NumPy and with optax by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import adapters, losses, select

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
    value_of,
)
from .streaming import rows


class TestGradientAdapter:
    def test_two_steps_of_sgd(self):
        state, info = run(sgd(), 2)
        w1 = W - 0.1 * gradient_of(W, 0.7)
        w2 = w1 - 0.1 * gradient_of(w1, 0.7)
        np.testing.assert_allclose(state.fast["w"], w2, rtol=1e-5)
        assert state.fast["frozen"] is None
        assert state.count == 2 and state.memory == ()
        np.testing.assert_allclose(info.loss, [value_of(W, 0.7), value_of(w1, 0.7)], rtol=1e-5)
        norms = [np.linalg.norm(gradient_of(w, 0.7)) for w in (W, w1)]
        np.testing.assert_allclose(info.grad_norm, norms, rtol=1e-5)
        assert info.finite.all()

    def test_two_steps_of_adam(self):
        """Against Adam's formulas: the moments carry over, the count as well."""
        adapter = ttt.gradient_adapter(quadratic, optax.adam(0.05), select=ALL_W)
        state, _ = run(adapter, 2)
        w, m, v = W.astype(np.float64), np.zeros(3), np.zeros(3)
        for t in (1, 2):
            g = gradient_of(w, 0.7)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w = w - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(state.fast["w"], w, atol=3e-6)  # 1 - 0.999 in float32.
        np.testing.assert_allclose(state.opt_state[0].mu["w"], m, rtol=1e-5)
        assert state.opt_state[0].count == 2

    def test_schedules_follow_the_private_count(self):
        schedule = optax.piecewise_constant_schedule(0.1, {1: 0.0})
        adapter = ttt.gradient_adapter(quadratic, optax.sgd(schedule), select=ALL_W)
        one, _ = run(adapter, 1)
        three, _ = run(adapter, 3)
        np.testing.assert_array_equal(one.fast["w"], three.fast["w"])

    def test_merge_keeps_frozen_leaves_by_identity(self):
        adapter = sgd()
        merged = adapter.merge(PARAMS, adapter.init(PARAMS))
        assert merged["frozen"] is PARAMS["frozen"] and merged["w"] is PARAMS["w"]

    def test_step_i_uses_fold_in_of_i(self):
        def noisy(params, x, key):
            return jnp.sum(params["w"]) * jax.random.normal(key)

        adapter = ttt.gradient_adapter(noisy, optax.sgd(1.0), select=ALL_W)
        state, _ = run(adapter, 3)
        draws = [float(jax.random.normal(jax.random.fold_in(KEY, i))) for i in range(3)]
        np.testing.assert_allclose(state.fast["w"], W - sum(draws), rtol=1e-5)

    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_lengths(self, steps):
        state, info = run(sgd(), steps)
        assert info.loss.shape == info.grad_norm.shape == info.finite.shape == (steps,)
        assert state.count == steps


class TestAnchor:
    def expected(self, anchor, steps=2):
        w, infos = W.astype(np.float64), []
        for _ in range(steps):
            grad = gradient_of(w, 0.7) + anchor * (w - W)
            infos.append((value_of(w, 0.7) + 0.5 * np.sum(anchor * (w - W) ** 2), grad))
            w = w - 0.1 * grad
        return w, [v for v, _ in infos], [np.linalg.norm(g) for _, g in infos]

    @pytest.mark.parametrize(
        "anchor", [3.0, 2, {"w": np.array([0.0, 5.0, 1.0], np.float32), "frozen": None}]
    )
    def test_float_and_pytree(self, anchor):
        state, info = run(sgd(anchor=anchor), 2)
        w, values, norms = self.expected(anchor["w"] if isinstance(anchor, dict) else anchor)
        np.testing.assert_allclose(state.fast["w"], w, rtol=1e-5)
        np.testing.assert_allclose(info.loss, values, rtol=1e-5)
        np.testing.assert_allclose(info.grad_norm, norms, rtol=1e-5)

    def test_is_free_at_the_pristine_parameters(self):
        """The penalty's gradient is zero there: one step is the same with any anchor."""
        plain, _ = run(sgd(), 1)
        anchored, _ = run(sgd(anchor=1e3), 1)
        np.testing.assert_array_equal(plain.fast["w"], anchored.fast["w"])

    def test_zero_anchor_equals_none(self):
        def go(anchor):
            adapter = sgd(anchor=anchor)
            return ttt.inner_loop(adapter, 2)(PARAMS, adapter.init(PARAMS), 0.7, KEY)[0].fast["w"]

        np.testing.assert_allclose(quickly(go, 0.0), run(sgd(), 2)[0].fast["w"], rtol=1e-6)

    @pytest.mark.parametrize("anchor", [{"w": W}, [W, None], {"w": W, "frozen": 1.0}])
    def test_wrong_structure(self, anchor):
        adapter = sgd(anchor=jax.tree.map(abs, anchor))
        message = r"(?s)number or a pytree shaped like the selected.*got.*expected.*same selection"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(adapter.step, PARAMS, adapter.init(PARAMS), 0.7, KEY)


class TestNoStepAsked:
    """A filter whose weights are all zero: nothing may move, not even by momentum or decay."""

    OPTIMIZERS = (
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(0.1, weight_decay=0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    )

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("sharp", [False, True])
    def test_parameters_optimizer_state_and_count_stay(self, optimizer, sharp):
        def weight(logits):
            return (logits[:, 0] > 0).astype(jnp.float32)

        loss = losses.entropy(lambda params, x: x * params["w"][None], weight=weight, batch=True)
        if sharp:
            adapter = ttt.sharpness_aware_adapter(loss, optimizer, select=ALL_W, rho=0.1)
        else:
            adapter = ttt.gradient_adapter(loss, optimizer, select=ALL_W, anchor=0.5)

        def go(first, second):
            state, _ = adapter.step(PARAMS, adapter.init(PARAMS), first, KEY)
            return state, *adapter.step(PARAMS, state, second, KEY)

        batch = np.array([[1.0, 2.0, 0.0], [3.0, 1.0, 1.0]], np.float32)
        seconds = np.stack([-batch, batch])
        results = quickly(jax.vmap(go, in_axes=(None, 0)), batch, seconds)
        (warm, after, info), (_, moved, _) = rows(results, 0), rows(results, 1)
        assert warm.count == 1 and (warm.fast["w"] != W).any()
        jax.tree.map(np.testing.assert_array_equal, warm, after)
        assert info.finite
        assert moved.count == 2 and (moved.fast["w"] != warm.fast["w"]).any()

    def test_tiny_gradients_are_not_zero(self):
        """Their squares vanish in float32; Adam does not mind."""

        def faint(params, x, key):
            return 1e-25 * jnp.sum(params["w"])

        adapter = ttt.gradient_adapter(faint, optax.sgd(1e24), select=ALL_W)
        state, _ = run(adapter, 1)
        np.testing.assert_allclose(state.fast["w"], W - 0.1, rtol=1e-5)
        assert state.count == 1


class TestStatefulLoss:
    """An exponential moving average of the adapted weights, which the loss is pulled to."""

    LOSS = ttt.StatefulLoss(
        init=lambda params: {"average": params["w"], "seen": jnp.zeros(())},
        value=lambda params, memory, x, key: (
            0.5 * jnp.sum((params["w"] - x * memory["average"]) ** 2),
            {**memory, "seen": memory["seen"] + x},
        ),
        after=lambda adapted, memory: {
            **memory,
            "average": 0.5 * memory["average"] + 0.5 * adapted["w"],
        },
    )

    def test_two_steps(self):
        adapter = ttt.gradient_adapter(self.LOSS, optax.sgd(0.1), select=ALL_W)
        state, info = run(adapter, 2, x=3.0)
        w, average, values = W.astype(np.float64), W.astype(np.float64), []
        for _ in range(2):
            values.append(0.5 * np.sum((w - 3 * average) ** 2))
            w = w - 0.1 * (w - 3 * average)
            average = 0.5 * average + 0.5 * w
        np.testing.assert_allclose(state.fast["w"], w, rtol=1e-5)
        np.testing.assert_allclose(state.memory["average"], average, rtol=1e-5)
        np.testing.assert_allclose(info.loss, values, rtol=1e-5)
        assert state.memory["seen"] == 6.0

    def test_a_teacher_is_served_by_replacing_merge(self):
        adapter = ttt.gradient_adapter(self.LOSS, optax.sgd(0.1), select=ALL_W)
        served = adapter._replace(
            merge=lambda params, state: {**params, "w": state.memory["average"]}
        )
        predict = ttt.episodic(served, lambda params, x: params["w"], num_steps=2)
        output, info = quickly(predict, PARAMS, 3.0, KEY)
        state, _ = run(adapter, 2, x=3.0)
        np.testing.assert_allclose(output, state.memory["average"], rtol=1e-6)
        assert info.updated


class TestTracedHyperParameters:
    """Building the predictor inside the mapped function; each row equals a run of its own."""

    VALUES = np.array([0.0, 0.05, 0.4], np.float32)

    def check(self, build):
        def go(value):
            adapter = build(value)
            return ttt.inner_loop(adapter, 2)(PARAMS, adapter.init(PARAMS), 0.7, KEY)[0].fast["w"]

        rows = quickly(jax.vmap(go), self.VALUES)
        apart = quickly(lambda: [go(float(value)) for value in self.VALUES])
        ttt.audit.require_close(rows, np.stack(apart), num_steps=2)
        assert len(np.unique(np.asarray(rows)[:, 0])) == 3

    def test_learning_rate(self):
        self.check(lambda rate: sgd(rate))

    def test_anchor(self):
        self.check(lambda anchor: sgd(anchor=10 * anchor))

    def test_rho(self):
        self.check(
            lambda rho: ttt.sharpness_aware_adapter(quartic, optax.sgd(0.01), select=ALL_W, rho=rho)
        )

    def test_momentum_of_statistics(self):
        params = {"batch_stats": {"mean": PARAMS["w"]}}

        def go(momentum):
            adapter = ttt.statistics_adapter(
                lambda params, x: {"batch_stats": {"mean": x}}, momentum=momentum
            )
            return adapter.step(params, adapter.init(params), A, KEY)[0].fast["batch_stats"]

        rows = quickly(jax.vmap(go), self.VALUES)["mean"]
        expected = self.VALUES[:, None] * W + (1 - self.VALUES[:, None]) * A
        np.testing.assert_allclose(rows, expected, rtol=1e-5)


class TestPrecision:
    def test_narrow_leaves_warn_once(self):
        adapters._warn_narrow.cache_clear()
        narrow = {"w": jnp.asarray(W, jnp.bfloat16), "frozen": jnp.asarray(2.0)}
        with pytest.warns(UserWarning, match=r"dtype bfloat16.*round away.*float32"):
            sgd().init(narrow)
        sgd().init(narrow)  # Warnings are errors here, so a second one would fail.

    def test_frozen_narrow_leaves_do_not_warn(self):
        adapters._warn_narrow.cache_clear()
        sgd().init({"w": jnp.asarray(W), "frozen": jnp.asarray(2.0, jnp.bfloat16)})

    @pytest.mark.filterwarnings("ignore:Adapting parameters of dtype")
    @pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)])
    def test_everything_keeps_the_dtype_of_params(self, optimizer):
        narrow = {"w": jnp.asarray(W, jnp.bfloat16), "frozen": jnp.asarray(2.0)}
        adapter = ttt.gradient_adapter(quadratic, optimizer, select=ALL_W, anchor=0.1)
        start = adapter.init(narrow)
        state, info = jax.eval_shape(adapter.step, narrow, start, 0.7, KEY)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), start)
        assert jax.tree.leaves(shapes) == jax.tree.leaves(state)
        assert info.loss.dtype == info.grad_norm.dtype == jnp.float32


class TestErrors:
    def test_loss_must_be_scalar(self):
        adapter = ttt.gradient_adapter(
            lambda params, x, key: params["w"], optax.sgd(0.1), select=ALL_W
        )
        with pytest.raises(ValueError, match=r"scalar; got shape \(3,\).*losses\.over_batch"):
            jax.eval_shape(adapter.step, PARAMS, adapter.init(PARAMS), 0.7, KEY)

    def test_loss_must_be_callable(self):
        with pytest.raises(TypeError, match=r"function \(params, x, key\).*got str"):
            ttt.gradient_adapter("rotation", optax.sgd(0.1), select=ALL_W)

    def test_selection_that_matches_nothing(self):
        adapter = ttt.gradient_adapter(quadratic, optax.sgd(0.1), select=select.paths("v"))
        with pytest.raises(ValueError, match=r"'v' matches none of the 2.*Nearest paths: w"):
            adapter.init(PARAMS)

    @pytest.mark.parametrize("steps", [-1, 1.0, True, None])
    def test_number_of_steps(self, steps):
        with pytest.raises(ValueError, match=f"integer of at least 0, got {steps}"):
            ttt.inner_loop(sgd(), steps)

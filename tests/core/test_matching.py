"""Matching the source's statistics, against numbers worked out by hand or in NumPy."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses
from ttt_jax.source import Moments

from .compiling import quickly, recorded
from .streaming import scanned

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
ROWS = RNG.normal(1.0, 2.0, size=(9, 2, 3)).astype(np.float32)
XS = RNG.normal(size=(5, 2, 3)).astype(np.float32)
VECTORS = RNG.normal(1.0, 2.0, size=(9, 3)).astype(np.float32)


class Batch(typing.NamedTuple):
    """As ``ttt_jax.data`` has them: with strings beside the images."""

    id: np.ndarray
    image: np.ndarray
    domain: np.ndarray


class Data:
    """Batches of unequal size with a split, as batches of the loader or plain arrays."""

    split = "train"

    def __init__(self, rows, plain=False):
        parts = np.split(rows, [2, 6])
        names = np.array(["clean"] * len(rows))
        self.batches = (
            parts if plain else [Batch(np.arange(len(p)), p, names[: len(p)]) for p in parts]
        )

    def __iter__(self):
        return iter(self.batches)


def collect(params, inputs):
    return {"first": inputs * params, "then": (jnp.square(inputs[:, 0] * params),)}


def layers_of(rows, params):
    rows = np.asarray(rows, np.float64) * params
    return [rows, rows[:, 0] ** 2]


def actmad(xs, params=0.5, source_params=1.5):
    """The formula of the paper, in float64."""
    pairs = zip(layers_of(xs, params), layers_of(ROWS, source_params), strict=True)
    return 0.5 * sum(
        np.abs(x.mean(0) - s.mean(0)).mean() + np.abs(x.var(0, ddof=1) - s.var(0)).mean()
        for x, s in pairs
    )


@functools.cache
def activation_source(plain=False):
    moments = losses.activation_moments(collect)
    return ttt.source_statistics(moments, 1.5, Data(ROWS, plain))


def raises(*words):
    return pytest.raises(ValueError, match=r"(?s)" + ".*".join(words))


def shift(x, key):
    return x + jax.random.normal(key, x.shape)


class TestActivationMoments:
    @pytest.mark.parametrize("plain", [False, True])
    def test_means_over_batches_combine_exactly(self, plain):
        found = activation_source(plain).value
        first, then = layers_of(ROWS, 1.5)
        np.testing.assert_allclose(found.mean["first"], first.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.centered["first"], first.var(0), rtol=1e-5)
        np.testing.assert_allclose(found.centered["then"][0], then.var(0), rtol=1e-5)


class TestActivationMatching:
    def test_by_hand(self):
        """Source 0 and 2: mean 1, variance 1. Test 3 and 7: mean 5, variance 8, over n - 1."""
        source = Moments({"a": np.array([1.0])}, {"a": np.array([1.0])})
        loss = losses.activation_matching(lambda p, x: {"a": p * x}, source, batch=True)
        value = quickly(loss, 1.0, np.array([[3.0], [7.0]], np.float32), KEY)
        assert value == 0.5 * (abs(5 - 1) + abs(8 - 1))

    @pytest.mark.parametrize("carried", [True, False])
    def test_batch(self, carried):
        source = activation_source()
        loss = losses.activation_matching(collect, source if carried else source.value, batch=True)
        np.testing.assert_allclose(quickly(loss, 0.5, XS, KEY), actmad(XS), rtol=1e-4)

    def test_statistics_of_the_source_itself_cost_nothing(self):
        loss = losses.activation_matching(collect, activation_source(), batch=True)
        # Of so many rows n and n - 1 are nearly the same.
        rows = np.tile(ROWS, (500, 1, 1))
        assert quickly(loss, 1.5, rows, KEY) < 1e-3 * quickly(loss, 0.5, rows, KEY)

    @pytest.mark.parametrize("count", [2, 4])
    def test_few_inputs_have_the_variance_of_the_source_on_average(self, count):
        source = Moments({"a": np.zeros(1)}, {"a": np.zeros(1)})
        loss = losses.activation_matching(lambda p, x: {"a": p * x}, source, batch=True)
        xs = np.random.default_rng(5).normal(size=(4000, count, 1)).astype(np.float32)
        values = quickly(jax.vmap(loss, in_axes=(None, 0, None)), 1.0, xs, KEY)
        means = np.abs(xs.mean(axis=1)).mean()
        np.testing.assert_allclose(2 * values.mean() - means, 1.0, atol=0.05)

    @pytest.mark.parametrize(("x", "batch", "count"), [(XS[0], False, 7), (XS, True, 35)])
    def test_views(self, x, batch, count):
        def build(record):
            def seen(params, inputs):
                record(inputs)
                return collect(params, inputs)

            return losses.activation_matching(
                seen, activation_source(), augment=shift, num_views=7, batch=batch
            )

        value, (views,) = recorded(build, 0.5, x, KEY)
        views = np.asarray(views)
        assert views.shape == (count, 2, 3) and len(np.unique(views[:, 0, 0])) == count
        np.testing.assert_allclose(value, actmad(views), rtol=1e-4)

    def test_gradient(self):
        """By central differences of the NumPy formula."""
        loss = losses.activation_matching(collect, activation_source(), batch=True)
        expected = (actmad(XS, 0.5 + 1e-6) - actmad(XS, 0.5 - 1e-6)) / 2e-6
        np.testing.assert_allclose(quickly(jax.grad(loss), 0.5, XS, KEY), expected, rtol=1e-3)

    def test_one_instance_adapts(self):
        loss = losses.activation_matching(collect, activation_source(), augment=shift, num_views=4)
        adapter = ttt.gradient_adapter(loss, optax.sgd(0.01), select=ttt.select.everything())
        predict = ttt.episodic(adapter, lambda params, x: params, num_steps=2)
        output, info = quickly(predict, jnp.float32(0.5), XS[0], KEY)
        assert info.ok and info.updated and output != 0.5

    def test_stochastic(self):
        def noisy(params, inputs, key):
            return collect(params + jax.random.normal(key), inputs)

        loss = losses.activation_matching(noisy, activation_source(), batch=True, stochastic=True)
        keys = jnp.stack([KEY, KEY, jax.random.key(4)])
        values = quickly(jax.vmap(loss, (None, None, 0)), 0.5, XS, keys)
        assert values[0] == values[1] != values[2]

    @pytest.mark.parametrize("options", [{}, {"augment": shift}, {"num_views": 4}])
    def test_one_instance_needs_views(self, options):
        with raises("activation_matching", "both augment and num_views", "batch=True"):
            losses.activation_matching(collect, activation_source(), **options)

    @pytest.mark.parametrize(("views", "batch"), [(1, False), (0, True), (2.0, True)])
    def test_number_of_views(self, views, batch):
        with raises("num_views", f"at least {1 if batch else 2}", str(views)):
            losses.activation_matching(
                collect, activation_source(), augment=shift, num_views=views, batch=batch
            )

    def test_batch_of_one(self):
        loss = losses.activation_matching(collect, activation_source(), batch=True)
        with raises("at least 2 inputs", "batch of 1", "larger batches"):
            jax.eval_shape(loss, 0.5, XS[:1], KEY)

    def test_batch_of_images(self):
        loss = losses.activation_matching(collect, activation_source(), augment=shift, num_views=2)
        with raises("activation_matching", "one instance", r"\(5, 2, 3, 1\)", "batch=True"):
            jax.eval_shape(loss, 0.5, XS[..., None], KEY)

    @pytest.mark.parametrize(
        "source", [{"mean": 1.0}, (1.0, 2.0), ttt.SourceStatistics(3, "train")]
    )
    def test_source_of_another_form(self, source):
        with raises(r"\['mean', 'centered'\]", "got", "losses.activation_moments"):
            losses.activation_matching(collect, source, batch=True)

    def test_other_layers(self):
        loss = losses.activation_matching(
            lambda params, x: {"first": x, "more": x}, activation_source(), batch=True
        )
        with raises("2 of 3", r"'more': \(5, 2, 3\), not in the source", "'then/0': missing"):
            jax.eval_shape(loss, 0.5, XS, KEY)

    def test_other_shapes(self):
        loss = losses.activation_matching(collect, activation_source(), batch=True)
        with raises("1 of 2", r"'first': \(5, 4, 3\), not \(5, 2, 3\)", "same collect"):
            jax.eval_shape(loss, 0.5, np.ones((5, 4, 3), np.float32), KEY)


def features(params, inputs):
    return inputs * params


@functools.cache
def feature_source():
    return ttt.source_statistics(losses.feature_moments(features), 1.5, Data(VECTORS))


def ttt_plus_plus(rows, source=1.5 * VECTORS, mean_weight=0.7, covariance_weight=0.3):
    """The formula of the paper, by ``np.cov``; the source's covariance is that of its moments."""
    rows, source = np.asarray(rows, np.float64), np.asarray(source, np.float64)
    d = rows.shape[1]
    target = np.cov(rows.T) if len(rows) > 1 else np.zeros((d, d))
    coral = np.sum((np.cov(source.T, ddof=0) - target) ** 2) / (4 * d**2)
    means = np.mean((source.mean(0) - rows.mean(0)) ** 2)
    return covariance_weight * coral + 0.5 * mean_weight * means


def matching(**options):
    weights = {"mean_weight": 0.7, "covariance_weight": 0.3}
    return losses.moment_matching(features, feature_source(), **{**weights, **options})


class TestMomentMatching:
    def test_moments(self):
        found = feature_source().value
        rows = 1.5 * VECTORS.astype(np.float64)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.centered, np.cov(rows.T, bias=True), rtol=1e-5, atol=1e-6)

    def test_by_hand(self):
        """Target (0, 0), (2, 4): mean (1, 2), covariance [[2, 4], [4, 8]]. Source: 0 and I."""
        source = {"mean": np.zeros(2), "centered": np.eye(2)}
        loss = losses.moment_matching(
            features, source, mean_weight=3.0, covariance_weight=2.0, batch=True
        )
        value = quickly(loss, 1.0, np.array([[0.0, 0.0], [2.0, 4.0]], np.float32), KEY)
        expected = 2 * (1 + 16 + 16 + 49) / (4 * 2**2) + 3 / 2 * (1 + 4) / 2
        np.testing.assert_allclose(value, expected, rtol=1e-6)

    def test_batch(self):
        xs = XS[:, 0]
        value = quickly(matching(batch=True), 0.5, xs, KEY)
        np.testing.assert_allclose(value, ttt_plus_plus(0.5 * xs), rtol=1e-4)

    def test_weights_map(self):
        def value(weight):
            return matching(batch=True, mean_weight=weight, covariance_weight=0.0)(
                0.5, XS[:, 0], KEY
            )

        zero, one = quickly(jax.vmap(value), np.array([0.0, 1.0], np.float32))
        assert zero == 0
        np.testing.assert_allclose(one, ttt_plus_plus(0.5 * XS[:, 0], VECTORS * 1.5, 1, 0), 1e-4)

    def test_queue_is_first_in_first_out_and_counts_what_it_holds(self):
        """Five single instances through a queue of three; zeros of free places do not count."""
        loss = matching(queue=3)

        def run(xs):
            def body(memory, x):
                value, memory = loss.value(0.5, memory, x, KEY)
                return loss.after(0.5, memory), (value, memory)

            return jax.lax.scan(body, loss.init(0.5), xs)[1]

        xs = XS[:, 0]
        values, memories = quickly(run, xs)
        for i in range(5):
            held = 0.5 * xs[max(0, i - 3) : i + 1]
            np.testing.assert_allclose(values[i], ttt_plus_plus(held), rtol=1e-4)
        np.testing.assert_array_equal(memories["count"], [1, 2, 3, 3, 3])
        np.testing.assert_array_equal(memories["features"][0], [[0] * 3, [0] * 3, 0.5 * xs[0]])
        np.testing.assert_array_equal(memories["features"][-1], 0.5 * xs[2:])

    @pytest.mark.parametrize("queue", [2, 3, 8])
    def test_batches_shorter_and_longer_than_the_queue(self, queue):
        loss = matching(queue=queue, batch=True)

        def run(first, second):
            _, memory = loss.value(0.5, loss.init(0.5), first, KEY)
            value, memory = loss.value(0.5, memory, second, KEY)
            return value, memory

        first, second = XS[:3, 0], XS[3:, 1]
        value, memory = quickly(run, first, second)
        np.testing.assert_allclose(
            value, ttt_plus_plus(0.5 * np.concatenate([first[-queue:], second])), rtol=1e-4
        )
        assert memory["count"] == min(5, queue)
        both = 0.5 * np.concatenate([first, second])
        held = min(5, queue)
        np.testing.assert_array_equal(memory["features"][-held:], both[-held:])

    def test_only_the_current_features_are_differentiated(self):
        """The gradient is that with the queue as numbers, though the queue came from params."""
        loss = matching(queue=3)
        x, y = XS[0, 0], XS[1, 0]
        exact_x, exact_y = x.astype(np.float64), y.astype(np.float64)

        def two_steps(params):
            _, memory = loss.value(params, loss.init(params), x, KEY)
            return loss.value(params, memory, y, KEY)[0]

        def expected(params):
            return ttt_plus_plus(np.stack([0.5 * exact_x, params * exact_y]))

        difference = (expected(0.5 + 1e-6) - expected(0.5 - 1e-6)) / 2e-6
        np.testing.assert_allclose(quickly(jax.grad(two_steps), 0.5), difference, rtol=1e-3)

    def test_no_gradient_into_the_memory(self):
        loss = matching(queue=3)

        def value(memory):
            return loss.value(0.5, {**memory, "count": jnp.int32(3)}, XS[0, 0], KEY)[0]

        gradient = quickly(jax.grad(value), {"features": XS[1:4, 0]})
        np.testing.assert_array_equal(gradient["features"], np.zeros((3, 3)))

    @pytest.mark.parametrize("num_steps", [1, 2])
    def test_stream(self, num_steps):
        """``online`` equals a loop in NumPy: losses, parameters and a queue that it carries."""
        rate, xs = 0.05, XS[:, 0]
        adapter = ttt.gradient_adapter(
            matching(queue=4), optax.sgd(rate), select=ttt.select.everything()
        )
        stream = ttt.online(
            adapter, lambda params, x: params, num_steps=num_steps, reset=ttt.resets.never()
        )
        keys = ttt.sample_keys(KEY, np.arange(5))
        carry, (outputs, infos), _ = quickly(
            lambda p: scanned(stream, p, xs, keys), jnp.float32(0.5)
        )
        params, queue = 0.5, []
        for i, x in enumerate(xs.astype(np.float64)):
            for s in range(num_steps):

                def value(p, x=x, queue=tuple(queue)):
                    return ttt_plus_plus(np.stack([*queue, p * x]))

                np.testing.assert_allclose(infos.loss[i, s], value(params), rtol=1e-3)
                slope = (value(params + 1e-6) - value(params - 1e-6)) / 2e-6
                queue = [*queue, params * x][-4:]
                params -= rate * slope
            np.testing.assert_allclose(outputs[i], params, rtol=1e-3)
        assert infos.ok.all() and infos.updated.all()
        memory = carry.state.memory
        np.testing.assert_allclose(memory["features"], np.stack(queue), rtol=1e-3)
        assert memory["count"] == 4

    def test_a_poisoned_instance_does_not_enter_the_queue(self):
        adapter = ttt.gradient_adapter(
            matching(queue=4), optax.sgd(0.05), select=ttt.select.everything()
        )
        stream = ttt.online(adapter, lambda params, x: params, reset=ttt.resets.never())
        xs = XS[:3, 0].copy()
        xs[1] = np.nan
        keys = ttt.sample_keys(KEY, np.arange(3))
        carry, (_, infos), _ = quickly(lambda p: scanned(stream, p, xs, keys), jnp.float32(0.5))
        np.testing.assert_array_equal(infos.ok, [True, False, True])
        assert carry.state.memory["count"] == 2
        assert np.isfinite(carry.state.memory["features"]).all()

    def test_one_instance_needs_a_queue(self):
        with raises("moment_matching", "queue = 0", "batch=True"):
            matching()

    @pytest.mark.parametrize("queue", [-1, 2.0, True])
    def test_size_of_the_queue(self, queue):
        with raises("queue", "at least 0", str(queue)):
            matching(queue=queue, batch=True)

    def test_batch_of_one(self):
        with raises("at least 2 feature vectors", "batch of 1", "set queue"):
            jax.eval_shape(matching(batch=True), 0.5, XS[:1, 0], KEY)

    @pytest.mark.parametrize("x", [XS, XS[:, 0, :2]])
    def test_shape_of_features(self, x):
        with raises("moment_matching", r"\[5, 3\]", "got shape", "Pool"):
            jax.eval_shape(matching(batch=True), 0.5, x, KEY)

    def test_source_of_another_form(self):
        with raises(r"\['mean', 'centered'\]", "losses.feature_moments", r"got.*first"):
            losses.moment_matching(
                features,
                activation_source(),
                mean_weight=1.0,
                covariance_weight=1.0,
                batch=True,
            )

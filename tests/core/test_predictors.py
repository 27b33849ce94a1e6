"""Predictors: averages by hand, traces, zero steps, and instances that fail alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, select

from . import models, stepping
from .compiling import quickly, recorded

KEY = jax.random.key(0)
PARAMS = models.make_params()
IMAGES = models.make_images(4)
KEYS = ttt.sample_keys(KEY, np.arange(4))
classify = ttt.unbatched(models.classify)


def rotation_ttt(num_steps, *, rate=0.1, trace=False, loss=None, chosen=None):
    """Each step augments with a key of its own."""
    adapter = ttt.gradient_adapter(
        loss or losses.rotation(models.turn, augment=models.jitter),
        optax.sgd(rate, momentum=0.9),
        select=chosen or select.norm_affine(),
    )
    return ttt.episodic(adapter, classify, num_steps=num_steps, trace=trace)


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(axis=-1, keepdims=True)


class TestSource:
    def test_is_the_model(self):
        output, info = ttt.source(lambda params, x: params * x)(2.0, 3.0, KEY)
        assert output == 6.0
        assert info.loss.shape == info.grad_norm.shape == (0,)
        assert info.ok and not info.updated


class TestAugmented:
    X = np.array([0.5, -1.0, 2.0], np.float32)

    @staticmethod
    def shift(x, key):
        return x + jax.random.normal(key, x.shape)

    def seen(self, **options):
        """The output and the views that the model saw."""

        def build(record):
            def apply(params, x):
                return params * x

            def augment(x, key):
                return self.shift(x, key)

            predict = ttt.augmented(apply, augment, **options)

            def both(params, x, key):
                output, info = predict(params, x, key)
                keys = jax.random.split(key, options["num_views"])
                views = jax.vmap(augment, in_axes=(None, 0))(x, keys)
                record((views, info))
                return output

            return both

        output, ((views, info),) = recorded(build, 1.5, self.X, KEY)
        assert info.loss.shape == (0,) and info.ok and not info.updated
        views = np.array(views)
        if options.get("include_identity", True):
            views[0] = self.X
        return output, views

    @pytest.mark.parametrize("identity", [True, False])
    def test_probability(self, identity):
        """The output is the logarithm of the mean probability: logits like any other."""
        output, views = self.seen(num_views=4, include_identity=identity)
        mean = softmax(1.5 * views).mean(axis=0)
        np.testing.assert_allclose(output, np.log(mean), rtol=1e-5)
        np.testing.assert_allclose(softmax(output), mean, rtol=1e-5)

    @pytest.mark.parametrize("identity", [True, False])
    def test_logit(self, identity):
        output, views = self.seen(num_views=4, include_identity=identity, mean="logit")
        np.testing.assert_allclose(output, 1.5 * views.mean(axis=0), rtol=1e-5)

    def test_the_identity_alone_is_the_source(self):
        output, _ = self.seen(num_views=1, mean="logit")
        np.testing.assert_allclose(output, 1.5 * self.X, rtol=1e-6)

    def test_pytree_instance(self):
        predict = ttt.augmented(
            lambda params, x: x["tokens"] * params,
            lambda x, key: {**x, "tokens": -x["tokens"]},
            num_views=2,
            mean="logit",
        )
        output, _ = quickly(predict, 1.0, {"tokens": self.X, "ids": np.arange(2)}, KEY)
        np.testing.assert_allclose(output, 0, atol=1e-6)

    def test_errors(self):
        with pytest.raises(ValueError, match="num_views must be an integer of at least 1, got 0"):
            ttt.augmented(classify, models.jitter, num_views=0)
        with pytest.raises(ValueError, match="'probability' or 'logit', got 'probs'"):
            ttt.augmented(classify, models.jitter, num_views=2, mean="probs")


class TestVote:
    def test_keys_and_info(self):
        def draw(params, x, key):
            value = jax.random.uniform(key)
            info = ttt.Info(value[None], 2 * value[None], value < 0.9, value > 0.5)
            return {"value": value}, info

        def combine(outputs):
            return outputs["value"]

        outputs, info = quickly(ttt.vote(draw, 3, combine=combine), 1.0, 2.0, KEY)
        expected = [jax.random.uniform(jax.random.fold_in(KEY, i)) for i in range(3)]
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
        np.testing.assert_allclose(info.loss, [np.mean(expected)], rtol=1e-6)
        np.testing.assert_allclose(info.grad_norm, [2 * np.mean(expected)], rtol=1e-6)
        assert info.ok == (np.max(expected) < 0.9) and info.updated == (np.max(expected) > 0.5)

    def test_majority_over_adapted_predictions(self):
        predict = ttt.vote(rotation_ttt(1), 3, combine=lambda logits: logits.mean(axis=0))

        def both(params, x, key):
            def single(i):
                return rotation_ttt(1)(params, x, jax.random.fold_in(key, i))[0]

            return predict(params, x, key)[0], jax.lax.map(single, jnp.arange(3)).mean(axis=0)

        voted, mean = quickly(both, PARAMS, IMAGES[0], KEY)
        ttt.audit.require_close(voted, mean)

    def test_errors(self):
        with pytest.raises(ValueError, match="num_votes must be an integer of at least 1, got 0"):
            ttt.vote(rotation_ttt(1), 0, combine=lambda x: x)


class TestEpisodic:
    def test_one_step_by_hand(self):
        """``w <- w - 0.1 (w - x)``, then predict ``w``."""
        adapter = ttt.gradient_adapter(
            lambda params, x, key: 0.5 * jnp.sum((params - x) ** 2),
            optax.sgd(0.1),
            select=select.everything(),
        )
        predict = ttt.episodic(adapter, lambda params, x: params, num_steps=2)
        output, info = quickly(predict, jnp.asarray([1.0, 2.0]), np.array([0.0, 4.0]), KEY)
        np.testing.assert_allclose(output, [0.81, 4 - 2 * 0.81], rtol=1e-5)
        np.testing.assert_allclose(info.loss, [2.5, 2.5 * 0.81], rtol=1e-5)
        np.testing.assert_allclose(info.grad_norm, np.sqrt([5, 5 * 0.81]), rtol=1e-5)
        assert info.ok and info.updated

    def test_trace_entries_are_the_runs_with_fewer_steps(self):
        """Under vmap and in the loop alike."""

        def run(xs, keys):
            path, infos = ttt.batched(rotation_ttt(2, trace=True))(PARAMS, xs, keys)
            single = rotation_ttt(2, trace=True)(PARAMS, xs[0], keys[0])[0]
            return (
                path,
                infos,
                single,
                [ttt.batched(rotation_ttt(k))(PARAMS, xs, keys) for k in range(3)],
            )

        path, infos, single, apart = quickly(run, IMAGES, KEYS)
        assert path.shape == (4, 3, models.CLASSES)
        for k, (outputs, info) in enumerate(apart):
            ttt.audit.require_close(path[:, k], outputs, num_steps=k)
            ttt.audit.require_close(infos.loss[:, :k], info.loss, num_steps=k)
            assert info.loss.shape == (4, k) and (info.updated == (k > 0)).all()
        ttt.audit.require_close(path[0], single, num_steps=2)
        assert (np.abs(np.diff(path, axis=1)).max(axis=-1) > 1e-4).all()

    @pytest.mark.parametrize("trace", [False, True])
    def test_zero_steps_are_the_source_bit_for_bit(self, trace):
        def both(params, x, key):
            output, info = rotation_ttt(0, trace=trace)(params, x, key)
            return (output[0] if trace else output), ttt.source(classify)(params, x, key)[0], info

        output, source, info = quickly(both, PARAMS, IMAGES[0], KEY)
        np.testing.assert_array_equal(output, source)
        assert info.loss.shape == (0,) and info.ok and not info.updated

    def test_trace_of_a_pytree_output(self):
        adapter = ttt.gradient_adapter(
            losses.entropy(models.classify), optax.sgd(0.1), select=select.norm_affine()
        )

        def apply(params, x):
            logits = classify(params, x)
            return {"logits": logits, "label": logits.argmax()}

        predict = ttt.episodic(adapter, apply, num_steps=2, trace=True)
        output, _ = jax.eval_shape(predict, PARAMS, IMAGES[0], KEY)
        assert output["logits"].shape == (3, models.CLASSES) and output["label"].shape == (3,)

    @pytest.mark.parametrize("steps", [-1, 2.0, True])
    def test_number_of_steps(self, steps):
        with pytest.raises(ValueError, match=f"num_steps must be an integer.*got {steps}"):
            rotation_ttt(steps)

    def test_numpy_integers_count_steps(self):
        assert jax.eval_shape(rotation_ttt(np.int64(2)), PARAMS, IMAGES[0], KEY)[1].ok.shape == ()


class TestFailures:
    """One instance among others goes wrong; it says so, falls back, and the rest never notice."""

    RATES = np.array([0.1, 0.1, 1e38, 0.1], np.float32)

    @staticmethod
    def over_rates(num_steps, trace=False):
        def one(x, key, rate):
            chosen = select.everything()
            predict = rotation_ttt(num_steps, rate=rate, trace=trace, chosen=chosen)
            return predict(PARAMS, x, key), ttt.source(classify)(PARAMS, x, key)[0]

        return jax.vmap(one)

    @pytest.mark.parametrize("num_steps", [1, 2])
    def test_a_huge_step_size(self, num_steps):
        """With one step loss and gradient are finite; only the updated parameters are not."""

        def both(xs, keys, good, bad):
            run = self.over_rates(num_steps)
            return jax.lax.map(lambda rates: run(xs, keys, rates), jnp.stack([good, bad]))

        good = np.full(4, 0.1, np.float32)
        (outputs, infos), source = quickly(both, IMAGES, KEYS, good, self.RATES)
        healthy = np.array([0, 1, 3])
        for leaf in jax.tree.leaves((outputs, infos)):
            np.testing.assert_array_equal(leaf[0, healthy], leaf[1, healthy])
        np.testing.assert_array_equal(infos.ok, [[True] * 4, [True, True, False, True]])
        np.testing.assert_array_equal(infos.updated, infos.ok)
        assert np.isfinite(outputs).all()
        ttt.audit.require_close(outputs[1, 2], source[1, 2], num_steps=0)
        assert np.isfinite(infos.loss[1, 2, 0])

    def test_trace_falls_back_from_the_failing_step_on(self):
        def falls_over(params, x, key):
            """Fine for two steps, then nan: the first weight has passed a mark."""
            first = params["params"]["norm"]["scale"][0]
            return jnp.where(first > start - 0.25, first, jnp.nan)

        start = PARAMS["params"]["norm"]["scale"][0]

        def run(x, key):
            traced = rotation_ttt(4, trace=True, loss=falls_over)(PARAMS, x, key)
            return traced, [rotation_ttt(k, loss=falls_over)(PARAMS, x, key)[0] for k in range(5)]

        (path, info), apart = quickly(run, IMAGES[0], KEY)
        for k in range(5):
            ttt.audit.require_close(path[k], apart[k], num_steps=k)
        np.testing.assert_array_equal(np.isfinite(info.loss), [True, True, False, False])
        assert not info.ok and not info.updated
        assert np.abs(path[2] - path[0]).max() > 1e-4
        ttt.audit.require_close(path[3:], np.stack([path[0]] * 2), num_steps=0)

    def test_nan_input(self):
        xs = IMAGES.at[1].set(jnp.nan)

        def both(xs):
            return jax.lax.map(lambda x: ttt.batched(rotation_ttt(2))(PARAMS, x, KEYS), xs)

        outputs, infos = quickly(both, jnp.stack([IMAGES, xs]))
        healthy = np.array([0, 2, 3])
        for leaf in jax.tree.leaves((outputs, infos)):
            np.testing.assert_array_equal(leaf[0, healthy], leaf[1, healthy])
        np.testing.assert_array_equal(infos.ok[1], [True, False, True, True])

    def test_a_skipped_instance_is_ok_and_not_updated(self):
        adapter = ttt.filtered(
            ttt.gradient_adapter(
                losses.entropy(models.classify), optax.sgd(0.1), select=select.norm_affine()
            ),
            lambda params, x, key: x[0, 0, 0] > 0,
        )
        predict = ttt.episodic(adapter, classify, num_steps=2)

        def both(xs, keys):
            return ttt.batched(predict)(PARAMS, xs, keys), models.classify(PARAMS, xs)

        (outputs, info), source = quickly(both, IMAGES, KEYS)
        kept = np.asarray(IMAGES[:, 0, 0, 0] > 0)
        assert kept.any() and not kept.all()
        assert info.ok.all()
        np.testing.assert_array_equal(info.updated, kept)
        ttt.audit.require_close(outputs[~kept], source[~kept], num_steps=0)


class TestTracedHyperParameters:
    """``vmap`` over a hyper-parameter by building the predictor inside the mapped function."""

    def check(self, build, values):
        self.compare(lambda value: build(value)(PARAMS, IMAGES[0], KEY)[0], values)

    def compare(self, one, values):
        rows = quickly(jax.vmap(one), np.asarray(values, np.float32))
        apart = quickly(lambda: [one(value) for value in values])
        ttt.audit.require_close(rows, np.stack(apart), num_steps=2)
        assert len(np.unique(np.asarray(rows)[:, 0])) == len(values)

    def test_learning_rate(self):
        self.check(lambda rate: rotation_ttt(1, rate=rate), [0.0, 0.01, 0.3])

    def check_steps(self, build, values):
        """On the three weights of ``stepping``."""

        def one(value):
            predict = ttt.episodic(build(value), lambda params, x: params["w"], num_steps=2)
            return predict(stepping.PARAMS, 0.7, KEY)[0]

        self.compare(one, values)

    def test_anchor(self):
        self.check_steps(lambda anchor: stepping.sgd(anchor=anchor), [0.0, 1.0, 5.0])

    def test_rho(self):
        def build(rho):
            return ttt.sharpness_aware_adapter(
                stepping.quartic, optax.sgd(0.01), select=stepping.ALL_W, rho=rho
            )

        self.check_steps(build, [0.0, 0.1, 0.5])

    def test_threshold(self):
        def build(threshold):
            adapter = ttt.gradient_adapter(
                losses.pseudo_label(models.classify, threshold=threshold),
                optax.sgd(0.5),
                select=select.biases(),
            )
            return ttt.episodic(adapter, classify, num_steps=1)

        self.check(build, [0.0, 0.99999])

    def test_weights_of_losses(self):
        def build(weight):
            loss = losses.weighted(
                (weight, losses.entropy(models.classify)), (1.0, losses.rotation(models.turn))
            )
            adapter = ttt.gradient_adapter(loss, optax.sgd(0.1), select=select.norm_affine())
            return ttt.episodic(adapter, classify, num_steps=1)

        self.check(build, [0.0, 1.0, -3.0])

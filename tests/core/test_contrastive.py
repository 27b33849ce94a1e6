"""NT-Xent against sums written out pair by pair in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from ttt_jax import losses

from .compiling import quickly, recorded

KEY = jax.random.key(3)
XS = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
BANK = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)


def scale(params, inputs):
    return inputs * params


def jitter(x, key):
    return x + jax.random.normal(key, x.shape)


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a @ b / np.sqrt((a @ a) * (b @ b))


def nt_xent(views, temperature, bank=()):
    """``views``: ``[2N, D]``, the two views of an instance one after the other."""
    values = []
    for i, view in enumerate(views):
        partner = views[i + 1 if i % 2 == 0 else i - 1]
        others = [v for k, v in enumerate(views) if k != i] + list(bank)
        total = sum(np.exp(cosine(view, other) / temperature) for other in others)
        values.append(-np.log(np.exp(cosine(view, partner) / temperature) / total))
    return np.mean(values)


def seen(x, **options):
    """The value of the loss and the views that the model function was given."""

    def build(record):
        def apply(params, inputs):
            record(inputs)
            return inputs * params

        return losses.contrastive(apply, jitter, **options)

    value, (views,) = recorded(build, 0.7, x, KEY)
    return value, np.asarray(views)


def raises(*words):
    return pytest.raises(ValueError, match=r"(?s)" + ".*".join(words))


class TestValue:
    def test_by_hand(self):
        """Equal views (1, 0) against a bank of (0, 3): cosines 1 and 0, temperature 1."""
        loss = losses.contrastive(
            scale, lambda x, key: x, temperature=1.0, bank=np.array([[0.0, 3.0]])
        )
        value = quickly(loss, 1.0, np.array([2.0, 0.0], np.float32), KEY)
        np.testing.assert_allclose(value, np.log(1 + np.exp(-1)), rtol=1e-6)

    @pytest.mark.parametrize("temperature", [0.5, 0.1])
    def test_batch(self, temperature):
        value, views = seen(XS, batch=True, temperature=temperature)
        assert views.shape == (6, 4) and len(np.unique(views[:, 0])) == 6
        # Two views of an instance are neighbors: both lie around it.
        assert np.abs(views.reshape(3, 2, 4) - XS[:, None]).max() < 4
        np.testing.assert_allclose(value, nt_xent(views, temperature), rtol=1e-4)

    def test_one_instance_against_a_bank(self):
        value, views = seen(XS[0], bank=BANK)
        assert views.shape == (2, 4)
        np.testing.assert_allclose(value, nt_xent(views, 0.5, BANK), rtol=1e-4)

    def test_batch_and_bank(self):
        value, views = seen(XS, bank=BANK, batch=True)
        np.testing.assert_allclose(value, nt_xent(views, 0.5, BANK), rtol=1e-4)

    def test_pairs_of_a_batch(self):
        """Views of an instance are each other's positives: without noise only they are near."""
        rows = 3 * np.eye(4, dtype=np.float32)
        loss = losses.contrastive(scale, lambda x, key: x, temperature=0.05, batch=True)
        assert quickly(loss, 1.0, rows, KEY) < 1e-6

    def test_lengths_do_not_matter(self):
        loss = losses.contrastive(scale, jitter, bank=BANK)
        longer = losses.contrastive(scale, jitter, bank=100 * BANK)
        short, long = quickly(lambda x: (loss(0.7, x, KEY), longer(7.0, x, KEY)), XS[0])
        np.testing.assert_allclose(short, long, rtol=1e-5)

    def test_bank_of_source_statistics(self):
        class Data:
            split = "train"

            def __iter__(self):
                return iter([BANK[:2], BANK[2:]])

        bank = ttt.source_statistics(lambda p, b: b, None, Data(), reduce="concatenate")
        stored = losses.contrastive(scale, jitter, bank=bank)
        plain = losses.contrastive(scale, jitter, bank=BANK)
        found, expected = quickly(lambda x: (stored(0.7, x, KEY), plain(0.7, x, KEY)), XS[0])
        assert found == expected

    def test_temperature_maps(self):
        def value(temperature):
            return losses.contrastive(scale, jitter, temperature=temperature, bank=BANK)(
                0.7, XS[0], KEY
            )

        found = quickly(jax.vmap(value), np.array([0.5, 0.1], np.float32))
        _, views = seen(XS[0], bank=BANK)
        np.testing.assert_allclose(found, [nt_xent(views, t, BANK) for t in (0.5, 0.1)], rtol=1e-4)

    def test_stochastic(self):
        def noisy(params, inputs, key):
            return inputs + jax.random.normal(key, inputs.shape)

        loss = losses.contrastive(noisy, lambda x, key: x, bank=BANK, stochastic=True)
        keys = jnp.stack([KEY, KEY, jax.random.key(4)])
        values = quickly(jax.vmap(loss, (None, None, 0)), 0.5, XS[0], keys)
        assert values[0] == values[1] != values[2]


class TestGradient:
    WEIGHTS = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)

    def test_bank_is_a_constant(self):
        """A bank made with the parameters moves nothing; the views do."""

        def value(bank_params, params):
            bank = jnp.asarray(BANK) @ bank_params
            return losses.contrastive(lambda p, x: x @ p, jitter, bank=bank)(params, XS[0], KEY)

        into_bank, into_views = quickly(jax.grad(value, (0, 1)), self.WEIGHTS, self.WEIGHTS)
        np.testing.assert_array_equal(into_bank, np.zeros((4, 4)))
        assert np.abs(into_views).max() > 1e-3

    def test_both_views_are_differentiated(self):
        """By central differences of the NumPy formula."""
        _, views = seen(XS, batch=True)
        loss = losses.contrastive(lambda p, x: x @ p, jitter, batch=True)
        gradient = quickly(jax.grad(loss), self.WEIGHTS, XS, KEY)
        rows, expected = views.astype(np.float64), np.zeros((4, 4))
        for place in np.ndindex(4, 4):
            step = np.zeros((4, 4))
            step[place] = 1e-6
            ends = [nt_xent(rows @ (self.WEIGHTS + sign * step), 0.5) for sign in (1, -1)]
            expected[place] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)

    def test_an_output_of_zeros_has_a_finite_gradient(self):
        loss = losses.contrastive(scale, lambda x, key: x, bank=BANK)
        value, gradient = quickly(jax.value_and_grad(loss), 0.0, XS[0], KEY)
        np.testing.assert_allclose(value, np.log(6), rtol=1e-5)
        assert np.isfinite(gradient)


class TestErrors:
    def test_one_instance_needs_a_bank(self):
        with raises("negatives", "bank = None", r"\[M, D\]", "batch=True"):
            losses.contrastive(scale, jitter)

    @pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 2, 4)])
    def test_shape_of_the_bank(self, shape):
        with raises("bank", r"\[M, D\]", "M >= 1", str(shape).replace("(", r"\(")[:-1]):
            losses.contrastive(scale, jitter, bank=np.ones(shape, np.float32))

    def test_batch_of_one(self):
        with raises("at least 2 instances", "batch of 1", "pass a bank"):
            jax.eval_shape(losses.contrastive(scale, jitter, batch=True), 1.0, XS[:1], KEY)

    def test_width_of_the_bank(self):
        loss = losses.contrastive(scale, jitter, bank=BANK[:, :3])
        with raises("contrastive", r"\[2, 3\]", r"\(2, 4\)"):
            jax.eval_shape(loss, 1.0, XS[0], KEY)

    def test_batch_of_images(self):
        loss = losses.contrastive(scale, jitter, bank=BANK)
        with raises("contrastive", "one instance", r"\(3, 6, 6, 1\)", "batch=True"):
            jax.eval_shape(loss, 1.0, np.ones((3, 6, 6, 1), np.float32), KEY)

    def test_outputs_are_vectors(self):
        loss = losses.contrastive(scale, jitter, bank=BANK)
        with raises("contrastive", r"\(2, 6, 6, 1\)", "Pool"):
            jax.eval_shape(loss, 1.0, np.ones((6, 6, 1), np.float32), KEY)

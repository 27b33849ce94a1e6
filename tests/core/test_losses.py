"""The losses against numbers computed independently, in NumPy or by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from ttt_jax import losses
from ttt_jax.losses.rotation import rotate

from .compiling import quickly, recorded

KEY = jax.random.key(3)
WEIGHTS = np.random.default_rng(0).normal(size=(36, 4)).astype(np.float32) / 6
IMAGE = np.random.default_rng(1).normal(size=(6, 6, 1)).astype(np.float32)
IMAGES = np.random.default_rng(2).normal(size=(3, 6, 6, 1)).astype(np.float32)


def linear(params, images):
    return images.reshape(images.shape[0], -1) @ params


def identity(params, inputs):
    return inputs * params


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def entropy_of(logits):
    log_p = log_softmax(logits)
    return -(np.exp(log_p) * log_p).sum(-1)


def rotation_values(image):
    """Cross-entropy of each of the four rotations of one image."""
    turned = np.stack([np.rot90(image, k) for k in range(4)])
    return -log_softmax(linear(WEIGHTS, turned))[np.arange(4), np.arange(4)]


class TestRotation:
    def test_direction_is_that_of_rot90(self):
        image = np.arange(2 * 2 * 3).reshape(2, 2, 3)
        turned = quickly(jax.vmap(rotate, in_axes=(None, 0)), image, np.arange(4))
        np.testing.assert_array_equal(turned, [np.rot90(image, turns) for turns in range(4)])

    def test_four_rotations_and_the_mean_over_a_batch(self):
        def both(weights, image, images):
            one, many = losses.rotation(linear), losses.rotation(linear, batch=True)
            return one(weights, image, KEY), many(weights, images, KEY)

        one, many = quickly(both, WEIGHTS, IMAGE, IMAGES)
        np.testing.assert_allclose(one, rotation_values(IMAGE).mean(), rtol=1e-5)
        expected = np.mean([rotation_values(image) for image in IMAGES])
        np.testing.assert_allclose(many, expected, rtol=1e-5)

    def test_copies_draw_their_rotation_uniformly(self):
        """One copy gives one of the four values, each for a quarter of the keys."""
        loss = losses.rotation(linear, copies=1)
        keys = jax.random.split(KEY, 2000)
        drawn = np.asarray(quickly(jax.vmap(loss, (None, None, 0)), WEIGHTS, IMAGE, keys))
        gaps = np.abs(drawn[:, None] - rotation_values(IMAGE)[None])
        assert gaps.min(axis=1).max() < 1e-5
        shares = np.bincount(gaps.argmin(axis=1), minlength=4) / len(drawn)
        np.testing.assert_allclose(shares, 0.25, atol=0.04)

    def test_copies_average(self):
        """The mean of V copies is that of a multiset of V of the four values."""
        value = float(quickly(losses.rotation(linear, copies=3), WEIGHTS, IMAGE, KEY))
        four = rotation_values(IMAGE)
        possible = itertools.combinations_with_replacement(four, 3)
        assert min(abs(np.mean(chosen) - value) for chosen in possible) < 1e-5

    def test_copies_are_augmented_one_by_one_and_rotations_once(self):
        def shift(image, key):
            return image + jax.random.normal(key)

        def seen_with(copies):
            def build(record):
                def apply(params, images):
                    record(images)
                    return linear(params, images)

                return losses.rotation(apply, augment=shift, copies=copies)

            (images,) = recorded(build, WEIGHTS, IMAGE, KEY)[1]
            return np.asarray(images).mean(axis=(1, 2, 3))

        once, each = seen_with(None), seen_with(3)
        assert abs(once[0] - IMAGE.mean()) > 1e-3
        np.testing.assert_allclose(once, once[0], rtol=1e-4)
        assert len(np.unique(each.round(4))) == 3

    def test_stochastic_model_function_gets_a_key(self):
        def noisy(params, images, key):
            return linear(params, images) + jax.random.normal(key, (images.shape[0], 4))

        loss = losses.rotation(noisy, stochastic=True)
        keys = jnp.stack([KEY, KEY, jax.random.key(4)])
        values = quickly(jax.vmap(loss, (None, None, 0)), WEIGHTS, IMAGE, keys)
        assert values[0] == values[1] != values[2]


class TestMaskedReconstruction:
    """A model function that reports what it was given, and a decoder of constants."""

    @staticmethod
    def patches(image, patch):
        rows = range(0, image.shape[0], patch)
        columns = range(0, image.shape[1], patch)
        return np.stack(
            [image[i : i + patch, j : j + patch].ravel() for i in rows for j in columns]
        )

    # Each patch size and either target; the rest of their product in the full run.
    @pytest.mark.parametrize(
        ("patch", "ratio", "normalize"),
        [
            (3, 0.75, True),
            (2, 0.5, False),
            (1, 0.9, True),
            pytest.param(3, 0.75, False, marks=pytest.mark.full),
            pytest.param(2, 0.5, True, marks=pytest.mark.full),
            pytest.param(1, 0.9, False, marks=pytest.mark.full),
        ],
    )
    def test_value(self, patch, ratio, normalize):
        image = np.random.default_rng(5).normal(2, 3, size=(6, 6, 2)).astype(np.float32)
        count, width = (6 // patch) ** 2, patch * patch * 2
        output = np.random.default_rng(6).normal(size=(1, count, width)).astype(np.float32)

        def build(record):
            def apply(params, images, keep):
                record((images, keep))
                return params

            return losses.masked_reconstruction(
                apply, patch=patch, mask_ratio=ratio, normalize=normalize
            )

        value, seen = recorded(build, output, image, KEY)
        images, keep = (np.asarray(array) for array in seen[0])
        np.testing.assert_array_equal(images, image[None])
        assert keep.shape == (1, int(count * (1 - ratio) + 1e-9))
        assert (np.diff(keep[0]) > 0).all() and set(keep[0]) <= set(range(count))
        target = self.patches(image, patch).astype(np.float64)
        if normalize:
            spread = np.sqrt(target.var(axis=1, ddof=1, keepdims=True) + 1e-6)
            target = (target - target.mean(axis=1, keepdims=True)) / spread
        hidden = np.setdiff1d(np.arange(count), keep[0])
        expected = np.square(output[0] - target)[hidden].mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_masks_are_independent_and_all_go_through_one_call(self):
        def seen_with(x, **options):
            def build(record):
                def apply(params, images, keep):
                    record(keep)
                    return jnp.zeros((images.shape[0], 9, 4))

                return losses.masked_reconstruction(apply, patch=2, mask_ratio=0.5, **options)

            (keep,) = recorded(build, 0.0, x, KEY)[1]
            return np.asarray(keep)

        assert seen_with(IMAGES, num_masks=2, batch=True).shape == (6, 4)
        keep = seen_with(IMAGE, num_masks=20)
        assert keep.shape == (20, 4)
        assert len({tuple(row) for row in keep}) > 10

    def test_batch_averages_over_images(self):
        """With a decoder of zeros the loss is the mean square of the target, mask or no mask."""

        def apply(params, images, keep):
            return jnp.zeros((images.shape[0], 4, 9))

        loss = losses.masked_reconstruction(apply, patch=3, batch=True)
        # Normalized targets have the mean square (D - 1) / D.
        np.testing.assert_allclose(quickly(loss, 0.0, IMAGES, KEY), 8 / 9, rtol=1e-4)

    def test_stochastic_model_function_gets_the_key_last(self):
        def apply(params, images, keep, key):
            return params * jax.random.normal(key, (images.shape[0], 4, 9))

        loss = losses.masked_reconstruction(apply, patch=3, stochastic=True)
        keys = jnp.stack([KEY, KEY, jax.random.key(4)])
        values = quickly(jax.vmap(loss, (None, None, 0)), 10.0, IMAGE, keys)
        assert values[0] == values[1] != values[2]


class TestEntropy:
    LOGITS = np.array([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0], [-1.0, 4.0, 0.5]], np.float32)

    def test_means_over_instances_and_over_middle_axes(self):
        middle = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)

        def each(logits, middle):
            one, many = losses.entropy(identity), losses.entropy(identity, batch=True)
            return one(1.0, logits[0], KEY), many(1.0, logits, KEY), one(1.0, middle, KEY)

        values = quickly(each, self.LOGITS, middle)
        exact = entropy_of(self.LOGITS)
        expected = [exact[0], exact.mean(), entropy_of(middle).mean()]
        np.testing.assert_allclose(values, expected, rtol=1e-5)

    def test_weights(self):
        """The denominator is max(sum w, 1): a batch of doubtful instances makes a small step."""

        def value(weights):
            loss = losses.entropy(identity, weight=lambda logits: weights, batch=True)
            return loss(1.0, self.LOGITS, KEY)

        rows = np.array([[0.5, 0.0, 2.0], [0.2, 0.1, 0.0], [0.0, 0.0, 0.0]], np.float32)
        values = quickly(jax.vmap(value), rows)
        expected = rows @ entropy_of(self.LOGITS) / np.maximum(rows.sum(axis=1), 1)
        np.testing.assert_allclose(values, expected, rtol=1e-5)

    def test_weights_are_constants_of_the_gradient(self):
        def weight(logits):
            return jax.nn.softmax(logits).max(axis=-1)

        frozen = np.exp(log_softmax(self.LOGITS * 0.7)).max(axis=-1).astype(np.float32)
        moving = losses.entropy(identity, weight=weight, batch=True)
        constant = losses.entropy(identity, weight=lambda logits: frozen, batch=True)

        def both(params):
            return [jax.grad(loss)(params, self.LOGITS, KEY) for loss in (moving, constant)]

        gradient, expected = quickly(both, 0.7)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)

    def test_all_zero_weights_have_a_gradient_of_exactly_zero(self):
        loss = losses.entropy(identity, weight=lambda z: jnp.zeros(len(z)), batch=True)
        assert quickly(jax.grad(loss), 0.7, self.LOGITS, KEY) == 0

    @pytest.mark.parametrize("name", ["entropy", "marginal_entropy", "reliable_entropy"])
    def test_a_class_that_is_left_out(self, name):
        """A logit of -inf is a class with probability 0: value and gradient of the others."""
        build = {
            "entropy": losses.entropy,
            "marginal_entropy": lambda apply: losses.marginal_entropy(
                apply, lambda x, key: x, num_views=2
            ),
            "reliable_entropy": lambda apply: losses.reliable_entropy(apply, margin=2.0),
        }[name]
        x = jnp.array([0.3, -0.2, 0.9])

        def some(params, inputs):
            left_out = jnp.full((inputs.shape[0], 1), -jnp.inf)
            return jnp.concatenate([inputs * params, left_out], axis=1)

        def both(params):
            return [jax.value_and_grad(build(apply))(params, x, KEY) for apply in (some, identity)]

        found, expected = quickly(both, 2.0)
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_computed_in_float32(self):
        loss = losses.entropy(identity, batch=True)
        logits = self.LOGITS.astype(jnp.bfloat16)
        low = quickly(loss, jnp.bfloat16(1), logits, KEY)
        assert low.dtype == jnp.float32
        exact = entropy_of(logits.astype(np.float32)).mean()
        np.testing.assert_allclose(low, exact, rtol=1e-5)

    def test_pytree_instance(self):
        def masked(params, inputs):
            return jnp.where(inputs["mask"], inputs["tokens"], params)

        x = {"tokens": np.array([1.0, 2.0, 3.0]), "mask": np.array([True, False, True])}
        value = quickly(losses.entropy(masked), -1e9, x, KEY)
        np.testing.assert_allclose(value, entropy_of([1.0, 3.0]), rtol=1e-5)


class TestMarginalEntropy:
    @staticmethod
    def marginal(logits):
        mean = np.exp(log_softmax(logits)).mean(axis=-2)
        return -(mean * np.log(mean)).sum(-1)

    def test_value(self):
        value, views = self.seen(np.array([0.5, -1.0, 2.0], np.float32), num_views=7)
        assert views.shape == (7, 3) and len(np.unique(views[:, 0])) == 7
        np.testing.assert_allclose(value, self.marginal(views), rtol=1e-5)

    def test_batch_averages_over_instances_not_views(self):
        xs = np.arange(6, dtype=np.float32).reshape(2, 3)
        value, views = self.seen(xs, num_views=4, batch=True)
        expected = self.marginal(views.reshape(2, 4, 3)).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    @staticmethod
    def seen(x, **options):
        def build(record):
            def apply(params, views):
                record(views)
                return views

            def augment(x, key):
                return x + jax.random.normal(key, x.shape)

            return losses.marginal_entropy(apply, augment, **options)

        value, (views,) = recorded(build, 0.0, x, KEY)
        return value, np.asarray(views)

    def test_confident_views_that_disagree_have_a_high_marginal_entropy(self):
        def pick(x, key):
            return 50 * jax.nn.one_hot(jax.random.randint(key, (), 0, 3), 3)

        loss = losses.marginal_entropy(identity, pick, num_views=300)
        np.testing.assert_allclose(quickly(loss, 1.0, np.zeros(3), KEY), np.log(3), atol=0.02)


class TestPseudoLabel:
    def test_value(self):
        logits = np.array([[0.0, 1.0, 3.0], [2.0, 2.1, 2.0], [-1.0, 4.0, 0.5]], np.float32)
        log_p = log_softmax(logits)
        thresholds = (0.0, 0.5, 0.9, 1.0)

        def each(logits):
            built = [losses.pseudo_label(identity, threshold=t, batch=True) for t in thresholds]
            return [loss(1.0, logits, KEY) for loss in built]

        for threshold, value in zip(thresholds, quickly(each, logits), strict=True):
            kept = np.exp(log_p.max(-1)) >= threshold
            expected = (kept * -log_p.max(-1)).sum() / max(kept.sum(), 1)
            np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_threshold_maps(self):
        def value(threshold):
            loss = losses.pseudo_label(identity, threshold=threshold)
            return loss(1.0, jnp.array([0.0, 1.0, 3.0]), KEY)

        low, high = quickly(jax.vmap(value), np.array([0.1, 0.99], np.float32))
        assert low > 0 and high == 0


class TestWeighted:
    def test_sum_and_keys(self):
        def noise(params, x, key):
            return params * jax.random.normal(key)

        loss = losses.weighted((2.0, noise), (-1.0, noise), (0.5, lambda p, x, k: p * x))
        draws = [jax.random.normal(jax.random.fold_in(KEY, j)) for j in range(2)]
        expected = 3.0 * (2 * draws[0] - draws[1] + 0.5 * 5.0)
        np.testing.assert_allclose(quickly(loss, 3.0, 5.0, KEY), expected, rtol=1e-5)

    def test_weights_map(self):
        def value(w):
            return losses.weighted((w, lambda p, x, k: p), (1.0, lambda p, x, k: x))(2.0, 3.0, KEY)

        np.testing.assert_allclose(quickly(jax.vmap(value), np.array([0.0, 10.0])), [3.0, 23.0])

    def test_with_a_memory(self):
        counter = ttt.StatefulLoss(
            init=lambda params: params * 0,
            value=lambda params, memory, x, key: (params * memory, memory + x),
            after=lambda adapted, memory: memory + 100 * adapted,
        )
        loss = losses.weighted((3.0, counter), (1.0, lambda p, x, k: p))
        assert isinstance(loss, ttt.StatefulLoss)
        memory = loss.init(2.0)
        value, memory = loss.value(2.0, memory, 5.0, KEY)
        assert value == 2.0
        memory = loss.after(1.0, memory)
        value, memory = loss.value(2.0, memory, 5.0, KEY)
        assert value == 3 * 2 * 105 + 2
        assert memory == (110.0, ())


class TestOverBatch:
    def test_mean_with_one_key_per_instance(self):
        def noisy(params, x, key):
            return params * x["a"].sum() + jax.random.normal(key)

        xs = {"a": np.arange(6.0, dtype=np.float32).reshape(3, 2)}
        draws = jax.vmap(jax.random.normal)(jax.random.split(KEY, 3))
        assert len(np.unique(draws)) == 3
        value = quickly(losses.over_batch(noisy), 2.0, xs, KEY)
        np.testing.assert_allclose(value, 2 * 15 / 3 + draws.mean(), rtol=1e-6)

    def test_equals_the_batch_form(self):
        def both(*args):
            lifted = losses.over_batch(losses.rotation(linear))(*args)
            return lifted, losses.rotation(linear, batch=True)(*args)

        lifted, batch = quickly(both, WEIGHTS, IMAGES, KEY)
        np.testing.assert_allclose(lifted, batch, rtol=1e-5)


def test_a_pseudo_label_is_one_class_where_classes_tie():
    grad = jax.grad(lambda x: losses.pseudo_label(identity)(1.0, x, KEY))(jnp.zeros(3))
    np.testing.assert_allclose(grad, [-2 / 3, 1 / 3, 1 / 3], rtol=1e-6)

"""Denoising, NT-Xent, TTT++ and ActMAD against NumPy in float64: whole steps and predictions.

``golden_features`` is the other implementation. Step sizes are chosen so that a few steps move the
model far beyond the tolerance.
"""

import jax
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, methods, select

from . import golden, golden_features
from .compiling import quickly
from .golden_models import (
    BATCHES,
    FEATURES,
    IMAGES,
    KEYS,
    SHARED,
    SIZE,
    brightness,
    classify,
    decode,
    drawn,
    episodes,
    project,
    shared,
    with_weights,
)
from .streaming import rows, scanned

SOURCE = golden.flat(FEATURES)
DECODER, PROJECTION = (
    (*SHARED, f"{head}/kernel", f"{head}/bias") for head in ("decoder", "projection")
)
TEMPERATURE = 0.3
RNG = np.random.default_rng(4)
# Of the source: representations, and moments of other images with the weights before any step.
BANK = RNG.normal(size=(5, 4)).astype(np.float32)
TRAINING = RNG.normal(0.2, 0.8, size=(30, *IMAGES.shape[1:])).astype(np.float32)
ACTIVATIONS = [
    (layer.mean(axis=0), layer.var(axis=0))
    for layer in golden_features.activations(SOURCE, TRAINING.astype(np.float64))
]
MOMENTS = {
    place: golden_features.moments(values)
    for place, values in golden_features.features(SOURCE, TRAINING.astype(np.float64)).items()
}
# Of the sets of source images that the distances are in units of.
COUNT = 7


def units(covariance):
    """One over what the distances of mean and covariance are between two sets of images."""
    width, trace = len(covariance), np.trace(covariance)
    of_mean = 2 * trace / (COUNT * width)
    of_covariance = 2 * (np.square(covariance).sum() + trace**2) / (COUNT - 1) / (4 * width**2)
    return 1 / of_mean, 1 / of_covariance


# A distance's weight, and those of its mean and of its covariance.
WEIGHTS = {
    "encoder": (0.7, *units(MOMENTS["encoder"][1])),
    "head": (0.4, *units(MOMENTS["head"][1])),
}


class Training:
    """Two batches of unequal size."""

    split = "train"

    def __iter__(self):
        return iter([TRAINING[:18], TRAINING[18:]])


def grain(image, key):
    """A view that moves every feature on its own: some vary more than the source's, some less."""
    return image + jax.random.normal(key, image.shape)


def collect(params, images):
    """A layer of vectors and one of maps, as ``golden_features.activations`` has them."""
    return {"shared": shared(params, images), "then": (decode(params, images),)}


def close_to(results, i, p, steps):
    """Losses, norms, weights and prediction of one instance or batch."""
    outputs, weights, info = results
    golden.same_steps(rows(info, i), *steps)
    golden.same_weights(rows(weights, i), p)
    images = (IMAGES[i][None] if outputs[i].ndim == 1 else BATCHES[i]).astype(np.float64)
    golden.close(outputs[i].reshape(len(images), -1), golden.classify(p, images))


def test_the_gradients_by_hand_are_slopes():
    views = BATCHES[0].astype(np.float64)
    others = golden_features.features(SOURCE, -views)
    queues = {place: values[:3] for place, values in others.items()}
    golden.same_slopes(golden_features.denoising, SOURCE, views, views[::-1])
    golden.same_slopes(golden_features.nt_xent, SOURCE, views, TEMPERATURE)
    golden.same_slopes(golden_features.nt_xent, SOURCE, views, TEMPERATURE, BANK)
    golden.same_slopes(
        golden_features.ttt_plus, SOURCE, views[1:], views, queues, MOMENTS, TEMPERATURE, WEIGHTS
    )
    golden.same_slopes(golden_features.activation_matching, SOURCE, views, ACTIVATIONS)


class TestContrastive:
    """Shared layer and projection adapt by SGD; the class head is frozen."""

    STEPS, RATE = 2, 0.5

    @pytest.mark.parametrize(
        ("xs", "bank"), [(BATCHES, None), (IMAGES, BANK)], ids=["batch", "one_image"]
    )
    def test_episodes(self, xs, bank):
        def loss(model):
            return losses.contrastive(
                model, brightness, temperature=TEMPERATURE, bank=bank, batch=bank is None
            )

        adapter = ttt.gradient_adapter(
            loss(project), optax.sgd(self.RATE), select=select.paths(*PROJECTION)
        )
        results = episodes(adapter, classify, FEATURES, self.STEPS, xs)
        (views,) = drawn(loss, project, FEATURES, self.STEPS, xs)
        for i, x in enumerate(xs):
            images = x if bank is None else x[None]
            assert_pairs(views[i], images)
            data = [(pair.astype(np.float64), TEMPERATURE, bank) for pair in views[i]]
            p, *steps = golden.adapt(SOURCE, golden_features.nt_xent, golden.SGD(self.RATE), data)
            close_to(results, i, p, steps)
            golden.adapted(SOURCE, p, PROJECTION, 0.01)


def assert_pairs(views, images):
    """Views 2n and 2n + 1 of each step are image n at two brightnesses."""
    shifts = views - np.repeat(images, 2, axis=0)
    assert shifts.std(axis=(2, 3, 4)).max() < 1e-5
    assert len(np.unique(shifts.mean(axis=(2, 3, 4)).round(4))) == len(views) * 2 * len(images)


class TestTTTPlus:
    """A stream of batches by SGD with momentum; both queues fill up and drop their oldest."""

    QUEUE, RATE, MOMENTUM = 6, 0.05, 0.9

    def views(self, model):
        """Its first term, with the first of the keys."""
        loss = losses.contrastive(model, brightness, temperature=TEMPERATURE, batch=True)
        return losses.weighted((1.0, loss))

    def test_online(self):
        method = methods.ttt_plus_plus(
            classify,
            shared,
            project,
            augment=brightness,
            encoder_weight=WEIGHTS["encoder"][0],
            head_weight=WEIGHTS["head"][0],
            contrastive_weight=1.0,
            temperature=TEMPERATURE,
            queue=self.QUEUE,
            count=COUNT,
            optimizer=optax.sgd(self.RATE, momentum=self.MOMENTUM),
            select=select.paths(*PROJECTION),
            serve=with_weights(classify, BATCHES),
        )
        built = method.build(
            ttt.source_statistics(method.measure, FEATURES, Training(), reduce=method.reduce)
        )
        _, ((outputs, weights), info), carries = quickly(
            lambda p, x, k: scanned(built, p, x, k), FEATURES, BATCHES, KEYS
        )
        results, fast = (outputs, weights, info), carries.state.fast
        (views,) = drawn(self.views, project, FEATURES, 1, BATCHES)
        p, optimizer = SOURCE, golden.SGD(self.RATE, self.MOMENTUM)
        queues = {place: np.zeros((0, len(mean))) for place, (mean, _) in MOMENTS.items()}
        for i, batch in enumerate(BATCHES.astype(np.float64)):
            assert_pairs(views[i], BATCHES[i])
            before = p
            assert {len(queue) for queue in queues.values()} == {min(i * SIZE, self.QUEUE)}
            data = (batch, views[i, 0], queues, MOMENTS, TEMPERATURE, WEIGHTS)
            p, *steps = golden.adapt(p, golden_features.ttt_plus, optimizer, [data])
            close_to(results, i, p, steps)
            golden.same_weights(rows(fast, i), p)
            golden.adapted(before, p, PROJECTION, 0.01)
            queues = {
                place: np.concatenate([queues[place], values])[-self.QUEUE :]
                for place, values in golden_features.features(before, batch).items()
            }


class TestActMAD:
    """One image, whose statistics are those of its views, by the published optimizer."""

    VIEWS, STEPS, RATE, MOMENTUM, DECAY = 4, 3, 0.2, 0.9, 0.1

    def loss(self, model):
        return losses.activation_matching(model, self.source(), augment=grain, num_views=self.VIEWS)

    def source(self):
        return ttt.source_statistics(losses.activation_moments(collect), FEATURES, Training())

    def test_episodes(self):
        optimizer = optax.chain(
            optax.add_decayed_weights(self.DECAY),
            optax.sgd(self.RATE, momentum=self.MOMENTUM, nesterov=True),
        )
        built = methods.actmad(
            classify,
            collect,
            augment=grain,
            num_views=self.VIEWS,
            optimizer=optimizer,
            select=select.paths(*DECODER),
            num_steps=self.STEPS,
            batch=False,
            serve=with_weights(classify, IMAGES),
        ).build(self.source())
        (outputs, weights), info = quickly(ttt.batched(ttt.episode(built)), FEATURES, IMAGES, KEYS)
        results = outputs, weights, info
        (views,) = drawn(self.loss, collect, FEATURES, self.STEPS)
        for i, image in enumerate(IMAGES):
            noise = (views[i] - image).reshape(-1, image.size)
            assert len(np.unique(noise[:, 0])) == self.STEPS * self.VIEWS
            np.testing.assert_allclose(noise.std(axis=1), 1, atol=0.3)
            optimizer = golden.SGD(self.RATE, self.MOMENTUM, nesterov=True, decay=self.DECAY)
            data = [(some.astype(np.float64), ACTIVATIONS) for some in views[i]]
            p, *steps = golden.adapt(SOURCE, golden_features.activation_matching, optimizer, data)
            close_to(results, i, p, steps)
            golden.adapted(SOURCE, p, DECODER, 0.01)

    def test_the_source_is_measured_on_views(self):
        """One view of each image, drawn by its index in the batch."""
        method = methods.actmad(classify, collect, augment=grain)
        measured = quickly(method.measure, FEATURES, TRAINING)
        keys = jax.random.split(jax.random.key(0), len(TRAINING))
        views = np.asarray(jax.vmap(grain)(TRAINING, keys), np.float64)
        layer, _ = golden_features.activations(SOURCE, views)
        golden.close(measured.mean["shared"], layer.mean(axis=0))
        golden.close(measured.centered["shared"], layer.var(axis=0))

"""Methods for one instance against NumPy in float64: loss, gradient, update, prediction by hand.

``golden`` is the other implementation, ``golden_models`` has the models. Step sizes are larger than
the published ones, so that a few steps move a tiny model far beyond the tolerance.
"""

import functools

import jax
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import golden
from tests.core.compiling import quickly
from tests.core.golden_models import (
    AUTOENCODER,
    IMAGES,
    KEYS,
    SHARED,
    TWO_HEADS,
    N,
    brightness,
    classify,
    classify_patches,
    drawn,
    reconstruct,
    turn,
    with_weights,
)
from tests.core.streaming import rows, scanned
from ttt_jax import losses, methods, resets, select


def episodes(method, model, params):
    """``(outputs, weights, info)`` of a predictor that serves its parameters too, by image."""
    predict = method(serve=with_weights(model, IMAGES))
    (outputs, weights), info = jax.device_get(quickly(ttt.batched(predict), params, IMAGES, KEYS))
    return outputs, weights, info


def run_stream(method, model, params):
    """As ``episodes``, and the adapter's parameters after each image."""
    stream = method(serve=with_weights(model, IMAGES))
    _, ((outputs, weights), info), carries = jax.device_get(
        quickly(lambda p, x, k: scanned(stream, p, x, k), params, IMAGES, KEYS)
    )
    return (outputs, weights, info), carries.state.fast


@pytest.mark.parametrize(
    ("loss", "params", "data"),
    [
        (golden.rotation, TWO_HEADS, (IMAGES, np.array([3, 0, 2]))),
        (golden.marginal_entropy, TWO_HEADS, (IMAGES,)),
        (golden.reconstruction, AUTOENCODER, (IMAGES[0], np.array([[0, 4], [2, 4], [3, 8]]))),
    ],
    ids=["rotation", "marginal_entropy", "reconstruction"],
)
def test_the_gradients_by_hand_are_slopes(loss, params, data):
    golden.same_slopes(loss, golden.flat(params), *data)


class TestRotation:
    """Shared layer and rotation head adapt by SGD without momentum; the class head is frozen."""

    SOURCE = golden.flat(TWO_HEADS)
    FAST = (*SHARED, "rotation/kernel", "rotation/bias")
    MODES = pytest.mark.parametrize(
        ("num_steps", "rate"),
        [pytest.param(10, 0.05, id="standard"), pytest.param(1, 0.5, id="jump")],
    )

    @staticmethod
    def copied(model):
        return losses.rotation(model, copies=4, augment=brightness)

    @staticmethod
    def method(make, rate, **options):
        """``serve -> method``; 4 augmented copies, or what the options say."""
        settings = {"copies": 4, "augment": brightness, **options}
        chosen = select.paths("shared/.*", "rotation/.*")
        return functools.partial(
            make, classify, turn, optimizer=optax.sgd(rate), select=chosen, **settings
        )

    @staticmethod
    @functools.cache
    def views():
        """Of ten steps of each image; those of fewer are the first of them."""
        (views,) = drawn(TestRotation.copied, turn, TWO_HEADS, 10)
        return views

    def data(self, num_steps):
        """``(views, turns)`` of each step of each image."""
        pairs = zip(self.views()[:, :num_steps], IMAGES, strict=True)
        return [[(v, self.turns(v, image)) for v in steps] for steps, image in pairs]

    @staticmethod
    def turns(views, image):
        """Read off the pixels: a view is the image turned by r, but for its brightness."""
        spread = np.stack([(views - np.rot90(image, r)).std(axis=(1, 2, 3)) for r in range(4)])
        assert spread.min(axis=0).max() < 1e-5 < 0.1 < np.sort(spread, axis=0)[1].min()
        return spread.argmin(axis=0)

    def check(self, results, data, rate):
        """Each image by itself, from the source parameters on."""
        outputs, weights, info = results
        for i, image in enumerate(IMAGES):
            p, *steps = golden.adapt(self.SOURCE, golden.rotation, golden.SGD(rate), data[i])
            golden.same_steps(rows(info, i), *steps)
            golden.same_weights(rows(weights, i), p)
            golden.close(outputs[i], golden.classify(p, image[None])[0])
            golden.adapted(self.SOURCE, p, self.FAST, 0.01)

    @MODES
    def test_augmented_copies(self, num_steps, rate):
        data = self.data(num_steps)
        assert len({tuple(turns) for steps in data for _, turns in steps}) > 1
        method = self.method(methods.ttt_rotation, rate, num_steps=num_steps)
        self.check(episodes(method, classify, TWO_HEADS), data, rate)

    @MODES
    def test_four_rotations(self, num_steps, rate):
        four = [np.stack([np.rot90(image, r) for r in range(4)]) for image in IMAGES]
        data = [[(views, np.arange(4))] * num_steps for views in four]
        settings = {"copies": None, "augment": None, "num_steps": num_steps}
        method = self.method(methods.ttt_rotation, rate, **settings)
        self.check(episodes(method, classify, TWO_HEADS), data, rate)

    def test_online(self):
        """The weights go on from image to image; each is predicted after its step."""
        method = self.method(methods.ttt_rotation_online, 0.2)
        (outputs, weights, info), fast = run_stream(method, classify, TWO_HEADS)
        p, optimizer = self.SOURCE, golden.SGD(0.2)
        for i, data in enumerate(self.data(1)):
            before = p
            p, *steps = golden.adapt(p, golden.rotation, optimizer, data)
            golden.adapted(before, p, self.FAST, 0.01)
            golden.same_steps(rows(info, i), *steps)
            golden.same_weights(rows(weights, i), p)
            golden.same_weights(rows(fast, i), p)
            golden.close(outputs[i], golden.classify(p, IMAGES[i][None])[0])

    def test_online_with_every_image_forgotten(self):
        """Is each image by itself."""
        method = self.method(methods.ttt_rotation_online, 0.2, reset=resets.every(1), num_steps=2)
        results, fast = run_stream(method, classify, TWO_HEADS)
        self.check(results, self.data(2), 0.2)
        golden.same_weights(rows(fast, -1), self.SOURCE)


class TestMEMO:
    """Everything takes one SGD step; the prediction is that of the plain image."""

    VIEWS = 6

    def loss(self, model):
        return losses.marginal_entropy(model, brightness, num_views=self.VIEWS)

    def test_one_step(self):
        method = functools.partial(
            methods.memo,
            classify,
            augment=brightness,
            num_views=self.VIEWS,
            optimizer=optax.sgd(0.5),
        )
        outputs, weights, info = episodes(method, classify, TWO_HEADS)
        (views,) = drawn(self.loss, classify, TWO_HEADS, 1)
        source = golden.flat(TWO_HEADS)
        for i, image in enumerate(IMAGES):
            shifts = views[i, 0] - image
            assert shifts.std(axis=(1, 2, 3)).max() < 1e-5
            assert len(np.unique(shifts.mean(axis=(1, 2, 3)).round(4))) == self.VIEWS
            p, *steps = golden.adapt(
                source, golden.marginal_entropy, golden.SGD(0.5), [(views[i, 0],)]
            )
            golden.same_steps(rows(info, i), *steps)
            golden.same_weights(rows(weights, i), p)
            golden.close(outputs[i], golden.classify(p, image[None])[0])
            golden.adapted(source, p, (*SHARED, "classes/kernel", "classes/bias"), 0.01)


class TestMaskedAutoencoder:
    """The encoder adapts by SGD with momentum, which every image begins afresh."""

    STEPS, MASKS, RATE, MOMENTUM = 5, 3, 0.05, 0.9

    def loss(self, model):
        return losses.masked_reconstruction(model, patch=golden.PATCH, num_masks=self.MASKS)

    def check(self, results):
        outputs, weights, info = results
        _, keep = drawn(self.loss, reconstruct, AUTOENCODER, self.STEPS)
        # A quarter of nine patches is two, in other places at other steps.
        assert keep.shape == (N, self.STEPS, self.MASKS, 2)
        assert all(len(np.unique(masks, axis=0)) > 5 for masks in keep.reshape(N, -1, 2))
        source = golden.flat(AUTOENCODER)
        for i, image in enumerate(IMAGES.astype(np.float64)):
            optimizer = golden.SGD(self.RATE, self.MOMENTUM)
            data = [(image, masks) for masks in keep[i]]
            p, *steps = golden.adapt(source, golden.reconstruction, optimizer, data)
            golden.same_steps(rows(info, i), *steps)
            golden.same_weights(rows(weights, i), p)
            golden.close(outputs[i], golden.classify_patches(p, image))
            golden.adapted(source, p, ("encoder/kernel", "encoder/position"), 0.01)

    def test_episodes(self):
        """The momentum of one image does not reach the next."""
        method = functools.partial(
            methods.ttt_mae,
            classify_patches,
            reconstruct,
            patch=golden.PATCH,
            num_masks=self.MASKS,
            optimizer=optax.sgd(self.RATE, momentum=self.MOMENTUM),
            select=select.paths("encoder/.*"),
            num_steps=self.STEPS,
        )
        self.check(episodes(method, classify_patches, AUTOENCODER))

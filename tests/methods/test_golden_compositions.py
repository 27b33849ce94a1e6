"""Methods beside TTT, MEMO and TTT-MAE against NumPy in float64: two losses, a pool, noise.

Random views are recorded from the library's losses and given to ``golden``.
"""

import functools

import jax
import numpy as np
import optax

import ttt_jax as ttt
from tests.core import golden, golden_features
from tests.core.compiling import quickly
from tests.core.golden_models import (
    FEATURES,
    IMAGES,
    KEYS,
    SHARED,
    TWO_HEADS,
    N,
    brightness,
    classify,
    decode,
    drawn,
    shared,
    turn,
    with_weights,
)
from tests.core.streaming import rows, scanned
from ttt_jax import losses, methods, select

SOURCE = golden.flat(TWO_HEADS)
COPIES, RATE = 3, 0.2
RNG = np.random.default_rng(6)
POOL = RNG.normal(size=(9, *IMAGES.shape[1:])).astype(np.float32)


def episodes(method, params):
    """``(outputs, weights, info)`` of a predictor that serves its parameters too, by image."""
    predict = method(serve=with_weights(classify, IMAGES))
    (outputs, weights), info = jax.device_get(quickly(ttt.batched(predict), params, IMAGES, KEYS))
    return outputs, weights, info


def check(results, i, p, steps):
    outputs, weights, info = results
    golden.same_steps(rows(info, i), *steps)
    golden.same_weights(rows(weights, i), p)
    golden.close(outputs[i], golden.classify(p, IMAGES[i][None].astype(np.float64))[0])


def turns_of(views, image):
    """Read off the pixels: a view is the image turned by r, but for its brightness."""
    spread = np.stack([(views - np.rot90(image, r)).std(axis=(1, 2, 3)) for r in range(4)])
    assert spread.min(axis=0).max() < 1e-5 < 0.1 < np.sort(spread, axis=0)[1].min()
    return spread.argmin(axis=0)


class TestRotationMemo:
    """Both heads and the shared layer adapt, by rotation and by WEIGHT times the entropy."""

    VIEWS, WEIGHT = 4, 0.7
    HEADS = ("rotation/kernel", "rotation/bias", "classes/kernel", "classes/bias")

    def loss(self, classify=classify, turn=turn):
        return losses.weighted(
            (1.0, losses.rotation(turn, copies=COPIES, augment=brightness)),
            (
                self.WEIGHT,
                losses.marginal_entropy(classify, brightness, num_views=self.VIEWS),
            ),
        )

    def value(self, p, copies, turns, views):
        rotation, first = golden.rotation(p, copies, turns)
        entropy, second = golden.marginal_entropy(p, views)
        second = {name: self.WEIGHT * slope for name, slope in second.items()}
        return rotation + self.WEIGHT * entropy, golden_features.added(first, second)

    @staticmethod
    @functools.cache
    def views():
        """The copies and views of two steps of each image; those of one are the first."""
        loss = TestRotationMemo().loss
        (copies,) = drawn(lambda model: loss(turn=model), turn, TWO_HEADS, 2)
        (views,) = drawn(lambda model: loss(classify=model), classify, TWO_HEADS, 2)
        return copies, views

    def data(self, num_steps):
        copies, views = (drawn[:, :num_steps] for drawn in self.views())
        return [
            [(c, turns_of(c, image), v) for c, v in zip(copies[i], views[i], strict=True)]
            for i, image in enumerate(IMAGES)
        ]

    def method(self, make, **options):
        return functools.partial(
            make,
            classify,
            turn,
            augment=brightness,
            copies=COPIES,
            num_views=self.VIEWS,
            memo_weight=self.WEIGHT,
            optimizer=optax.sgd(RATE),
            **options,
        )

    def test_episodes(self):
        results = episodes(self.method(methods.rotation_memo, num_steps=2), TWO_HEADS)
        for i, data in enumerate(self.data(2)):
            p, *steps = golden.adapt(SOURCE, self.value, golden.SGD(RATE), data)
            check(results, i, p, steps)
            golden.adapted(SOURCE, p, (*SHARED, *self.HEADS), 0.01)

    def test_online(self):
        """The weights go on from image to image; each is predicted after its step."""
        stream = self.method(methods.rotation_memo_online)(serve=with_weights(classify, IMAGES))
        _, ((outputs, weights), info), _ = jax.device_get(
            quickly(lambda p, x, k: scanned(stream, p, x, k), TWO_HEADS, IMAGES, KEYS)
        )
        p, optimizer = SOURCE, golden.SGD(RATE)
        for i, data in enumerate(self.data(1)):
            p, *steps = golden.adapt(p, self.value, optimizer, data)
            check((outputs, weights, info), i, p, steps)


class TestNeighbors:
    """The step is on the image and its nearest images by the source's features."""

    K, STEPS = 2, 2

    def groups(self):
        """``[N, 1 + K, H, W, C]``: every image, then its neighbors by cosine in NumPy."""
        bank, queries = (
            golden.shared(SOURCE, images.astype(np.float64)) for images in (POOL, IMAGES)
        )
        bank, queries = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (bank, queries))
        nearest = np.argsort(-queries @ bank.T, axis=1)[:, : self.K]
        return np.concatenate([IMAGES[:, None], POOL[nearest]], axis=1)

    def test_episodes(self):
        method = methods.neighbors
        settings = {"augment": brightness, "copies": COPIES, "k": self.K, "num_steps": self.STEPS}
        chosen = select.paths("shared/.*", "rotation/.*")

        def make(serve):
            made = method(
                classify,
                turn,
                shared,
                optimizer=optax.sgd(RATE),
                select=chosen,
                serve=serve,
                **settings,
            )
            assert made.reduce == "concatenate"
            return made.build(
                ttt.source_statistics(made.measure, TWO_HEADS, Pool(), reduce=made.reduce)
            )

        results, groups = episodes(make, TWO_HEADS), self.groups()

        def loss(model):
            return losses.rotation(model, copies=COPIES, augment=brightness, batch=True)

        (views,) = drawn(loss, turn, TWO_HEADS, self.STEPS, groups)
        for i, group in enumerate(groups):
            data = [(step, self.turns(step, group)) for step in views[i]]
            p, *steps = golden.adapt(SOURCE, golden.rotation, golden.SGD(RATE), data)
            check(results, i, p, steps)
            golden.adapted(SOURCE, p, (*SHARED, "rotation/kernel", "rotation/bias"), 0.01)

    def turns(self, views, group):
        by_image = views.reshape(1 + self.K, COPIES, *views.shape[1:])
        return np.concatenate(
            [turns_of(v, image) for v, image in zip(by_image, group, strict=True)]
        )


class Pool:
    """Two batches of unequal size."""

    split = "train"

    def __iter__(self):
        return iter([POOL[:5], POOL[5:]])


class TestDenoising:
    """Shared layer and decoder adapt by SGD; the class head is frozen."""

    NOISY, STEPS, RATE = 3, 2, 5.0
    FAST = (*SHARED, "decoder/kernel", "decoder/bias")

    def loss(self, model):
        return losses.denoising(model, noise=0.3, num_copies=self.NOISY)

    def test_episodes(self):
        method = functools.partial(
            methods.ttt_denoising,
            classify,
            decode,
            noise=0.3,
            num_copies=self.NOISY,
            optimizer=optax.sgd(self.RATE),
            select=select.paths(*self.FAST),
            num_steps=self.STEPS,
        )
        source, results = golden.flat(FEATURES), episodes(method, FEATURES)
        (noisy,) = drawn(self.loss, decode, FEATURES, self.STEPS)
        # Every copy of every step has noise of its own.
        noise = (noisy - IMAGES[:, None, None]).reshape(-1, IMAGES[0].size)
        assert len(np.unique(noise.round(4)[:, 0])) == N * self.STEPS * self.NOISY
        np.testing.assert_allclose(noise.std(axis=1), 0.3, atol=0.1)
        for i, image in enumerate(IMAGES.astype(np.float64)):
            data = [(copies, np.stack([image] * self.NOISY)) for copies in noisy[i]]
            p, *steps = golden.adapt(source, golden_features.denoising, golden.SGD(self.RATE), data)
            check(results, i, p, steps)
            golden.adapted(source, p, self.FAST, 0.01)

"""DeYO against NumPy in float64: the shuffle, both filters, the weights, the step."""

import functools

import jax
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core.compiling import quickly, recorded
from ttt_jax import methods

from . import linear_model as lab

SIDE, PATCHES, COUNT = 4, 2, 8
RNG = np.random.default_rng(2)
IMAGES = RNG.normal(size=(COUNT, SIDE, SIDE, 1)).astype(np.float32)
PARAMS = {
    "b": RNG.normal(size=3).astype(np.float32),
    "w": RNG.normal(size=(SIDE * SIDE, 3), scale=0.4).astype(np.float32),
}
KEY = jax.random.key(1)
RATE, MARGIN, ENTROPY, THRESHOLD = 0.3, 0.7, 0.8, 0.05


def classify(params, images):
    return lab.classify(params, images.reshape(len(images), -1))


def stream_of(model=classify, **options):
    settings = {
        "patches": PATCHES,
        "threshold": THRESHOLD,
        "entropy_margin": ENTROPY,
        "margin": MARGIN,
    }
    return methods.deyo(
        model,
        optimizer=optax.sgd(RATE),
        select=lab.EVERYTHING,
        predict="before",
        **settings | options,
    )


def step(stream, images=IMAGES):
    return quickly(lambda p, x: stream.step(p, stream.init(p), x, KEY), PARAMS, images)


@functools.cache
def shuffled_images():
    """What the model function is given beside the images."""

    def build(record):
        def recorder(params, images):
            record(images)
            return classify(params, images)

        stream = stream_of(recorder)
        return lambda params, images: stream.step(params, stream.init(params), images, KEY)

    _, seen = recorded(build, PARAMS, IMAGES)
    (other,) = [images for images in map(np.asarray, seen) if not np.array_equal(images, IMAGES)]
    return other


def tiles(image):
    return [
        tuple(image[i : i + 2, j : j + 2, 0].ravel())
        for i in range(0, 4, 2)
        for j in range(0, 4, 2)
    ]


def test_the_patches_are_those_of_the_image_in_another_order():
    orders = set()
    for image, other in zip(IMAGES, shuffled_images(), strict=True):
        assert sorted(tiles(image)) == sorted(tiles(other))
        orders.add(tuple(tiles(image).index(tile) for tile in tiles(other)))
    # Every image is shuffled on its own.
    assert len(orders) > 3


def test_step():
    other, theta = shuffled_images(), lab.theta_of(PARAMS)
    flat, shuffled = (images.reshape(COUNT, -1) for images in (IMAGES, other))
    logits = lab.forward(theta, flat)
    p, entropy = lab.probabilities(logits), lab.entropies(logits)
    best = p.argmax(axis=1)
    difference = p[np.arange(COUNT), best]
    difference = (
        difference - lab.probabilities(lab.forward(theta, shuffled))[np.arange(COUNT), best]
    )
    sure, shaped = entropy < ENTROPY * np.log(3), difference > THRESHOLD
    kept = sure & shaped
    # Each filter leaves out what the other takes.
    assert (sure & ~shaped).any() and (shaped & ~sure).any() and kept.sum() > 1
    weight = np.exp(MARGIN * np.log(3) - entropy) + np.exp(difference)

    def loss(theta):
        return (weight * lab.entropies(lab.forward(theta, flat)))[kept].mean()

    carry, (output, info) = step(stream_of())
    lab.close(output, logits)
    lab.close(info.loss[0], loss(theta))
    lab.close(lab.theta_of(carry.state.fast), theta - RATE * lab.slope(loss, theta))
    np.testing.assert_array_equal(info.aux["kept"], kept[None])
    assert np.abs(lab.theta_of(carry.state.fast) - theta).max() > 0.01


def test_without_such_an_image_there_is_no_step():
    for options in ({"threshold": 1.0}, {"entropy_margin": 0.0}):
        carry, (_, info) = step(stream_of(**options))
        np.testing.assert_array_equal(lab.theta_of(carry.state.fast), lab.theta_of(PARAMS))
        assert info.loss == 0 and info.ok and not info.updated and not info.aux["kept"].any()


def test_one_image():
    single = stream_of(batch=False, threshold=-1.0, entropy_margin=2.0)
    predict = ttt.batched(ttt.episode(single))
    outputs, info = quickly(predict, PARAMS, IMAGES, ttt.sample_keys(KEY, np.arange(COUNT)))
    lab.close(outputs, classify(PARAMS, IMAGES))
    assert info.aux["kept"].shape == (COUNT, 1, 1) and info.updated.all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"methods\.deyo: patches .* at least 2, got 1"):
        methods.deyo(classify, patches=1)
    with pytest.raises(ValueError, match=r"methods\.deyo shuffles 3 x 3 .* got \(8, 4, 4, 1\)"):
        step(stream_of(patches=3))
    with pytest.raises(ValueError, match=r"needs logits \[N, classes\]; got shape \(8, 1, 3\)"):
        step(stream_of(lambda params, images: classify(params, images)[:, None]))

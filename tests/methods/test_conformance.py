"""Every method for one instance keeps the promises of the library: one row each.

Parallel equals the loop, in any order and company; a NaN instance leaves the others bitwise alone,
in streams too; zero steps are the source prediction; a stream that forgets after every instance
is its episodic form; the parameters stay what they were.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import models
from tests.core.compiling import quickly
from tests.core.streaming import scanned
from ttt_jax import audit, methods, resets

N = 5
PARAMS = models.make_params()
PRISTINE = models.snapshot(PARAMS)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(N))
IMAGES = models.make_images(N)
BATCHES = models.make_images(N, batch=4)
TRAINING = models.make_images(8, seed=2)
SGD = optax.sgd(0.1, momentum=0.9)
PRIOR = 4
plain = ttt.unbatched(models.classify)


def jitter_pixels(image, key):
    return image + 0.3 * jax.random.normal(key, image.shape)


def views(image):
    return jnp.stack([image, image[:, ::-1], 0.5 * image])


def with_statistics(params, moments):
    return {**params, "batch_stats": moments["batch_stats"]}


def turn_statistics(params, images):
    """The rotation head in training mode, and the statistics that it normalized with."""
    moments = models.batch_moments(params, images)
    return models.turn(with_statistics(params, moments), images), moments


def classify_blended(params, images):
    """Source statistics that count as so many images as ``PRIOR``, and those of the batch."""
    share = PRIOR / (PRIOR + images.shape[0])
    moments = models.batch_moments(params, images)
    blended = jax.tree.map(
        lambda old, new: share * old + (1 - share) * new,
        params["batch_stats"],
        moments["batch_stats"],
    )
    return models.classify({**params, "batch_stats": blended}, images)


def neighbors(**options):
    method = methods.neighbors(
        models.classify, models.turn, models.features, copies=2, k=3, optimizer=SGD, **options
    )
    return method.build(method.measure(PARAMS, TRAINING))


# Method -> (options -> Predictor): small and by large steps, beside the published settings.
ADAPTING = {
    "ttt_rotation": functools.partial(
        methods.ttt_rotation, models.classify, models.turn, copies=3, optimizer=SGD
    ),
    "ttt_rotation_statistics": functools.partial(
        methods.ttt_rotation_statistics,
        models.classify,
        turn_statistics,
        augment=jitter_pixels,
        copies=4,
        optimizer=SGD,
    ),
    "ttt_mae": functools.partial(
        methods.ttt_mae,
        models.classify,
        models.reconstruct,
        patch=models.PATCH,
        num_masks=2,
        optimizer=SGD,
        select=ttt.select.paths(r"params/(encoder|norm)/.*"),
    ),
    "memo": functools.partial(
        methods.memo, models.classify, augment=jitter_pixels, num_views=3, optimizer=SGD
    ),
    "rotation_memo": functools.partial(
        methods.rotation_memo,
        models.classify,
        models.turn,
        augment=jitter_pixels,
        copies=2,
        num_views=3,
        memo_weight=0.5,
        optimizer=SGD,
    ),
    "neighbors": neighbors,
    "ttt_denoising": functools.partial(
        methods.ttt_denoising,
        models.classify,
        models.decode,
        noise=0.3,
        num_copies=2,
        optimizer=optax.sgd(1.0),
    ),
}
# The online form of the same method, with the same options.
ONLINE = {
    "ttt_rotation": (methods.ttt_rotation, methods.ttt_rotation_online),
    "rotation_memo": (methods.rotation_memo, methods.rotation_memo_online),
}
WITHOUT_GRADIENT = {
    "source": (methods.source(models.classify), IMAGES),
    "augmented": (methods.augmented(models.classify, augment=jitter_pixels, num_views=3), IMAGES),
    "every_view": (methods.every_view(models.classify, views=views), IMAGES),
    "bn_adapt": (methods.bn_adapt(classify_blended), BATCHES),
    "bn_adapt_one_image": (methods.bn_adapt(classify_blended, batch=False), IMAGES),
}


def online_form(name, **options):
    episodic, stream = ONLINE[name]
    given = ADAPTING[name]
    assert given.func is episodic
    return stream(*given.args, **given.keywords, **options)


def judge(differences, *, num_steps=2):
    changed = float(models.snapshot(PARAMS) != PRISTINE)
    audit.require(audit.findings({**differences, "pristine": changed}, num_steps=num_steps))


def measured(predict, xs):
    return quickly(lambda p, x, k: audit.differences(predict, p, x, k), PARAMS, xs, KEYS)


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_methods_without_gradient(name):
    predict, xs = WITHOUT_GRADIENT[name]
    differences = measured(predict, xs)
    assert set(differences) == {"loop", "order", "mates", "poison"}
    judge(differences)


@pytest.mark.parametrize("name", ADAPTING)
def test_adapting_methods(name):
    predict = ADAPTING[name](num_steps=2)

    def measure(params, xs, keys):
        pairs = (xs, keys)
        zero, _ = jax.lax.map(lambda pair: ADAPTING[name](num_steps=0)(params, *pair), pairs)
        expected = jax.lax.map(lambda x: plain(params, x), xs)
        differences = audit.differences(predict, params, xs, keys)
        return {**differences, "zero_steps": audit.distance(zero, expected)}

    differences = quickly(measure, PARAMS, IMAGES, KEYS)
    assert {"loop", "order", "mates", "poison", "poison_ok"} <= set(differences)
    # Statistics of four copies make small differences larger.
    judge(differences, num_steps=4 if name == "ttt_rotation_statistics" else 2)


@pytest.mark.parametrize("name", ONLINE)
def test_streams(name):
    episode = ADAPTING[name](num_steps=2)
    forgetful = online_form(name, num_steps=2, reset=resets.every(1))
    lasting = online_form(name)
    swapped, clean = np.array([1, 0, 2, 3, 4]), np.array([0, 2, 3, 4])

    def measure(params, xs, keys):
        _, (outputs, info), _ = scanned(forgetful, params, xs, keys)
        expected, alone = jax.lax.map(lambda pair: episode(params, *pair), (xs, keys))
        # A spoiled instance that leaves no trace may as well come first.
        spoiled = xs.at[1].set(jnp.nan)
        _, late, _ = scanned(lasting, params, spoiled, keys)
        _, early, _ = scanned(lasting, params, spoiled[swapped], keys[swapped])
        first = jax.tree.map(lambda leaf: leaf[clean], late)
        second = jax.tree.map(lambda leaf: leaf[swapped[clean]], early)
        return {
            "every_1": audit.distance(
                (outputs, info.loss, info.ok), (expected, alone.loss, alone.ok)
            ),
            "stream_poison": audit.distance(first, second),
            "updates": 1.0 - first[1].updated.all(),
        }

    judge(quickly(measure, PARAMS, IMAGES, KEYS))


@pytest.mark.parametrize("name", ADAPTING)
def test_serve_predicts_with_the_adapted_parameters(name):
    """A served copy of the parameters is the source's at entry 0 of a trace, and then another."""
    predict = ADAPTING[name](num_steps=1, trace=True, serve=lambda params, x: params)
    served, _ = quickly(lambda p, x, k: predict(p, x, k), PARAMS, IMAGES[0], KEYS[0])
    entries = {
        name: (np.asarray(leaf), np.asarray(source))
        for (name, leaf), source in zip(
            jax.tree_util.tree_leaves_with_path(served), jax.tree.leaves(PARAMS), strict=True
        )
    }
    assert all((leaf[0] == source).all() for leaf, source in entries.values())
    moved = {path[0].key for path, (leaf, _) in entries.items() if (leaf[1] != leaf[0]).any()}
    statistics = {"batch_stats"} if name == "ttt_rotation_statistics" else set()
    assert moved == {"params"} | statistics


@pytest.mark.parametrize("name", ONLINE)
def test_streams_serve_the_mean_over_views(name):
    stream = online_form(name, serve=methods.mean_over_views(models.classify, views))
    bare = online_form(name, serve=lambda params, x: (params, x))
    _, (outputs, _), _ = quickly(lambda p, x, k: scanned(stream, p, x, k), PARAMS, IMAGES, KEYS)
    _, (pairs, _), _ = quickly(lambda p, x, k: scanned(bare, p, x, k), PARAMS, IMAGES, KEYS)
    for i, output in enumerate(outputs):
        params, image = jax.tree.map(lambda leaf, i=i: leaf[i], pairs)
        mean = np.mean(jax.nn.softmax(models.classify(params, views(image))), axis=0)
        np.testing.assert_allclose(jax.nn.softmax(output), mean, rtol=1e-4)


TRACED = {
    "ttt_rotation": lambda value: ADAPTING["ttt_rotation"](optimizer=optax.sgd(value)),
    "ttt_rotation_statistics": lambda value: ADAPTING["ttt_rotation_statistics"](
        statistics_momentum=value
    ),
    "rotation_memo": lambda value: ADAPTING["rotation_memo"](memo_weight=value),
    "ttt_denoising": lambda value: ADAPTING["ttt_denoising"](noise=value),
}


@pytest.mark.parametrize("name", TRACED)
def test_real_valued_settings_may_be_traced(name):
    def predict(value, params, x, key):
        method = functools.partial(TRACED[name], value)
        return method()(params, x, key)[0]

    values = jnp.array([0.1, 0.9])
    mapped = jax.vmap(predict, (0, None, None, None))
    together = quickly(mapped, values, PARAMS, IMAGES[0], KEYS[0])
    apart = [quickly(predict, value, PARAMS, IMAGES[0], KEYS[0]) for value in values]
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    assert np.abs(apart[0] - apart[1]).max() > 1e-4

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
from tests.core.streaming import rows
from tests.methods import promises
from tests.methods.linear_model import probabilities as softmax
from ttt_jax import methods, resets

N = 5
PARAMS = models.make_params()
PRISTINE = models.snapshot(PARAMS)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(N))
IMAGES = models.make_images(N)
BATCHES = models.make_images(N, batch=4)
TRAINING = models.make_images(8, seed=2)
SGD = optax.sgd(0.1, momentum=0.9)
# Few leaves, as each takes time to compile; which adapt is for tests/core/test_conformance.py.
SOME = ttt.select.paths(r"params/(encoder/kernel|norm/scale)")
PRIOR = 4
plain = ttt.unbatched(models.classify)


def jitter_pixels(image, key):
    return image + 0.3 * jax.random.normal(key, image.shape, jnp.float32)


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
        models.classify,
        models.turn,
        models.features,
        copies=2,
        k=3,
        optimizer=SGD,
        select=SOME,
        **options,
    )
    return method.build(quickly(method.measure, PARAMS, TRAINING))


# Method -> (options -> Predictor): small and by large steps, beside the published settings.
ADAPTING = {
    "ttt_rotation": functools.partial(
        methods.ttt_rotation, models.classify, models.turn, copies=3, optimizer=SGD, select=SOME
    ),
    "ttt_rotation_statistics": functools.partial(
        methods.ttt_rotation_statistics,
        models.classify,
        turn_statistics,
        augment=jitter_pixels,
        copies=4,
        optimizer=SGD,
        select=SOME,
    ),
    "ttt_mae": functools.partial(
        methods.ttt_mae,
        models.classify,
        models.reconstruct,
        patch=models.PATCH,
        num_masks=2,
        optimizer=SGD,
        select=SOME,
    ),
    "memo": functools.partial(
        methods.memo,
        models.classify,
        augment=jitter_pixels,
        num_views=3,
        optimizer=SGD,
        select=SOME,
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
        select=SOME,
    ),
    "neighbors": neighbors,
    "ttt_denoising": functools.partial(
        methods.ttt_denoising,
        models.classify,
        models.decode,
        noise=0.3,
        num_copies=2,
        optimizer=optax.sgd(1.0),
        select=SOME,
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


# Two steps compile their body twice. Those of every loss are in tests/core/test_conformance.py.
NUM_STEPS = {"ttt_rotation": 2}
# A setting that may be traced: (its value in the row above, another, value -> options).
TRACED = {
    "ttt_rotation": (0.1, 0.9, lambda rate: {"optimizer": optax.sgd(rate, momentum=0.9)}),
    "ttt_rotation_statistics": (0.9, 0.1, lambda share: {"statistics_momentum": share}),
    "rotation_memo": (0.5, 0.1, lambda weight: {"memo_weight": weight}),
    "ttt_denoising": (0.3, 0.9, lambda noise: {"noise": noise}),
}
mean_over_views = methods.mean_over_views(models.classify, views)


def serve(params, x):
    """The prediction beside what it was made with."""
    return {"logits": plain(params, x), "params": params}


def serve_views(params, x):
    by_view = models.classify(params, views(x))
    return {**serve(params, x), "mean": mean_over_views(params, x), "views": by_view}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_methods_without_gradient(name):
    predict, xs = WITHOUT_GRADIENT[name]

    def run(*inputs):
        return promises.in_company(predict, *inputs), promises.alone(predict, *inputs)

    results, loop = promises.measured(run, PARAMS, xs, KEYS)
    base = promises.require_company(results, num_steps=0)
    promises.close(loop, base, num_steps=0)
    assert models.snapshot(PARAMS) == PRISTINE


def measured(name, num_steps):
    """Every promise of a method in one program; its parallel form is traced, and the loop plain.

    Where it has an online form, the loop is the stream that forgets after every instance.
    """
    make = functools.partial(ADAPTING[name], num_steps=num_steps)
    traced = make(trace=True, serve=serve_views if name in ONLINE else serve)
    without_steps = ADAPTING[name](num_steps=0)

    def stream_of(period):
        return online_form(name, num_steps=num_steps, reset=resets.every(period), serve=serve_views)

    def untouched(params, x, key):
        return without_steps(params, x, key)[0], plain(params, x)

    def varied(value, params, x, key):
        *_, options = TRACED[name]
        return make(**options(value))(params, x, key)[0]

    def run(params, xs, keys):
        results = {
            "company": promises.in_company(traced, params, xs, keys),
            "zero": promises.alone(untouched, params, xs, keys),
        }
        if name in ONLINE:
            results["streams"] = promises.in_streams(stream_of, params, xs, keys)
        else:
            results["loop"] = promises.alone(make(), params, xs, keys)
        if name in TRACED:
            values = jnp.array(TRACED[name][:2])
            several = jax.vmap(varied, (0, None, None, None))
            results["varied"] = several(values, params, xs[0], keys[0])
        return results

    return promises.measured(run, PARAMS, IMAGES, KEYS)


@pytest.mark.parametrize("name", ADAPTING)
def test_adapting_methods(name):
    num_steps = NUM_STEPS.get(name, 1)
    results = measured(name, num_steps)
    # Statistics of four copies make small differences larger.
    steps = 4 if name == "ttt_rotation_statistics" else num_steps
    path, info = promises.require_company(results["company"], num_steps=steps)
    assert info.updated.any()
    first, last = rows(path, (slice(None), 0)), rows(path, (slice(None), -1))
    promises.equal(*results["zero"])
    promises.close(first["logits"], results["zero"][1], num_steps=0)
    assert not promises.moved(first["params"], PARAMS)
    statistics = {"batch_stats"} if name == "ttt_rotation_statistics" else set()
    assert promises.moved(last["params"], PARAMS) == {"params"} | statistics
    if name in ONLINE:
        promises.require_streams(results["streams"], (last, info), num_steps=num_steps)
        _, lasting = rows(results["streams"], 1)
        assert np.delete(lasting.updated, promises.SPOILED).all()
    else:
        promises.close(results["loop"], (last["logits"], info), num_steps=steps)
    if name in TRACED:
        same, other = results["varied"]
        promises.close(same, last["logits"][0], num_steps=steps)
        assert np.abs(same - other).max() > 1e-4
    if name in ONLINE:
        mean = softmax(last["views"]).mean(axis=1)
        np.testing.assert_allclose(softmax(last["mean"]), mean, rtol=1e-4)
    assert models.snapshot(PARAMS) == PRISTINE

"""Every method over batches keeps the promises of the library: one row each.

Parallel equals the loop, in any order and company; a NaN instance leaves the others bitwise alone,
in streams too; zero steps are the source prediction; a stream that forgets after every instance
is that of its episodes; the parameters stay what they were.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import models
from tests.core.compiling import quickly
from tests.core.streaming import rows, scanned
from tests.methods import promises
from ttt_jax import methods, resets

N = 5
PARAMS = models.make_params()
PRISTINE = models.snapshot(PARAMS)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(N))
BATCHES = models.make_images(N, batch=4)
IMAGES = models.make_images(N)
TRAINING = models.make_images(8, seed=2)
# An epsilon that does not blow rounding errors of a zero gradient up to full steps.
ADAM = optax.adam(0.05, eps=1e-2)
SGD = optax.sgd(0.1, momentum=0.9)
# Few leaves, as each takes time to compile; which adapt is for tests/core/test_conformance.py.
SOME = ttt.select.paths(r"params/(encoder/kernel|norm/scale)")


def classify(params, images):
    """Normalized with the statistics of the batch."""
    moments = models.batch_moments(params, images)["batch_stats"]
    return models.classify({**params, "batch_stats": moments}, images)


def classify_statistics(params, images):
    moments = models.batch_moments(params, images)
    return classify(params, images), moments


def linear(params):
    head = params["params"]["head"]
    return head["kernel"], head["bias"]


def jitter_pixels(image, key):
    return image + 0.3 * jax.random.normal(key, image.shape, jnp.float32)


def from_source(method):
    return method.build(quickly(method.measure, PARAMS, TRAINING))


def filtered(method, **options):
    settings = {"num_classes": models.CLASSES, "epsilon": 0.99, "margin": 0.95}
    return method(classify, optimizer=SGD, **settings, **options)


# Method -> (options -> Stream). All but the published settings that suit ten thousand images.
STREAMS = {
    "tent": lambda **options: methods.tent(classify, optimizer=ADAM, **options),
    "pseudo_label": lambda **options: methods.pseudo_label(
        classify, threshold=0.4, optimizer=ADAM, **options
    ),
    "rpl": lambda **options: methods.rpl(classify, optimizer=SGD, **options),
    "eata": lambda **options: from_source(filtered(methods.eata, fisher_weight=0.5, **options)),
    "rdumb": lambda **options: filtered(methods.rdumb, **options),
    # Its reset is its own: without bound it recovers after every batch that was learned from.
    "sar": lambda **options: methods.sar(classify, margin=0.95, optimizer=SGD, **options),
    "actmad": lambda **options: from_source(
        methods.actmad(
            models.classify,
            models.activations,
            augment=models.jitter,
            optimizer=SGD,
            select=SOME,
            **options,
        )
    ),
    "ttt_plus_plus": lambda **options: from_source(
        methods.ttt_plus_plus(
            classify,
            models.features,
            models.turn,
            augment=models.jitter,
            queue=6,
            count=10,
            optimizer=optax.sgd(0.01, momentum=0.9),
            select=SOME,
            **options,
        )
    ),
    # Restoration is by time: a spoiled batch has its turn too, so the row goes without.
    "cotta": lambda **options: methods.cotta(
        classify,
        augment=models.jitter,
        num_views=2,
        decay=0.5,
        optimizer=SGD,
        select=SOME,
        **{"reset": resets.never()} | options,
    ),
    "deyo": lambda **options: methods.deyo(
        classify,
        patches=3,
        threshold=-0.5,
        entropy_margin=1.0,
        optimizer=SGD,
        **options,
    ),
    "rotta": lambda **options: methods.rotta(
        models.classify,
        classify_statistics,
        augment=jitter_pixels,
        like=IMAGES[0],
        num_classes=models.CLASSES,
        capacity=6,
        update_every=4,
        decay=0.5,
        optimizer=SGD,
        **options,
    ),
    "note": lambda **options: methods.note(
        models.classify,
        classify_statistics,
        like=IMAGES[0],
        num_classes=models.CLASSES,
        capacity=6,
        update_every=4,
        optimizer=SGD,
        **options,
    ),
    "t3a": lambda **options: methods.t3a(models.features, linear=linear, num_supports=3, **options),
    "dua": lambda **options: methods.dua(
        models.classify, models.batch_moments, augment=jitter_pixels, num_views=3, **options
    ),
}
# Statistics alone, a memory alone, and one step at most in many instances.
NO_STEPS = ("dua", "t3a", "rotta", "note")


def instances_of(name):
    return IMAGES if name == "dua" else BATCHES


def source_of(name):
    if name == "dua":
        return ttt.unbatched(models.classify)
    return models.classify if name in ("actmad", "rotta", "note") else classify


def stream_of(name, period, **options):
    """The stream that forgets after so many instances, which may be traced."""
    if name == "sar":
        reset = {"reset_below": jnp.where(period == 1, jnp.inf, 0.0)}
    else:
        reset = {"reset": resets.every(period)}
    return STREAMS[name](predict="after", **reset, **options)


def probe(params, x):
    return {name: params[name] for name in ("params", "batch_stats")}


def served(name):
    """The options of a stream whose output shows beside the logits what they were made with."""
    if name in ("t3a", "cotta"):
        return {}
    return {"serve": lambda params, x: (source_of(name)(params, x), probe(params, x))}


def measured(name):
    """Every promise of a method in one program; its episodes predict as the method does."""
    episode = ttt.episode(STREAMS[name](predict="after"))
    options = served(name)

    def run(params, xs, keys):
        results = {
            "company": promises.in_company(episode, params, xs, keys),
            "streams": promises.in_streams(
                lambda period: stream_of(name, period, **options), params, xs, keys
            ),
        }
        if name == "cotta":
            stream = STREAMS[name](predict="after", serve=probe)
            results["served"] = promises.alone(ttt.episode(stream), params, xs[:1], keys[:1])[0]
        if name not in NO_STEPS:
            # What CoTTA serves by itself is averaged over views.
            stream = STREAMS[name](num_steps=0, **({"serve": classify} if name == "cotta" else {}))
            plain = jax.lax.map(lambda x: source_of(name)(params, x), xs)
            results["zero"] = scanned(stream, params, xs, keys)[1][0], plain
        return results

    return promises.measured(run, PARAMS, instances_of(name), KEYS)


@pytest.mark.parametrize("name", STREAMS)
def test_streams(name):
    results = measured(name)
    outputs, infos = results["streams"]
    if served(name):
        outputs, parameters = outputs
        results["served"] = rows(parameters, 0)
    # Statistics of four images make small differences larger.
    episodes = promises.require_company(results["company"], num_steps=4)
    promises.require_streams((outputs, infos), episodes, num_steps=4)
    if name not in NO_STEPS:
        promises.equal(*results["zero"])
    if name != "t3a":
        first = promises.moved(rows(results["served"], 0), PARAMS)
        assert first >= {"batch_stats" if name == "dua" else "params"}
    assert models.snapshot(PARAMS) == PRISTINE


def test_lame():
    predict = methods.lame(classify, models.features, num_neighbors=2)

    def run(*inputs):
        return promises.in_company(predict, *inputs), promises.alone(predict, *inputs)

    results, loop = promises.measured(run, PARAMS, BATCHES, KEYS)
    promises.close(loop, promises.require_company(results, num_steps=4), num_steps=4)
    assert models.snapshot(PARAMS) == PRISTINE

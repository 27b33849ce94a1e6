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
from tests.core.streaming import scanned
from ttt_jax import audit, methods, resets

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
    return image + 0.3 * jax.random.normal(key, image.shape)


def measured(method):
    return method.build(method.measure(PARAMS, TRAINING))


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
    "eata": lambda **options: measured(filtered(methods.eata, fisher_weight=0.5, **options)),
    "rdumb": lambda **options: filtered(methods.rdumb, **options),
    "sar": lambda reset=None, **options: methods.sar(
        classify,
        margin=0.95,
        # Without bound it recovers after every batch that was learned from.
        reset_below=0.0 if reset is None else jnp.inf,
        optimizer=SGD,
        **options,
    ),
    "actmad": lambda **options: measured(
        methods.actmad(
            models.classify,
            models.activations,
            augment=models.jitter,
            optimizer=SGD,
            **options,
        )
    ),
    "ttt_plus_plus": lambda **options: measured(
        methods.ttt_plus_plus(
            classify,
            models.features,
            models.turn,
            augment=models.jitter,
            queue=6,
            count=10,
            optimizer=optax.sgd(0.01, momentum=0.9),
            **options,
        )
    ),
    # Restoration is by time: a spoiled batch has its turn too, so the row goes without.
    "cotta": lambda reset=None, **options: methods.cotta(
        classify,
        augment=models.jitter,
        num_views=2,
        decay=0.5,
        optimizer=SGD,
        reset=resets.never() if reset is None else reset,
        **options,
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
ONE_IMAGE = ("dua",)
# Statistics alone, a memory alone, and one step at most in many instances.
NO_STEPS = ("dua", "t3a", "rotta", "note")


def instances_of(name):
    return IMAGES if name in ONE_IMAGE else BATCHES


def source_of(name):
    if name == "actmad":
        return models.classify
    return classify


def judge(differences, *, num_steps=4):
    """Statistics of four images make small differences larger."""
    changed = float(models.snapshot(PARAMS) != PRISTINE)
    audit.require(audit.findings({**differences, "pristine": changed}, num_steps=num_steps))


def poisoned(xs, index):
    return xs.at[index].set(jnp.nan)


@pytest.mark.parametrize("name", STREAMS)
def test_episodes(name):
    predict = ttt.episode(STREAMS[name](predict="after"))

    def measure(params, xs, keys):
        return audit.differences(predict, params, xs, keys)

    judge(quickly(measure, PARAMS, instances_of(name), KEYS))


@pytest.mark.parametrize("name", STREAMS)
def test_streams(name):
    xs = instances_of(name)
    forgetful = STREAMS[name](reset=resets.every(1), predict="after")
    lasting = STREAMS[name](predict="after")
    swapped = np.array([1, 0, 2, 3, 4])

    def measure(params, xs, keys):
        _, (outputs, info), _ = scanned(forgetful, params, xs, keys)
        episodes, alone = jax.lax.map(lambda pair: ttt.episode(lasting)(params, *pair), (xs, keys))
        # A spoiled instance that leaves no trace may as well come first.
        spoiled = poisoned(xs, 1)
        _, late, _ = scanned(lasting, params, spoiled, keys)
        _, early, _ = scanned(lasting, params, spoiled[swapped], keys[swapped])
        clean = np.array([0, 2, 3, 4])
        first, second = (
            jax.tree.map(lambda leaf, order=order: leaf[order], result)
            for result, order in ((late, clean), (early, swapped[clean]))
        )
        return {
            "every_1": audit.distance(
                (outputs, info.loss, info.ok), (episodes, alone.loss, alone.ok)
            ),
            "stream_poison": audit.distance(first, second),
            "updates": 1.0 - info.updated.any(),
        }

    judge(quickly(measure, PARAMS, xs, KEYS))


@pytest.mark.parametrize("name", [name for name in STREAMS if name not in NO_STEPS])
def test_zero_steps_are_the_source_prediction(name):
    serving = {"serve": classify} if name == "cotta" else {}
    stream = STREAMS[name](num_steps=0, **serving)

    def measure(params, xs, keys):
        _, (outputs, _), _ = scanned(stream, params, xs, keys)
        plain = jax.lax.map(lambda x: source_of(name)(params, x), xs)
        return {"zero_steps": audit.distance(outputs, plain)}

    judge(quickly(measure, PARAMS, BATCHES, KEYS))


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "t3a"])
def test_serve_predicts_with_the_adapted_parameters(name):
    """A probe beside the logits; with ``predict="after"`` its parameters are not the source's."""

    def serve(params, x):
        return {"params": params["params"], "batch_stats": params["batch_stats"]}

    stream = STREAMS[name](predict="after", serve=serve)
    _, (outputs, _), _ = quickly(
        lambda p, x, k: scanned(stream, p, x, k), PARAMS, instances_of(name), KEYS
    )
    moved = jax.tree.map(
        lambda new, old: bool((new[0] != old).any()),
        outputs,
        {name: PARAMS[name] for name in outputs},
    )
    assert any(jax.tree.leaves(moved["batch_stats" if name == "dua" else "params"]))


def test_lame():
    predict = methods.lame(classify, models.features, num_neighbors=2)

    def measure(params, xs, keys):
        return audit.differences(predict, params, xs, keys)

    judge(quickly(measure, PARAMS, BATCHES, KEYS))

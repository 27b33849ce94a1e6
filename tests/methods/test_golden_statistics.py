"""Rotation prediction in training mode against NumPy in float64: weights and running statistics."""

import jax
import numpy as np
import optax

import ttt_jax as ttt
from tests.core import golden, models
from tests.core.compiling import quickly
from ttt_jax import losses, methods, select

N, COPIES, STEPS, RATE, MOMENTUM = 2, 4, 2, 0.05, 0.7
PARAMS = models.make_params()
IMAGES = models.make_images(N)
KEYS = ttt.sample_keys(jax.random.key(3), np.arange(N))
FAST = ("norm/scale", "norm/bias", "rotation/kernel")


def grain(image, key):
    """A view that moves every pixel: the statistics of the copies stay far from 0."""
    return image + 0.3 * jax.random.normal(key, image.shape)


def turn_statistics(params, images):
    moments = models.batch_moments(params, images)
    return models.turn({**params, "batch_stats": moments["batch_stats"]}, images), moments


def hidden(p, images):
    flat, low_rank = images.reshape(len(images), -1), p["encoder/kernel_lora_a"]
    kernel = p["encoder/kernel"] + low_rank @ p["encoder/kernel_lora_b"]
    return flat @ kernel + p["encoder/bias"]


def features(p, rows, mean, variance):
    return np.tanh((rows - mean) / np.sqrt(variance) * p["norm/scale"] + p["norm/bias"])


def rotation(p, views, turns):
    """Cross-entropy of the copies, normalized by their own statistics."""
    rows = hidden(p, views)
    logits = features(p, rows, rows.mean(axis=0), rows.var(axis=0)) @ p["rotation/kernel"]
    return (-np.log(golden.softmax(logits)[np.arange(len(turns)), turns]).mean(),)


def test_steps_in_training_mode():
    def serve(params, x):
        return ttt.unbatched(models.classify)(params, x), params

    predict = methods.ttt_rotation_statistics(
        models.classify,
        turn_statistics,
        statistics_momentum=MOMENTUM,
        augment=grain,
        copies=COPIES,
        optimizer=optax.sgd(RATE),
        select=select.paths(*(f"params/{name}" for name in FAST)),
        num_steps=STEPS,
        trace=True,
        serve=serve,
    )

    def run(params, xs, keys):
        views = jax.vmap(lambda x, key: jax.vmap(lambda i: recorded(x, key, i))(np.arange(STEPS)))
        return ttt.batched(predict)(params, xs, keys), views(xs, keys)

    ((logits, served), info), views = quickly(run, PARAMS, IMAGES, KEYS)
    source = golden.flat(PARAMS["params"])
    for i, image in enumerate(IMAGES):
        p, stats = source, {k: np.float64(v) for k, v in PARAMS["batch_stats"]["norm"].items()}
        for step in range(STEPS):
            copies = np.asarray(views[i, step], np.float64)
            data = copies, turns_of(copies, image)
            golden.close(info.loss[i, step], rotation(p, *data)[0])
            slopes = golden.slopes(rotation, p, FAST, *data, width=1e-6)
            rows = hidden(p, copies)
            p = p | {name: p[name] - RATE * slope for name, slope in slopes.items()}
            new = {"mean": rows.mean(axis=0), "var": rows.var(axis=0)}
            stats = {k: MOMENTUM * old + (1 - MOMENTUM) * new[k] for k, old in stats.items()}
            weights = jax.tree.map(lambda leaf, i=i, s=step: leaf[i, s + 1], served)
            golden.same_weights(weights["params"], p)
            for name, value in stats.items():
                golden.close(weights["batch_stats"]["norm"][name], value, name)
            pixels = np.asarray(image[None], np.float64)
            lower = features(p, hidden(p, pixels), stats["mean"], stats["var"])
            golden.close(logits[i, step + 1], golden.dense(p, "head", lower)[0])
        golden.adapted(source, p, FAST, 0.001)


def recorded(image, key, step):
    """The copies of an inner step, from the library's own loss."""
    seen = []

    def logits(params, images):
        seen.append(images)
        return images.reshape(COPIES, -1)[:, :4]

    loss = losses.rotation(logits, copies=COPIES, augment=grain)
    loss({}, image, jax.random.fold_in(key, step))
    return seen[0]


def turns_of(views, image):
    """Read off the pixels: nearest to its view is the image turned by r."""
    spread = np.stack([(views - np.rot90(image, r)).std(axis=(1, 2, 3)) for r in range(4)])
    assert spread.min(axis=0).max() < 0.5 < np.sort(spread, axis=0)[1].min()
    return spread.argmin(axis=0)

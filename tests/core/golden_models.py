"""The models of the golden tests in jax, and runs of them that show what ``golden`` must know.

Random views and masks are data to the other implementation: they are recorded from the library's
loss, called with the key of each inner step.
"""

import jax
import jax.numpy as jnp
import numpy as np

import ttt_jax as ttt

from . import golden
from .compiling import quickly
from .streaming import run

SIDE, CHANNELS, WIDTH, CLASSES, N = 6, 2, 5, 3, 3
GRID, PIXELS = SIDE // golden.PATCH, golden.PATCH**2 * CHANNELS
PATCHES = GRID**2
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(N, SIDE, SIDE, CHANNELS)).astype(np.float32)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(N))
SIZE = 4


def normal(*shape, scale=0.3):
    return RNG.normal(size=shape, scale=scale).astype(np.float32)


def dense(rows, columns, scale):
    return {"kernel": normal(rows, columns, scale=scale), "bias": normal(columns)}


TWO_HEADS = {
    "shared": dense(SIDE * SIDE * CHANNELS, WIDTH, 0.15),
    "classes": dense(WIDTH, CLASSES, 1.0),
    "rotation": dense(WIDTH, 4, 1.0),
}
AUTOENCODER = {
    "encoder": {"kernel": normal(PIXELS, WIDTH), "position": normal(PATCHES, WIDTH)},
    "decoder": dense(WIDTH, PATCHES * PIXELS, 1.0),
    "head": dense(WIDTH, CLASSES, 2.0),
}
FEATURES = {
    "shared": TWO_HEADS["shared"],
    "classes": TWO_HEADS["classes"],
    "projection": dense(WIDTH, WIDTH - 1, 1.0),
    "decoder": dense(WIDTH, SIDE * SIDE * CHANNELS, 0.3),
}
SHARED = ("shared/kernel", "shared/bias")
BATCHES = RNG.normal(size=(N, SIZE, SIDE, SIDE, CHANNELS)).astype(np.float32)


def through(layer, inputs):
    return inputs @ layer["kernel"] + layer["bias"][None]


def shared(params, images):
    return jnp.tanh(through(params["shared"], images.reshape(images.shape[0], -1)))


def classify(params, images):
    return through(params["classes"], shared(params, images))


def turn(params, images):
    return through(params["rotation"], shared(params, images))


def project(params, images):
    return through(params["projection"], shared(params, images))


def decode(params, images):
    return through(params["decoder"], shared(params, images)).reshape(images.shape)


def encode(params, images, keep):
    """The mean over the visible patches: ``[N, WIDTH]``."""
    patches = images.reshape(-1, GRID, golden.PATCH, GRID, golden.PATCH, CHANNELS)
    patches = patches.swapaxes(2, 3).reshape(-1, PATCHES, PIXELS)
    visible = jnp.take_along_axis(patches, keep[:, :, None], axis=1)
    layer = params["encoder"]
    return jnp.tanh(visible @ layer["kernel"] + layer["position"][keep]).mean(axis=1)


def reconstruct(params, images, keep):
    flat = through(params["decoder"], encode(params, images, keep))
    return flat.reshape(-1, PATCHES, PIXELS)


def classify_patches(params, images):
    every = jnp.broadcast_to(jnp.arange(PATCHES)[None], (images.shape[0], PATCHES))
    return through(params["head"], encode(params, images, every))


def brightness(image, key):
    return image + jax.random.uniform(key, minval=-0.5, maxval=0.5)


def drawn(make_loss, model, params, num_steps, xs=IMAGES):
    """What the model function is first given at each inner step of each x: ``[N, S, ...]``."""

    def at_step(params, x, key, i):
        seen = []

        def recorder(params, *inputs):
            seen.append(inputs)
            return model(params, *inputs)

        make_loss(recorder)(params, x, jax.random.fold_in(key, i))
        return seen[0]

    steps = jax.vmap(at_step, (None, None, None, 0))
    all_of_them = jax.vmap(steps, (None, 0, 0, None))
    return [
        np.asarray(leaf) for leaf in quickly(all_of_them, params, xs, KEYS, np.arange(num_steps))
    ]


def with_weights(model, xs):
    """The prediction of one image, or of one batch, beside the parameters that made it."""
    one = model if xs.ndim == BATCHES.ndim else ttt.unbatched(model)
    return lambda params, x: (one(params, x), params)


def episodes(adapter, model, params, num_steps, xs=IMAGES):
    """``(outputs, weights, info)``, each with a row per image."""
    predict = ttt.episodic(adapter, with_weights(model, xs), num_steps=num_steps)
    (outputs, weights), info = quickly(ttt.batched(predict), params, xs, KEYS)
    return outputs, weights, info


def stream(adapter, model, params, xs=IMAGES, **options):
    """As ``episodes``, and the adapter's parameters after each image."""
    _, ((outputs, weights), info), carries = run(
        adapter, xs=xs, keys=KEYS, params=params, apply=with_weights(model, xs), **options
    )
    return (outputs, weights, info), carries.state.fast

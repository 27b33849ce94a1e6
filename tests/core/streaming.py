"""What the tests of streams and of resets share: a dense model's stream, and a scalar's walk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from ttt_jax import select

from . import models
from .compiling import quickly

N = 6
KEY = jax.random.key(0)
PARAMS = models.make_params()
IMAGES = models.make_images(N)
KEYS = ttt.sample_keys(KEY, np.arange(N))
classify = ttt.unbatched(models.classify)


def scanned(stream, params, xs, keys):
    """``(final carry, (outputs, infos), every carry)`` of a stream."""

    def step(carry, pair):
        carry, result = stream.step(params, carry, *pair)
        return carry, (result, carry)

    carry, (results, carries) = jax.lax.scan(step, stream.init(params), (xs, keys))
    return carry, results, carries


def adam_with_memory(loss=None):
    """An adapter with everything that a reset could forget: moments, memory and count."""
    chosen = select.paths(r".*/norm/.*", ".*/head/kernel")
    # A generous epsilon: Adam would blow rounding errors of a zero gradient up to full steps.
    optimizer = optax.adam(0.05, eps=1e-2)
    return ttt.gradient_adapter(loss or models.moving_center(), optimizer, select=chosen)


def run(adapter, *, reset, xs=IMAGES, keys=KEYS, params=PARAMS, apply=classify, **options):
    stream = ttt.online(adapter, apply, reset=reset, **options)
    return quickly(lambda p, x, k: scanned(stream, p, x, k), params, xs, keys)


def rows(tree, places):
    return jax.tree.map(lambda leaf: leaf[places], tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def walk(rate=1.0):
    """A scalar parameter pulled towards x; the output is the parameter."""
    adapter = ttt.gradient_adapter(
        lambda params, x, key: 0.5 * (params - x) ** 2, optax.sgd(rate), select=select.everything()
    )
    return adapter


def walk_stream(xs, *, rate=0.5, start=0.0, **options):
    stream = ttt.online(walk(rate), lambda params, x: params, **options)
    keys = ttt.sample_keys(KEY, np.arange(len(xs)))
    xs = np.asarray(xs, np.float32)
    return quickly(lambda p: scanned(stream, p, xs, keys), jnp.asarray(start))

"""What the tests of adapters share: losses whose gradients are known, and a run of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from ttt_jax import select

from .compiling import quickly

KEY = jax.random.key(0)
A = np.array([1.0, -2.0, 0.5], np.float32)
W = np.array([0.3, 0.1, -0.7], np.float32)
PARAMS = {"w": jnp.asarray(W), "frozen": jnp.asarray(2.0)}
ALL_W = select.paths("w")


def quadratic(params, x, key):
    """``f(w) = x * frozen / 2 * |w - A|^2``, with gradient ``x * frozen * (w - A)``."""
    return 0.5 * x * params["frozen"] * jnp.sum((params["w"] - A) ** 2)


def value_of(w, x):
    return x * np.sum((w - A) ** 2)


def gradient_of(w, x):
    return 2 * x * (w - A)


def run(adapter, steps=1, x=0.7, params=PARAMS, key=KEY):
    """State and infos after some steps on one instance."""

    def go(params, x, key):
        return ttt.inner_loop(adapter, steps)(params, adapter.init(params), x, key)

    return quickly(go, params, x, key)


def sgd(rate=0.1, **options):
    return ttt.gradient_adapter(quadratic, optax.sgd(rate), select=ALL_W, **options)


def quartic(params, x, key):
    return x * jnp.sum((params["w"] - A) ** 4)

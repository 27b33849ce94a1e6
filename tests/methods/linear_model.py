"""A linear classifier over three features and three classes, in jax and in NumPy (float64).

In NumPy its parameters are one vector: the biases, then the rows of the matrix.
"""

import jax
import numpy as np

import ttt_jax as ttt
from tests.core.compiling import quickly
from tests.core.streaming import scanned

N, SIZE, CLASSES = 4, 5, 3
RNG = np.random.default_rng(5)
PARAMS = {
    "b": RNG.normal(size=CLASSES).astype(np.float32),
    "w": RNG.normal(size=(3, CLASSES)).astype(np.float32),
}
BATCHES = RNG.normal(size=(N, SIZE, 3)).astype(np.float32)
KEYS = ttt.sample_keys(jax.random.key(3), np.arange(N))
EVERYTHING = ttt.select.everything()


def classify(params, inputs):
    return inputs @ params["w"] + params["b"][None]


def theta_of(params):
    return np.concatenate([np.asarray(params["b"]), np.asarray(params["w"]).ravel()]).astype(float)


def forward(theta, inputs):
    matrix = theta[CLASSES:].reshape(-1, CLASSES)
    return np.asarray(inputs, np.float64) @ matrix + theta[:CLASSES]


def probabilities(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def entropies(logits):
    p = probabilities(logits)
    return -(p * np.log(p)).sum(axis=-1)


def slope(function, theta, width=1e-6):
    """Central differences."""
    steps = width * np.eye(len(theta))
    return np.array([(function(theta + s) - function(theta - s)) / (2 * width) for s in steps])


def run(stream, xs=BATCHES, keys=KEYS, params=PARAMS):
    """``(outputs, infos, every carry)``."""
    _, (outputs, infos), carries = quickly(
        lambda p, x, k: scanned(stream, p, x, k), params, xs, keys
    )
    return outputs, infos, carries


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

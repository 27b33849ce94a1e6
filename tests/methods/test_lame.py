"""LAME against loops in NumPy, in float64."""

import jax
import numpy as np
import pytest

from tests.core.compiling import quickly
from ttt_jax import methods

from . import linear_model as lab

XS = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
KEY = jax.random.key(0)


def features(params, inputs):
    return inputs


def neighbors(vectors, count):
    """The ``count`` others of the largest cosine, for every row."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = []
    for i, unit in enumerate(units):
        distance = np.linalg.norm(units - unit, axis=1)
        rows.append([j for j in np.argsort(distance) if j != i][:count])
    return rows


def agreed(p, near, steps):
    """``z_i <- p_i exp(sum of the neighbors' z) / norm``, all rows at once."""
    z = p
    for _ in range(steps):
        pulled = p * np.exp([z[rows].sum(axis=0) for rows in near])
        z = pulled / pulled.sum(axis=1, keepdims=True)
    return z


@pytest.mark.parametrize("count", [1, 3, 40])
def test_fixed_point(count):
    predict = methods.lame(lab.classify, features, num_neighbors=count)
    output, info = quickly(predict, lab.PARAMS, XS, KEY)
    p = lab.probabilities(lab.forward(lab.theta_of(lab.PARAMS), XS))
    expected = agreed(p, neighbors(XS.astype(np.float64), count), 100)
    np.testing.assert_allclose(np.exp(output), expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected - p).max() > 0.05
    assert info.loss.shape == (0,) and info.ok and not info.updated


def test_number_of_iterations():
    """One step, by hand: each neighbor's prediction pulls once."""
    predict = methods.lame(lab.classify, features, num_neighbors=2, max_steps=1)
    output, _ = quickly(predict, lab.PARAMS, XS, KEY)
    p = lab.probabilities(lab.forward(lab.theta_of(lab.PARAMS), XS))
    expected = agreed(p, neighbors(XS.astype(np.float64), 2), 1)
    np.testing.assert_allclose(np.exp(output), expected, rtol=1e-4)
    settled = agreed(p, neighbors(XS.astype(np.float64), 2), 100)
    assert np.abs(settled - expected).max() > 1e-3


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"methods\.lame: num_neighbors must be an integer of at least 1, got 0"
    ):
        methods.lame(lab.classify, features, num_neighbors=0)
    with pytest.raises(ValueError, match=r"methods\.lame compares .* got batch=False"):
        methods.lame(lab.classify, features, batch=False)
    predict = methods.lame(lab.classify, features)
    with pytest.raises(ValueError, match=r"at least 2 instances; got \(1, 3\) and \(1, 3\)"):
        predict(lab.PARAMS, XS[:1], KEY)

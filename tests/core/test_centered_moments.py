"""Variances of activations far from zero, and covariances, are those of float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from ttt_jax import losses


class Batches:
    split = "train"

    def __init__(self, rows, *ends):
        self.rows, self.ends = rows, ends

    def __iter__(self):
        return iter(np.split(self.rows, self.ends))


@pytest.mark.parametrize(("center", "scale"), [(30, 0.01), (1000, 0.1), (0.3, 2.0)])
def test_variances_of_the_source_do_not_cancel(center, scale):
    normal = np.random.default_rng(0).standard_normal((4096, 3))
    rows = (center + scale * normal @ np.tri(3)).astype(np.float32)
    exact = rows.astype(np.float64)
    data = Batches(rows, 1000, 1500, 1501)

    each = losses.activation_moments(lambda params, x: {"layer": jnp.asarray(x)})
    found = ttt.source_statistics(each, None, data).value
    np.testing.assert_allclose(found.mean["layer"], exact.mean(0), rtol=1e-6, atol=1e-3 * scale)
    np.testing.assert_allclose(found.centered["layer"], exact.var(0), rtol=0.01)

    joint = losses.feature_moments(lambda params, x: jnp.asarray(x))
    found = ttt.source_statistics(joint, None, data).value
    np.testing.assert_allclose(found.centered, np.cov(exact.T, bias=True), rtol=0.01)

"""Instance-aware normalization against NumPy in float64, and where it is refused."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from ttt_jax.models import InstanceAware, from_linen, from_nnx, linen_statistics

RNG = np.random.default_rng(0)
# The second image stands out.
SCALE, SHIFT = np.array([[1, 4, 1], [0, 3, 0.2]]).reshape(2, 3, 1, 1, 1)
X = (RNG.normal(size=(3, 4, 5, 2)) * SCALE + SHIFT).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="bn")(x)


VARIABLES = {
    "params": {"bn": {"scale": np.array([1.5, 0.7], np.float32), "bias": np.ones(2, np.float32)}},
    "batch_stats": {
        "bn": {"mean": np.array([0.1, -0.3], np.float32), "var": np.array([1.2, 0.8], np.float32)}
    },
}


def shrink(value, by):
    return np.sign(value) * max(abs(value) - by, 0)


def expected(x, mean, var, width):
    """One instance and channel at a time."""
    out, touched = np.empty_like(x), 0
    count = x.shape[1] * x.shape[2]
    for i, c in np.ndindex(len(x), x.shape[-1]):
        values, spread = x[i, ..., c], var[c] + 1e-5
        off = shrink(values.mean() - mean[c], width * np.sqrt(spread / count))
        gap = shrink(values.var(ddof=1) - var[c], width * spread * np.sqrt(2 / (count - 1)))
        touched += (off != 0) + (gap != 0)
        standard = (values - mean[c] - off) / np.sqrt(max(var[c] + gap, 0) + 1e-5)
        out[i, ..., c] = standard * VARIABLES["params"]["bn"]["scale"][c] + 1
    return out, touched


def running():
    return [VARIABLES["batch_stats"]["bn"][name].astype(float) for name in ("mean", "var")]


@pytest.mark.parametrize("width", [0.5, 4.0])
def test_running_statistics_are_corrected(width):
    actual = from_linen(Net(), norm=InstanceAware(width))(VARIABLES, X)
    wanted, touched = expected(X.astype(np.float64), *running(), width)
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
    assert 0 < touched < 12
    # An instance does not see its mates.
    alone = from_linen(Net(), norm=InstanceAware(width))(VARIABLES, X[1:2])
    np.testing.assert_allclose(alone[0], actual[1], rtol=1e-5, atol=1e-6)


def test_without_a_deviation_it_is_the_source():
    actual = from_linen(Net(), norm=InstanceAware(1e6))(VARIABLES, X)
    np.testing.assert_allclose(actual, from_linen(Net())(VARIABLES, X), rtol=1e-5, atol=1e-6)


def test_the_width_may_be_traced():
    widths = np.array([0.5, 4.0], np.float32)
    many = jax.vmap(lambda w: from_linen(Net(), norm=InstanceAware(w))(VARIABLES, X))(widths)
    for row, width in zip(many, (0.5, 4.0), strict=True):
        alone = from_linen(Net(), norm=InstanceAware(width))(VARIABLES, X)
        np.testing.assert_allclose(row, alone, rtol=1e-5, atol=1e-6)


def test_training_corrects_the_statistics_of_the_batch():
    collect = linen_statistics(Net(), outputs=True, norm=InstanceAware(1.0))
    actual, statistics = collect(VARIABLES, X)
    x = X.astype(np.float64)
    mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    np.testing.assert_allclose(actual, expected(x, mean, var, 1.0)[0], rtol=1e-3, atol=1e-4)
    plain = linen_statistics(Net())(VARIABLES, X)
    jax.tree.map(np.testing.assert_array_equal, statistics, plain)


def test_layers_without_locations_keep_the_source():
    rows = X[:, 0, 0]
    actual = from_linen(Net(), norm=InstanceAware())(VARIABLES, rows)
    np.testing.assert_array_equal(actual, from_linen(Net())(VARIABLES, rows))


def test_refused():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return nn.BatchNorm(use_running_average=True, name="bn")(x, mask=mask)

    with pytest.raises(ValueError, match="InstanceAware has no form with a mask"):
        from_linen(Masked(), norm=InstanceAware())(VARIABLES, X, np.ones_like(X, bool))
    with pytest.raises(ValueError, match="from_nnx serves running statistics"):
        from_nnx(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), norm=InstanceAware())
    with pytest.raises(ValueError, match="at least 2 instances"):
        linen_statistics(Net(), norm=InstanceAware())(VARIABLES, X[:1])

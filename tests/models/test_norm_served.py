"""A ``norm`` served nowhere is not silent, and ``nn.jit`` inside a model does not hide it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ttt_jax.models import (
    from_linen,
    from_nnx,
    linen_statistics,
    nnx_statistics,
)

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


class OwnNorm(nn.Module):
    """Normalizes by statistics of its own, in a class that is not flax's."""

    @nn.compact
    def __call__(self, x):
        return x - self.variable("batch_stats", "mean", lambda: jnp.full(3, 0.5)).value[None]


class OwnNnx(nnx.Module):
    def __init__(self):
        self.mean = nnx.BatchStat(jnp.full(3, 0.5))

    def __call__(self, x):
        return x - self.mean[...][None]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(x)


class Compiled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(Block)(name="block")(x)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name="block")(x)


def message(bridge):
    return rf"{bridge}: norm='?\w+'? is served .*(OwnNorm|OwnNnx) called none.*derive your layer"


@pytest.mark.parametrize("norm", ["batch", 16])
def test_linen_statistics_of_another_class(norm):
    variables = OwnNorm().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=message("from_linen")):
        from_linen(OwnNorm(), norm=norm)(variables, X)
    with pytest.raises(ValueError, match=message("linen_statistics")):
        linen_statistics(OwnNorm(), norm=norm)(variables, X)
    from_linen(OwnNorm())(variables, X)


@pytest.mark.parametrize("norm", ["batch", 16])
def test_nnx_statistics_of_another_class(norm):
    apply, params = from_nnx(OwnNnx(), norm=norm)
    with pytest.raises(ValueError, match=message("from_nnx")):
        apply(params, X)
    with pytest.raises(ValueError, match=message("nnx_statistics")):
        nnx_statistics(OwnNnx())(params, X)


def test_a_model_without_statistics_warns():
    class Layered(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(x)

    variables = Layered().init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match=r"norm='batch' .*Layered called none.*does nothing"):
        from_linen(Layered(), norm="batch")(variables, X)


def test_nn_jit_does_not_keep_another_norm():
    variables = Plain().init(jax.random.key(0), X)
    for norm in ("running", "batch", "batch", 2, jnp.float32(2), jnp.float32(5), "running"):
        actual, expected = (from_linen(m, norm=norm)(variables, X) for m in (Compiled(), Plain()))
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    collect = linen_statistics(Compiled())
    for _ in range(2):
        mean = collect(variables, X)["batch_stats"]["block"]["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(mean, X.mean(axis=0), rtol=1e-6, atol=1e-6)

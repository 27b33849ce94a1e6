"""Activations of layers: what a layer returns, under its path, with its gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from ttt_jax import models

X = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


class Net(nn.Module):
    """One norm of each kind, one of them called twice, and something sown by the author."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        x = nn.GroupNorm(num_groups=1, name="gn")(nn.Dense(4, name="dense")(x))
        self.sow("intermediates", "mine", x)
        norm = nn.LayerNorm(name="ln")
        return norm(nn.relu(norm(x)) + 1.0)

    def nothing(self, x):
        return x


class Sub(nn.LayerNorm):
    def __call__(self, x):
        return super().__call__(x) + 1.0


class Block(nn.Module):
    layer: type[nn.Module] = nn.LayerNorm

    @nn.compact
    def __call__(self, x, _=None):
        x = self.layer(name="norm")(nn.Dense(3, name="dense")(x))
        return x


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(name="block")(x)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Scan(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="body")(x, None)[0]


def make(module, x=X):
    return jax.jit(module.init)(jax.random.key(0), x)


@pytest.fixture(scope="module")
def net():
    params = make(Net())
    params["batch_stats"]["bn"] = {
        "mean": np.array([0.3, -1.0, 0.5], np.float32),
        "var": np.array([2.0, 0.5, 1.0], np.float32),
    }
    return params


def by_flax(params, norm):
    """The same through flax's own capture; ``norm`` is whether the batch normalizes."""
    _, found = Net().apply(
        params, X, train=norm, capture_intermediates=True, mutable=["intermediates", "batch_stats"]
    )
    return found["intermediates"]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["running", "batch"])
def test_outputs_and_paths(net, norm, train):
    collect = models.linen_activations(Net(), norm=norm, kwargs={"train": train})
    found, expected = quickly(lambda p: (collect(p, X), by_flax(p, norm == "batch")), net)
    assert sorted(found) == ["bn", "gn", "ln/0", "ln/1"]
    np.testing.assert_allclose(found["bn"], expected["bn"]["__call__"][0], rtol=1e-5)
    np.testing.assert_allclose(found["gn"], expected["gn"]["__call__"][0], rtol=1e-4, atol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(
            found[f"ln/{i}"], expected["ln"]["__call__"][i], rtol=1e-4, atol=1e-5
        )


def test_other_layers(net):
    collect = models.linen_activations(Net(), layers=(nn.Dense,))
    found, expected = quickly(lambda p: (collect(p, X), by_flax(p, False)), net)
    assert sorted(found) == ["dense"]
    np.testing.assert_allclose(found["dense"], expected["dense"]["__call__"][0], rtol=1e-5)


def test_a_prior_is_served(net):
    """N -> infinity is the source's normalization, N = 0 the batch's."""
    norms = ("running", "batch", 0, 5)
    outputs = quickly(
        lambda p: [models.linen_activations(Net(), norm=norm)(p, X)["bn"] for norm in norms], net
    )
    outputs = jax.device_get(outputs)
    np.testing.assert_allclose(outputs[2], outputs[1], rtol=1e-4, atol=1e-5)
    assert np.abs(outputs[3] - outputs[0]).max() > 1e-2
    assert np.abs(outputs[3] - outputs[1]).max() > 1e-2


def test_gradients_flow(net):
    collect = models.linen_activations(Net())

    def total(params):
        return (collect({**net, "params": params}, X)["gn"] ** 3).sum()

    gradient = quickly(jax.grad(total), net["params"])
    for layer, leaf in (("dense", "kernel"), ("gn", "bias"), ("bn", "scale")):
        assert np.abs(gradient[layer][leaf]).max() > 1e-3
    np.testing.assert_array_equal(gradient["ln"]["scale"], np.zeros(4))


def test_a_subclass_counts_once_and_after_its_own_work():
    module = Block(Sub)
    params = make(module)
    found = models.linen_activations(module)(params, X)
    assert list(found) == ["norm"]
    np.testing.assert_array_equal(found["norm"], module.apply(params, X))


def test_the_module_itself():
    module = nn.LayerNorm()
    params = make(module)
    found = models.linen_activations(module)(params, X)
    np.testing.assert_array_equal(found["LayerNorm"], module.apply(params, X))


def test_under_remat():
    module = Remat()
    params = make(module)
    collect = models.linen_activations(module)
    assert list(jax.eval_shape(collect, params, X)) == ["block/norm"]
    gradient = quickly(jax.grad(lambda p: (collect(p, X)["block/norm"] ** 3).sum()), params)
    assert np.abs(gradient["params"]["block"]["dense"]["kernel"]).max() > 1e-3


def test_scan_is_refused():
    params = make(Scan())
    with pytest.raises(ValueError, match=r"'.*norm' lies in nn.scan or nn.vmap.*write the layers"):
        models.linen_activations(Scan())(params, X)


def test_no_such_layer(net):
    with pytest.raises(ValueError, match=r'Net called no layer.*BatchNorm, .*conv="lax"'):
        models.linen_activations(Net(), "nothing")(net, X)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"no method 'nothin'.*did you mean 'nothing'"):
        models.linen_activations(Net(), "nothin")


def test_not_a_module():
    with pytest.raises(TypeError, match=r"flax.linen.Module, received int"):
        models.linen_activations(3)


@pytest.mark.parametrize("conv", ["lax", "fused"])
def test_resnet(filled, conv):
    """The layers of the reference network; its fused kernels have none, though gn is called."""
    net = models.ResNet(depth=8, groups=2, conv=conv)
    params = filled(net, (16, 16, 3))
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    collect = models.linen_activations(net)
    if conv == "fused":
        with pytest.raises(ValueError, match=r'fused kernels of the ResNet.*conv="lax"'):
            jax.eval_shape(collect, params, images)
        return
    found = jax.eval_shape(collect, params, images)
    blocks = [f"layer{i}/0/gn{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert sorted(found) == sorted(["gn", *blocks])
    assert found["layer3/0/gn2"].shape == (2, 4, 4, 64)

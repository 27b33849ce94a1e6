"""The NNX bridge: same results as Linen, and a source module that never changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ttt_jax.models import from_linen, from_nnx, linen_statistics, nnx_statistics


class LinenNet(nn.Module):
    """Convolution, two BatchNorms, dropout, LayerNorm."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(not self.train, name="bn")(x))
        x = nn.Dropout(0.5, deterministic=True, name="drop")(x)
        x = nn.LayerNorm(name="ln")(nn.Dense(4, name="lin")(x.mean((1, 2))))
        return nn.BatchNorm(not self.train, name="last")(x)


class NnxNet(nnx.Module):
    """The same network, with state of every other kind beside it."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.lin = nnx.Linear(4, 4, rngs=rngs)
        self.ln = nnx.LayerNorm(4, rngs=rngs)
        self.last = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.bn(self.conv(x))))
        return self.last(self.ln(self.lin(x.mean((1, 2)))))

    def features(self, x):
        return self.conv(x)


@pytest.fixture(scope="module")
def net():
    module = NnxNet(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for layer in (module.bn, module.last):
        layer.mean[...] = rng.normal(size=4).astype(np.float32)
        layer.var[...] = rng.uniform(0.5, 2, size=4).astype(np.float32)
        layer.scale[...] = rng.uniform(0.5, 2, size=4).astype(np.float32)
    module.drop.deterministic = True
    return module


X = np.random.default_rng(1).normal(size=(4, 5, 5, 2)).astype(np.float32)


def _raw(module):
    """Every leaf with its path, random state included, copied."""
    return {
        path: np.array(
            jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v
        )
        for path, v in nnx.to_flat_state(nnx.as_pure(nnx.state(module)))
    }


# Between no instance of the source and 16 of them, one is for the full run.
@pytest.mark.parametrize(
    "norm", ["running", "batch", 0, pytest.param(1, marks=pytest.mark.full), 16]
)
def test_linen_and_nnx_agree_in_values_and_per_sample_gradients(net, norm):
    apply, params = from_nnx(net, norm=norm)
    linen = from_linen(LinenNet(), norm=norm)
    pairs = np.stack([X[:2], X[1:3], X[2:]])

    def slopes(apply):
        def loss(params, x):
            out = apply(params, x)
            return jnp.sum(jnp.sin(out)), out

        return jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0))

    both = jax.jit(lambda p, x: (slopes(apply)(p, x), slopes(linen)(p, x)))
    mine, theirs = both(params, pairs)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_params_have_linen_names_and_one_tree_for_every_method(net):
    _, params = from_nnx(net)
    features, other = from_nnx(net, "features")
    shapes = jax.eval_shape(LinenNet().init, jax.random.key(0), X)
    assert jax.tree.structure(params) == jax.tree.structure(dict(shapes))
    assert jax.tree.structure(params) == jax.tree.structure(other)
    np.testing.assert_array_equal(features(params, X), net.conv(X))


def test_running_norm_equals_the_module_in_evaluation_mode(net):
    apply, params = from_nnx(net)
    module = nnx.clone(net)
    module.eval()
    ours, theirs = nnx.jit(lambda module: (apply(params, X), module(X)))(module)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["running", "batch", 16])
def test_source_module_stays_bitwise_as_it_was(norm):
    module = NnxNet(nnx.Rngs(0))
    module.train()
    before = _raw(module)
    apply, params = from_nnx(module, norm=norm)
    kept = jax.tree.map(np.array, params)
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda p: jnp.sum(apply(p, X))))(params)
    apply(params, X)
    collect = nnx_statistics(module)
    collect(params, X)
    assert module.bn.use_running_average is False and type(module.bn) is nnx.BatchNorm
    after = _raw(module)
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path])
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_later_changes_of_the_module_do_not_reach_apply():
    module = NnxNet(nnx.Rngs(0))
    module.eval()
    apply, params = from_nnx(module)
    before = apply(params, X)
    module.train()
    module(X)
    np.testing.assert_array_equal(apply(params, X), before)


class Drop(nnx.Module):
    """Two dropouts, so that two streams must differ."""

    def __init__(self, rngs):
        self.first = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.stack([self.first(x), self.second(x)])


def test_dropout_is_reseeded_from_the_key_of_each_call():
    module = Drop(nnx.Rngs(0))
    before = _raw(module)
    apply, params = from_nnx(module, stochastic=True)
    assert params == {}
    x = jnp.ones((2, 64))
    keys = jax.random.split(jax.random.key(1), 3)
    masks = jax.jit(jax.vmap(lambda key: apply(params, x, key)))(keys)
    np.testing.assert_array_equal(masks[0], apply(params, x, keys[0]))
    flat = np.asarray(masks).reshape(6, -1)
    assert len(np.unique(flat, axis=0)) == 6
    np.testing.assert_allclose(flat.mean(), 1.0, atol=0.2)
    for path, value in before.items():
        np.testing.assert_array_equal(value, _raw(module)[path])


def test_dropout_keeps_the_mode_of_its_caller():
    module = Drop(nnx.Rngs(0))
    x = jnp.ones((2, 64))
    active, params = from_nnx(module)
    np.testing.assert_array_equal(active(params, x), active(params, x))
    assert not np.array_equal(active(params, x)[0], x)
    module.eval()
    quiet, params = from_nnx(module, stochastic=True)
    np.testing.assert_array_equal(quiet(params, x, jax.random.key(0))[0], x)


class CallTime(nnx.Module):
    """Random state given at call time."""

    def __init__(self):
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        return self.drop(x, rngs=rngs)


def test_modules_that_take_rngs_at_call_time_get_the_key():
    apply, params = from_nnx(CallTime(), stochastic=True)
    x = jnp.ones((1, 64))
    one, two = (apply(params, x, jax.random.key(i)) for i in range(2))
    assert not np.array_equal(one, two)


class Odd(nnx.Module):
    """A cache, a bare array, a list, a subclassed BatchNorm that chooses at call time."""

    def __init__(self, rngs):
        self.cache = nnx.Cache(jnp.ones(3))
        self.table = jnp.arange(3.0)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(11)])
        self.bn = Shifted(3, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        self.cache[...] = self.cache[...] + 1
        self.calls += 1
        for block in self.blocks:
            x = x + block(x)
        return self.bn(x) + (self.table * self.cache[...])[None]


class Shifted(nnx.BatchNorm):
    """A subclass that works around the layer it extends."""

    def __call__(self, x):
        return 2 * super().__call__(x + 1, use_running_average=False)


def test_other_state_has_collections_of_its_own():
    module = Odd(nnx.Rngs(0))
    before = _raw(module)
    x = X[:, 0, 0, :1] + np.arange(3, dtype=np.float32)[None]
    apply, params = from_nnx(module, norm="batch")
    assert set(params) == {"params", "batch_stats", "cache", "arrays"}
    assert set(params["params"]["blocks"]) == {str(i) for i in range(11)}
    out = apply(params, x)
    np.testing.assert_array_equal(out, apply(params, x))
    assert module.calls == 0
    for path, value in before.items():
        np.testing.assert_array_equal(value, _raw(module)[path])
    np.testing.assert_allclose(out, nnx.clone(module)(x), rtol=1e-5, atol=1e-5)
    running, _ = from_nnx(module)
    assert not np.allclose(running(params, x), out, atol=1e-2)


class Stacked(nnx.Module):
    """BatchNorms stacked by ``nnx.vmap``, run by ``nnx.scan`` under ``nnx.remat``."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def build(rngs):
            return nnx.BatchNorm(2, rngs=rngs)

        self.layers = build(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return jnp.sin(3 * layer(x))

        return run(self.layers, x)


@pytest.mark.parametrize("norm", ["running", "batch", 16])
def test_norm_reaches_layers_inside_nnx_transformations(norm):
    module = Stacked(nnx.Rngs(0))
    x = X[:, 0, 0]
    apply, params = from_nnx(module, norm=norm)
    expected = x.astype(np.float64)
    for _ in range(3):
        w = {"running": 1.0, "batch": 0.0}.get(norm, 16 / 20)
        mean, var = (1 - w) * expected.mean(0), w + (1 - w) * expected.var(0)
        expected = np.sin(3 * (expected - mean) / np.sqrt(var + 1e-5))
    np.testing.assert_allclose(jax.jit(apply)(params, x), expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_layers_inside_nnx_transformations():
    module = Stacked(nnx.Rngs(0))
    x = X[:, 0, 0]
    _, params = from_nnx(module)
    statistics = nnx_statistics(module)(params, x)["batch_stats"]["layers"]
    first = np.sin(3 * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
    np.testing.assert_allclose(statistics["mean"][0], x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["mean"][1], first.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["var"][1], first.var(0), rtol=1e-4, atol=1e-5)


class Twice(nnx.Module):
    """One BatchNorm called twice."""

    def __init__(self, rngs):
        self.bn = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        return self.bn(x) + self.bn(3 * x)


def test_statistics_of_a_shared_layer_are_the_mean_over_its_calls():
    module = Twice(nnx.Rngs(0))
    _, params = from_nnx(module)
    x = X[:, 0, 0]
    collected = nnx_statistics(module)(params, x)["batch_stats"]["bn"]
    np.testing.assert_allclose(collected["mean"], 2 * x.mean(0), rtol=1e-5, atol=1e-6)


def test_prior_at_one_instance_by_hand_and_traced(net):
    layer = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.array([1.0, -1.0])
    layer.var[...] = jnp.array([2.0, 0.5])
    image = X[:1]
    mean = 16 / 17 * np.array([1.0, -1.0]) + 1 / 17 * image.mean((0, 1, 2))
    var = 16 / 17 * np.array([2.0, 0.5]) + 1 / 17 * image.var((0, 1, 2))
    apply, params = from_nnx(layer, norm=16)
    np.testing.assert_allclose(
        apply(params, image), (image - mean) / np.sqrt(var + 1e-5), rtol=1e-5, atol=1e-6
    )
    swept = jax.jit(jax.vmap(lambda n: from_nnx(layer, norm=n)[0](params, image)))(
        jnp.array([1, 16])
    )
    np.testing.assert_allclose(swept[1], apply(params, image), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", 0])
def test_statistics_of_one_instance_are_refused(net, norm):
    apply, params = from_nnx(net, norm=norm)
    with pytest.raises(ValueError, match=r"at least 2 instances, received 1 at BatchNorm 'bn'"):
        apply(params, X[:1])
    # A method without BatchNorm has nothing to refuse.
    assert from_nnx(net, "features", norm=norm)[0](params, X[:1]).shape == (1, 5, 5, 4)


def test_statistics_agree_with_linen(net):
    _, params = from_nnx(net)
    mine = nnx_statistics(net)(params, X)
    theirs = linen_statistics(LinenNet())(params, X)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_outputs_of_the_pass_that_collects(net):
    apply, params = from_nnx(net, norm="batch")
    outputs, statistics = nnx_statistics(net, outputs=True)(params, X)
    np.testing.assert_array_equal(outputs, apply(params, X))
    jax.tree.map(np.testing.assert_array_equal, statistics, nnx_statistics(net)(params, X))


def test_mistakes_are_named(net):
    apply, params = from_nnx(net)
    with pytest.raises(ValueError, match="no method 'feature'; did you mean 'features'"):
        from_nnx(net, "feature")
    with pytest.raises(TypeError, match=r"from_nnx takes an nnx\.Module, received LinenNet"):
        from_nnx(LinenNet())
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        from_nnx(net, norm="bach")
    with pytest.raises(ValueError, match="NnxLess has none"):
        from_nnx(NnxLess(), stochastic=True)
    with pytest.raises(ValueError, match="received no key"):
        from_nnx(net, stochastic=True)[0](params, X)
    broken = {**params, "params": {k: v for k, v in params["params"].items() if k != "lin"}}
    with pytest.raises(ValueError, match="'params/lin/bias' is missing"):
        apply(broken, X)
    with pytest.raises(ValueError, match="needs batch statistics"):
        nnx_statistics(NnxLess())


class NnxLess(nnx.Module):
    """No state at all."""

    def __call__(self, x):
        return x

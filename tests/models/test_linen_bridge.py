"""The Linen bridge: every norm equals flax's own arithmetic, and nothing is written."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models import _checks, from_linen, linen_statistics


class Net(nn.Module):
    """Two BatchNorms, so that the second sees what the first one did."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="bn1")(x)
        x = nn.relu(nn.Dense(4, name="dense")(x))
        return nn.BatchNorm(name="bn2")(x, not train)

    def features(self, x):
        return x


class Fixed(nn.Module):
    """One BatchNorm whose author fixed training mode and chose unusual options."""

    options: dict

    @nn.compact
    def __call__(self, x, mask=None):
        return nn.BatchNorm(use_running_average=False, name="bn", **self.options)(x, mask=mask)


def _stats(rng, size):
    return {
        "mean": rng.normal(size=size).astype(np.float32),
        "var": rng.uniform(0.5, 2, size=size).astype(np.float32),
    }


def _affine(rng, size):
    return {
        "scale": rng.uniform(0.5, 2, size=size).astype(np.float32),
        "bias": rng.normal(size=size).astype(np.float32),
    }


@pytest.fixture(scope="module")
def net():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 4)).astype(np.float32)
    return {
        "params": {
            "bn1": _affine(rng, 3),
            "dense": {"kernel": kernel, "bias": np.zeros(4, np.float32)},
            "bn2": _affine(rng, 4),
        },
        "batch_stats": {"bn1": _stats(rng, 3), "bn2": _stats(rng, 4)},
    }


X = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


def _train(variables, x=X):
    return Net().apply(variables, x, train=True, mutable=["batch_stats"])[0]


@pytest.mark.parametrize("train", [False, True])
def test_running_is_flax_evaluation_whatever_the_mode(net, train):
    apply = from_linen(Net(), kwargs={"train": train})
    np.testing.assert_array_equal(apply(net, X), Net().apply(net, X))


@pytest.mark.parametrize("train", [False, True])
def test_batch_is_flax_training_whatever_the_mode(net, train):
    apply = from_linen(Net(), norm="batch", kwargs={"train": train})
    np.testing.assert_array_equal(apply(net, X), _train(net))


def _hand(variables, x, norm):
    """Both layers by hand, the second on activations that the first has renormalized."""

    def layer(name, x):
        source, affine = variables["batch_stats"][name], variables["params"][name]
        w = norm / (norm + len(x))
        mean = w * source["mean"] + (1 - w) * x.mean(0)
        var = w * source["var"] + (1 - w) * x.var(0)
        return (x - mean) / np.sqrt(var + 1e-5) * affine["scale"] + affine["bias"]

    hidden = np.maximum(layer("bn1", x) @ variables["params"]["dense"]["kernel"], 0)
    return layer("bn2", hidden)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("norm", [1, 16])
def test_prior_is_blended_during_the_forward_pass(net, norm, size):
    out = from_linen(Net(), norm=norm)(net, X[:size])
    np.testing.assert_allclose(
        out, _hand(net, X[:size].astype(np.float64), norm), rtol=2e-5, atol=1e-5
    )


def test_prior_counts_instances_not_pixels():
    # One 4x4 image: 16/17 of the source, 1/17 of the image's own statistics.
    rng = np.random.default_rng(2)
    variables = {"params": {"bn": _affine(rng, 3)}, "batch_stats": {"bn": _stats(rng, 3)}}
    image = rng.normal(size=(1, 4, 4, 3)).astype(np.float32)
    source, affine = variables["batch_stats"]["bn"], variables["params"]["bn"]
    mean = 16 / 17 * source["mean"] + 1 / 17 * image.mean((0, 1, 2))
    var = 16 / 17 * source["var"] + 1 / 17 * image.var((0, 1, 2))
    expected = (image - mean) / np.sqrt(var + 1e-5) * affine["scale"] + affine["bias"]
    out = from_linen(Fixed({}), norm=16)(variables, image)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_prior_runs_from_batch_to_source_statistics(net):
    np.testing.assert_allclose(from_linen(Net(), norm=0)(net, X), _train(net), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        from_linen(Net(), norm=10**9)(net, X), Net().apply(net, X), rtol=1e-5, atol=1e-6
    )


def test_prior_may_be_traced(net):
    priors = jnp.array([0.0, 1.0, 16.0])
    swept = jax.jit(jax.vmap(lambda n: from_linen(Net(), norm=n)(net, X)))(priors)
    for row, norm in zip(swept, (0, 1, 16), strict=True):
        np.testing.assert_allclose(row, from_linen(Net(), norm=norm)(net, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"axis": 1},
        {"axis": (1, 2)},
        {"use_fast_variance": False, "epsilon": 0.1},
        {"dtype": jnp.bfloat16},
        {"use_scale": False, "use_bias": False, "momentum": 1.0},
        {"force_float32_reductions": False, "param_dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_every_option_of_batch_norm_is_honored(options):
    x = np.random.default_rng(3).normal(size=(4, 3, 2)).astype(np.float32)
    module = Fixed(options)
    variables = module.init(jax.random.key(0), x)
    trained, updated = module.apply(variables, x, mutable=["batch_stats"])
    out = from_linen(module, norm="batch")(variables, x)
    np.testing.assert_array_equal(out, trained)
    assert out.dtype == trained.dtype
    plain = nn.BatchNorm(use_running_average=True, **options)
    inner = {name: tree["bn"] for name, tree in updated.items()} | {
        "params": variables.get("params", {}).get("bn", {})
    }
    served = from_linen(module)({**variables, **updated}, x)
    np.testing.assert_array_equal(served, plain.apply(inner, x))


def test_masked_statistics(net):
    rng = np.random.default_rng(4)
    variables = {"params": {"bn": _affine(rng, 3)}, "batch_stats": {"bn": _stats(rng, 3)}}
    mask = np.array([1, 1, 0, 1, 0], bool)[:, None]
    out = from_linen(Fixed({}), norm="batch")(variables, X, mask)
    expected, _ = Fixed({}).apply(variables, X, mask, mutable=["batch_stats"])
    np.testing.assert_array_equal(out, expected)
    assert not np.allclose(out, from_linen(Fixed({}), norm="batch")(variables, X))


class Shifted(nn.BatchNorm):
    """A subclass that works around the layer it extends."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 2 * super().__call__(x + 1, use_running_average)


class Lifted(nn.Module):
    """BatchNorms behind flax's own transformations."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Shifted(name="sub")(x, not train)
        x = nn.jit(nn.BatchNorm)(use_running_average=not train, name="jit")(x)
        x = nn.remat(nn.BatchNorm, static_argnums=(2,))(name="remat")(x, not train)

        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(3)(nn.BatchNorm(not train, name="bn")(x)), None

        scan = nn.scan(
            Body,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scan(name="scan")(x, None)[0]


def test_subclasses_and_lifted_transformations():
    module = Lifted()
    variables = jax.jit(module.init)(jax.random.key(0), X)

    @jax.jit
    def run(variables):
        # A plain call first: a cached trace must not hide the bridge's norm.
        plain = module.apply(variables, X)
        trained, updated = module.apply(variables, X, train=True, mutable=["batch_stats"])
        bridged = from_linen(module, norm="batch")(variables, X), from_linen(module)(variables, X)
        collected = linen_statistics(module)(variables, X)["batch_stats"]
        return (trained, plain), bridged, updated, collected

    variables = jax.device_get(variables)
    (trained, plain), (batch, running), updated, collected = jax.device_get(run(variables))
    np.testing.assert_allclose(batch, trained, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(running, plain, rtol=1e-5, atol=1e-6)
    assert collected["scan"]["bn"]["mean"].shape == (2, 3)
    moved = jax.tree.map(
        lambda old, new: 0.99 * old + 0.01 * new, variables["batch_stats"], collected
    )
    for mine, theirs in zip(
        jax.tree.leaves(moved), jax.tree.leaves(updated["batch_stats"]), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_outputs_of_the_pass_that_collects(net):
    outputs, statistics = linen_statistics(Net(), outputs=True)(net, X)
    np.testing.assert_array_equal(outputs, from_linen(Net(), norm="batch")(net, X))
    alone = linen_statistics(Net())(net, X)
    jax.tree.map(np.testing.assert_array_equal, statistics, alone)


def test_a_prior_may_be_served_while_the_batch_is_collected(net):
    """What RoTTA's normalization is: the second layer sees what the blend in the first made."""
    outputs, statistics = linen_statistics(Net(), outputs=True, norm=16)(net, X)
    np.testing.assert_array_equal(outputs, from_linen(Net(), norm=16)(net, X))
    alone = linen_statistics(Net())(net, X)["batch_stats"]
    found = statistics["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, found["bn1"], alone["bn1"])
    assert np.abs(found["bn2"]["mean"] - alone["bn2"]["mean"]).max() > 1e-3
    shared = Twice().init(jax.random.key(0), X, method="both")
    outputs, _ = linen_statistics(Twice(), outputs=True, norm=3)(shared, X)
    np.testing.assert_allclose(outputs, from_linen(Twice(), norm=3)(shared, X), rtol=1e-6)
    with pytest.raises(ValueError, match="collects the statistics of a batch"):
        linen_statistics(Net(), norm="running")


def test_gradients_flow_as_in_training(net):
    def grad(fn):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn({**net, "params": p})))))(
            net["params"]
        )

    theirs = jax.tree.leaves(grad(_train))
    forward = linen_statistics(Net(), outputs=True)
    for fn in (lambda v: from_linen(Net(), norm="batch")(v, X), lambda v: forward(v, X)[0]):
        for a, b in zip(jax.tree.leaves(grad(fn)), theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", 0])
def test_statistics_of_one_instance_are_refused(net, norm):
    apply = from_linen(Net(), norm=norm)
    with pytest.raises(
        ValueError, match=r"at least 2 instances, received 1 at BatchNorm 'bn1'.*16"
    ):
        apply(net, X[:1])
    with pytest.raises(ValueError, match="at least 2 instances"):
        jax.vmap(lambda x: apply(net, x[None]))(jnp.asarray(X))


class Noisy(nn.Module):
    """Two random streams."""

    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=not self.train, name="drop")(x)
        noise = jax.random.normal(self.make_rng("noise"), x.shape) if self.has_rng("noise") else 0.0
        return x + noise


def test_stochastic_model_functions_take_a_key():
    key, other = jax.random.split(jax.random.key(0))
    x = jnp.ones((4, 8))
    apply = from_linen(Noisy(), stochastic=True)
    expected = Noisy().apply({}, x, rngs={"dropout": key})
    np.testing.assert_array_equal(apply({}, x, key), expected)
    assert not np.array_equal(apply({}, x, key), apply({}, x, other))
    both = from_linen(Noisy(), stochastic=True, rngs=("dropout", "noise"))
    np.testing.assert_array_equal(both({}, x, key), both({}, x, key))
    assert not np.array_equal(both({}, x, key), apply({}, x, key))
    np.testing.assert_array_equal(from_linen(Noisy(train=False))({}, x), x)


def test_statistics_have_the_layout_of_the_selection(net):
    statistics = linen_statistics(Net())(net, X)
    assert jax.tree.leaves(statistics["params"]) == []
    holes = jax.tree.map(lambda _: 0, statistics["params"], is_leaf=lambda leaf: leaf is None)
    assert jax.tree.structure(holes) == jax.tree.structure(net["params"])
    np.testing.assert_allclose(statistics["batch_stats"]["bn1"]["mean"], X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["batch_stats"]["bn1"]["var"], X.var(0), rtol=1e-4)
    _, updated = Net().apply(net, X, train=True, mutable=["batch_stats"])
    expected = (
        updated["batch_stats"]["bn2"]["var"] - 0.99 * net["batch_stats"]["bn2"]["var"]
    ) / 0.01
    np.testing.assert_allclose(statistics["batch_stats"]["bn2"]["var"], expected, atol=1e-4)


class Twice(nn.Module):
    """One BatchNorm called twice, and one that the main method never reaches."""

    def setup(self):
        self.bn = nn.BatchNorm(use_running_average=True)
        self.idle = nn.BatchNorm(use_running_average=True)

    def __call__(self, x):
        return self.bn(x) + self.bn(3 * x)

    def both(self, x):
        return self(x) + self.idle(x)


def test_shared_layers_average_and_idle_ones_keep_the_source():
    variables = Twice().init(jax.random.key(0), X, method="both")
    statistics = linen_statistics(Twice())(variables, X)["batch_stats"]
    np.testing.assert_allclose(statistics["bn"]["mean"], 2 * X.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(statistics["idle"]["var"], np.ones(3))
    out = from_linen(Twice(), norm="batch")(variables, X)
    np.testing.assert_allclose(out, 2 * (X - X.mean(0)) / X.std(0), rtol=1e-3, atol=1e-3)


def test_mistakes_are_named(net):
    with pytest.raises(ValueError, match="no method 'feature'; did you mean 'features'"):
        from_linen(Net(), "feature")
    with pytest.raises(TypeError, match=r"from_linen takes a flax\.linen\.Module, received dict"):
        from_linen({})
    with pytest.raises(ValueError, match="did you mean 'running'"):
        from_linen(Net(), norm="runing")
    with pytest.raises(ValueError, match=r"finite and >= 0, received -1"):
        from_linen(Net(), norm=-1)
    with pytest.raises(TypeError, match="received True of type bool"):
        from_linen(Net(), norm=True)
    with pytest.raises(ValueError, match=r"one number, received an array of shape \(2,\)"):
        from_linen(Net(), norm=jnp.ones(2))
    with pytest.raises(ValueError, match="name at least one"):
        from_linen(Net(), stochastic=True, rngs=())
    with pytest.raises(ValueError, match="received no key"):
        from_linen(Noisy(), stochastic=True)({}, X)
    with pytest.raises(ValueError, match="BatchNorm 'bn1' has no statistics"):
        from_linen(Net())({"params": net["params"]}, X)
    with pytest.raises(ValueError, match="leading batch axis"):
        from_linen(Net())(net, jnp.float32(1))
    with pytest.raises(ValueError, match="needs a batch_stats collection"):
        linen_statistics(Net())({"params": net["params"]}, X)


def test_method_may_be_a_function_and_statistics_are_never_returned(net):
    np.testing.assert_array_equal(from_linen(Net(), Net.features)(net, X), X)
    before = jax.tree.map(np.copy, net)
    from_linen(Net(), norm="batch", kwargs={"train": True})(net, X)
    jax.tree.map(np.testing.assert_array_equal, before, net)


def test_a_prior_counts_all_leaves_of_the_inputs():
    """Whichever comes first: ``n`` is the batch's, or the inputs are refused."""
    uneven = {"a": jnp.ones((1, 2)), "x": jnp.ones((4, 2))}
    with pytest.raises(
        ValueError, match=r"from_linen: inputs .* same leading axis .*'a': \(1, 2\)"
    ):
        _checks.batch_size(uneven, "from_linen", 16)
    assert _checks.batch_size(uneven, "from_linen", "running") == 1

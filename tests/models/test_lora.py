"""Low-rank factors that qwix adds to the reference models, against weights merged in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import ttt_jax as ttt
from ttt_jax import models, select

qwix = pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")

# Sizes that no activation of seven instances has.
VIT = models.ViT(
    image_size=6,
    patch=2,
    channels=3,
    width=20,
    depth=1,
    heads=2,
    num_classes=13,
    decoder_width=8,
    decoder_depth=1,
)
RESNET = models.ResNet(depth=8, width=4, groups=2, num_classes=3, conv="lax")
RANK, ALPHA = 2, 6.0
LINEAR = ("attention/query", "attention/key", "attention/value", "attention/out", "up", "down")


def with_factors(net, module_path, methods):
    provider = qwix.LoraProvider(module_path=module_path, rank=RANK, alpha=ALPHA)
    return qwix.apply_lora_to_model(net, provider, methods=methods)


def flat(variables):
    return traverse_util.flatten_dict(variables, sep="/")


def merged(variables):
    """The variables without factors: ``kernel + alpha / rank * a b`` with flattened axes."""
    leaves = {name: np.asarray(leaf) for name, leaf in flat(variables).items()}
    plain = {name: leaf for name, leaf in leaves.items() if "_lora_" not in name}
    for name, a in leaves.items():
        if name.endswith("_lora_a"):
            kernel, b = name.removesuffix("_lora_a"), leaves[name.removesuffix("a") + "b"]
            product = a.reshape(-1, RANK) @ b.reshape(RANK, -1)
            plain[kernel] = plain[kernel] + ALPHA / RANK * product.reshape(plain[kernel].shape)
    return traverse_util.unflatten_dict(plain, sep="/")


@pytest.fixture(scope="module")
def vit(filled):
    net = with_factors(VIT, r"encoder/block_\d+/.*", ("__call__", "rotation", "reconstruct"))
    images = jax.random.normal(jax.random.key(1), (7, 6, 6, 3))
    return net, filled(net, (6, 6, 3)), images


def test_every_linear_layer_of_the_encoder_has_factors(vit):
    _, variables, _ = vit
    expected = {
        f"params/encoder/block_0/{layer}/kernel_lora_{factor}"
        for layer in LINEAR
        for factor in "ab"
    }
    assert set(select.describe(select.lora(), variables).paths) == expected


def test_factors_start_as_the_source():
    """The base keeps its values, A is drawn, B is zero: the same prediction to the bit."""
    net = with_factors(VIT, r"encoder/block_0/(up|down)", ("__call__",))
    images = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))

    @jax.jit
    def both(key):
        source, added = VIT.init(key, images), net.init(key, images)
        return source, added, VIT.apply(source, images), net.apply(added, images)

    source, added, before, after = jax.device_get(both(jax.random.key(0)))
    added = flat(added)
    assert all(np.array_equal(added[name], leaf) for name, leaf in flat(source).items())
    factors = {name: leaf for name, leaf in added.items() if "_lora_" in name}
    assert len(factors) == 4
    assert all(leaf.any() == name.endswith("_a") for name, leaf in factors.items())
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("method", ["__call__", "rotation", "reconstruct"])
def test_heads_use_the_merged_weights(vit, method):
    """Every head that ``methods`` names, as the plain model with merged kernels predicts it."""
    net, variables, images = vit
    keep = (jnp.array([[0, 3]] * 7),) if method == "reconstruct" else ()
    found = jax.jit(lambda v: net.apply(v, images, *keep, method=method))(variables)
    plain = jax.jit(lambda v: VIT.apply(v, images, *keep, method=method))
    np.testing.assert_allclose(found, plain(merged(variables)), rtol=1e-4, atol=1e-4)
    without = {name: leaf for name, leaf in flat(variables).items() if "_lora_" not in name}
    without = traverse_util.unflatten_dict(without, sep="/")
    assert np.abs(found - plain(without)).max() > 1e-2


def test_the_base_stays_one_shared_matrix(vit):
    """Seven instances: products with the base have no batch axis, those with factors have one."""
    net, variables, images = vit
    apply = models.from_linen(net)
    adapter = ttt.gradient_adapter(ttt.losses.entropy(apply), optax.sgd(1e-2), select=select.lora())
    predict = ttt.episodic(adapter, ttt.unbatched(apply), num_steps=1)
    keys = ttt.sample_keys(jax.random.key(0), np.arange(7))
    assert ttt.audit.copied_frozen(predict, select.lora(), variables, images, keys) == []
    text = jax.jit(ttt.batched(predict)).lower(variables, images, keys).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    base = [line for line in dots if re.search(r"[(, ]tensor<20x80xf32>", line)]
    factor = [line for line in dots if "tensor<7x20x2xf32>" in line]
    assert base and not any("batching_dims" in line for line in base)
    assert factor and all("batching_dims" in line for line in factor)


def test_dense_layers_of_the_resnet(filled):
    """Convolutions have no factors here; the heads do, and use them."""
    net = with_factors(RESNET, r"(rotation_)?fc", ("__call__", "rotation"))
    variables, images = filled(net, (8, 8, 3)), jax.random.normal(jax.random.key(2), (2, 8, 8, 3))
    names = {f"params/{fc}/kernel_lora_{f}" for fc in ("fc", "rotation_fc") for f in "ab"}
    assert set(select.describe(select.lora(), variables).paths) == names
    for method in ("__call__", "rotation"):
        found = jax.jit(lambda v, m=method: net.apply(v, images, method=m))(variables)
        plain = jax.jit(lambda v, m=method: RESNET.apply(v, images, method=m))
        np.testing.assert_allclose(found, plain(merged(variables)), rtol=1e-4, atol=1e-4)

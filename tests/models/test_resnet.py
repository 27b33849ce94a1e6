"""The TTT paper's ResNet: names, branch, precision, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ttt_jax.models import ResNet, from_linen, init

# XLA's own convolution compiles fastest; tests/models/test_conv.py has the forms.
SMALL = {"depth": 8, "width": 4, "groups": 2, "num_classes": 3, "conv": "lax"}


def _flat(variables):
    return traverse_util.flatten_dict(variables["params"], sep="/")


@pytest.fixture(scope="module")
def small(filled):
    module = ResNet(**SMALL)
    return module, filled(module, (8, 8, 1))


def test_parameter_names_are_those_of_the_public_checkpoint():
    module = ResNet(depth=26)
    shapes = jax.eval_shape(lambda key: init(module, key, (32, 32, 3)), jax.random.key(0))
    main = {name for name in _flat(shapes) if not name.startswith("rotation_")}
    expected = {"conv1/kernel", "gn/scale", "gn/bias", "fc/kernel", "fc/bias"}
    for layer in (1, 2, 3):
        for block in range(4):
            prefix = f"layer{layer}/{block}"
            expected |= {f"{prefix}/conv{i}/kernel" for i in (1, 2)}
            expected |= {f"{prefix}/gn{i}/{leaf}" for i in (1, 2) for leaf in ("scale", "bias")}
    assert main == expected
    assert _flat(shapes)["layer2/0/conv1/kernel"].shape == (3, 3, 16, 32)
    # 0.37 M parameters, the size that the paper's network is known by.
    assert sum(leaf.size for name, leaf in _flat(shapes).items() if name in main) == 366_938


@pytest.mark.parametrize("branch", [1, 2, 3])
def test_rotation_branch_is_a_copy_of_what_follows(branch, filled):
    module = ResNet(**SMALL, branch=branch)
    flat = _flat(module.finish_init(filled(module, (8, 8, 1))))
    copied = {name for name in flat if name.startswith("rotation_") and "rotation_fc" not in name}
    assert {name.split("/")[0] for name in copied} == {
        *(f"rotation_layer{i}" for i in range(branch + 1, 4)),
        "rotation_gn",
    }
    for name in copied:
        np.testing.assert_array_equal(flat[name], flat[name.removeprefix("rotation_")])
    assert flat["rotation_fc/kernel"].shape == (16, 4)


def test_init_creates_both_heads_and_copies_the_branch():
    module = ResNet(depth=8, width=2, groups=1, conv="lax")
    draw = jax.jit(lambda key: init(module, key, (4, 4, 1)))
    flat = _flat(jax.device_get(draw(jax.random.key(0))))
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("float32")}
    for name in ("layer3/0/conv1/kernel", "gn/scale"):
        np.testing.assert_array_equal(flat[name], flat[f"rotation_{name}"])
    assert flat["layer3/0/conv1/kernel"].any() and flat["rotation_fc/kernel"].any()


def test_heads_share_the_encoder_and_nothing_else(small):
    module, variables = small
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))

    @jax.jit
    def rotation_grad(variables):
        apply = from_linen(module, "rotation")
        return jax.grad(lambda v: jnp.sum(apply(v, images) ** 2))(variables)

    slopes = _flat(jax.device_get(rotation_grad(variables)))
    moved = {name.split("/")[0] for name, slope in slopes.items() if slope.any()}
    assert moved == {"conv1", "layer1", "layer2", "rotation_layer3", "rotation_gn", "rotation_fc"}


def test_first_block_by_hand(small):
    # The strided shortcut: the 2x2 mean of the block's input, zeros for the new channels.
    module, variables = small
    params = jax.tree.map(jnp.zeros_like, variables["params"])
    params["conv1"] = variables["params"]["conv1"]
    params["gn"] = {"scale": jnp.ones(16), "bias": jnp.arange(16.0)}
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    features = jax.jit(lambda p: module.apply({"params": p}, images, method="features"))(params)

    stem = jax.lax.conv_general_dilated(
        images,
        params["conv1"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    pooled = np.asarray(stem).reshape(2, 2, 4, 2, 4, 4).mean(axis=(2, 4))
    x = np.concatenate([pooled, np.zeros((2, 2, 2, 12))], axis=-1)
    group = x.reshape(2, 4, 2, 8)
    mean, var = group.mean(axis=(1, 3), keepdims=True), group.var(axis=(1, 3), keepdims=True)
    normal = ((group - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) + np.arange(16.0)
    np.testing.assert_allclose(features, np.maximum(normal, 0).mean(axis=(1, 2)), rtol=1e-4)


def test_bfloat16_compute_gives_float32_logits_and_parameters(small):
    _, variables = small
    module, plain = ResNet(**SMALL, dtype=jnp.bfloat16), ResNet(**SMALL | {"conv": "auto"})
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    heads = jax.eval_shape(lambda v: module.apply(v, images, method="all_heads"), variables)
    assert {out.dtype for out in heads} == {jnp.dtype("float32")}
    both = jax.jit(lambda v: [net.apply(v, images) for net in (module, plain)])
    logits, exact = jax.device_get(both(variables))
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_batch_norm_form_trains_and_goes_through_the_bridge(filled):
    module = ResNet(**SMALL, norm="batch")
    variables = filled(module, (8, 8, 1))
    assert {"bn", "rotation_bn"} <= set(variables["batch_stats"])
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))

    @jax.jit
    def both(variables):
        trained, updated = module.apply(variables, images, train=True, mutable=["batch_stats"])
        return trained, updated, from_linen(module, norm="batch")(variables, images)

    trained, updated, bridged = both(variables)
    np.testing.assert_allclose(trained, bridged, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(
        updated["batch_stats"]["bn"]["mean"], variables["batch_stats"]["bn"]["mean"]
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 8, 1), r"takes images \[N, H, W, C\].*images\[None\]"),
        ((2, 3, 8, 8, 1), r"takes images \[N, H, W, C\]"),
        ((2, 8, 8, 3), "was built for 1 channels"),
        ((2, 6, 8, 1), "multiples of 4"),
        ((2, 0, 8, 1), "multiples of 4"),
    ],
)
def test_wrong_images_are_refused(small, shape, message):
    module, variables = small
    for method in ("__call__", "rotation", "features"):
        with pytest.raises(ValueError, match=message):
            module.apply(variables, jnp.zeros(shape), method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 18}, r"6n \+ 2"),
        ({"norm": "grop"}, "did you mean 'group'"),
        ({"groups": 3}, "groups divides width"),
        ({"branch": 4}, "1, 2 or 3, received 4"),
        ({"projection": -1}, "received -1"),
        ({"conv": "im2col"}, "conv is one of"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**options)


def test_init_wants_one_image_shape():
    with pytest.raises(ValueError, match=r"\(H, W, C\) of one image"):
        init(ResNet(), jax.random.key(0), (1, 32, 32, 3))


def test_projection_head_adds_its_own_parameters_and_nothing_else(filled):
    plain, module = ResNet(**SMALL), ResNet(**SMALL, projection=5)
    shapes = [
        jax.eval_shape(lambda m=m: init(m, jax.random.key(0), (8, 8, 1))) for m in (plain, module)
    ]
    without, with_head = (_flat(tree) for tree in shapes)
    added = {name: leaf.shape for name, leaf in with_head.items() if name not in without}
    assert added == {
        "projection_hidden/kernel": (16, 16),
        "projection_hidden/bias": (16,),
        "projection_out/kernel": (16, 5),
        "projection_out/bias": (5,),
    }
    assert without.keys() == with_head.keys() - added.keys()
    variables = filled(module, (8, 8, 1))
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    features, found = jax.device_get(
        jax.jit(
            lambda v: [module.apply(v, images, method=name) for name in ("features", "project")]
        )(variables)
    )
    flat = _flat(variables)
    hidden = features @ flat["projection_hidden/kernel"] + flat["projection_hidden/bias"]
    expected = np.maximum(hidden, 0) @ flat["projection_out/kernel"] + flat["projection_out/bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="projection >= 1, received projection=0"):
        plain.apply(variables, images, method="project")

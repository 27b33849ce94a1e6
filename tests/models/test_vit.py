"""The vision transformer: patches, masking, heads, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import ttt_jax as ttt
from ttt_jax.models import ViT, init, patchify, unpatchify
from ttt_jax.models.vit import sincos_positions

OPTIONS = {
    "image_size": 8,
    "patch": 2,
    "channels": 2,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "num_classes": 3,
    "decoder_width": 8,
    "decoder_depth": 1,
}


@pytest.fixture(scope="module")
def vit(filled):
    module = ViT(**OPTIONS)
    return module, filled(module, (8, 8, 2)), jax.random.normal(jax.random.key(1), (3, 8, 8, 2))


def test_patches_are_row_major_with_pixels_in_order_p_q_c():
    images = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], images[1, 2:4, 2:4, :].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 2, (4, 6)), images)


def test_heads_have_the_documented_shapes_and_names(vit):
    module, variables, images = vit
    names = set(traverse_util.flatten_dict(variables["params"], sep="/"))
    assert {name.split("/")[0] for name in names} == {"encoder", "decoder", "head", "rotation_head"}
    shapes = {
        method: jax.eval_shape(lambda v, m=method: module.apply(v, images, method=m), variables)
        for method in ("__call__", "rotation", "features", "all_heads")
    }
    assert shapes["__call__"].shape == (3, 3)
    assert shapes["rotation"].shape == (3, 4)
    assert shapes["features"].shape == (3, 16)
    assert [out.shape for out in shapes["all_heads"]] == [(3, 3), (3, 4), (3, 16, 8)]


def test_reconstruction_never_sees_hidden_patches(vit):
    module, variables, images = vit
    keep = jnp.array([[0, 5], [1, 2], [14, 15]])
    visible = (np.arange(16) == np.asarray(keep)[..., None]).any(axis=1)
    other = np.where(visible[..., None], patchify(images, 2), np.float32(7))
    swapped = unpatchify(other, 2, (8, 8))
    run = jax.jit(lambda images: module.apply(variables, images, keep, method="reconstruct"))
    np.testing.assert_array_equal(run(images), run(swapped))
    assert not np.array_equal(run(images), run(images + 1.0))


def test_visible_patches_keep_their_places(vit):
    # The order of keep does not matter, since positions travel with the patches.
    module, variables, images = vit
    run = jax.jit(lambda keep: module.apply(variables, images, keep, method="reconstruct"))
    one = run(jnp.array([[0, 5, 9]] * 3))
    ttt.audit.require_close(run(jnp.array([[9, 0, 5]] * 3)), one, num_steps=0)
    assert not np.allclose(one, run(jnp.array([[0, 5, 10]] * 3)), atol=1e-3)


def test_encoder_computes_visible_patches_only(vit):
    module, variables, images = vit
    text = (
        jax.jit(lambda v, x, k: module.apply(v, x, k, method="reconstruct"))
        .lower(variables, images, jnp.zeros((3, 5), jnp.int32))
        .as_text()
    )
    # The encoder's MLP is 64 wide: five tokens of it exist, never sixteen.
    assert "tensor<3x5x64xf32>" in text
    assert "tensor<3x16x64xf32>" not in text


def test_positions_tell_rows_from_columns():
    table = sincos_positions(2, 3, 8)
    assert table.shape == (6, 8)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[0], [0, 0, 1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(table[4, :2], np.sin([1, 0.01]), rtol=1e-6)
    assert len(np.unique(table, axis=0)) == 6


def test_bfloat16_compute_gives_float32_outputs(vit):
    _, variables, images = vit
    module = ViT(**OPTIONS, dtype=jnp.bfloat16)
    heads = jax.eval_shape(lambda v: module.apply(v, images, method="all_heads"), variables)
    assert {out.dtype for out in heads} == {jnp.dtype("float32")}
    both = jax.jit(lambda v: [net.apply(v, images) for net in (module, ViT(**OPTIONS))])
    narrow, exact = jax.device_get(both(variables))
    assert 0 < np.abs(narrow - exact).max() < 0.05 * np.abs(exact).max()


def test_init_creates_every_head():
    module = ViT(**{**OPTIONS, "width": 8, "decoder_width": 4})
    variables = jax.jit(lambda key: init(module, key, (8, 8, 2)))(jax.random.key(0))
    flat = traverse_util.flatten_dict(jax.device_get(variables["params"]), sep="/")
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("float32")}
    limit = np.sqrt(6 / (8 + 8))
    embed = np.abs(flat["encoder/patch_embed/kernel"])
    assert 0.8 * limit < embed.max() <= limit
    assert flat["decoder/mask_token"].any() and not flat["head/bias"].any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 8, 2), r"takes images \[N, H, W, C\]"),
        ((3, 8, 8, 3), "was built for 2 channels"),
        ((3, 12, 12, 2), "was built for 8x8 images"),
    ],
)
def test_wrong_images_are_refused(vit, shape, message):
    module, variables, _ = vit
    with pytest.raises(ValueError, match=message):
        module.apply(variables, jnp.zeros(shape))


@pytest.mark.parametrize(
    "keep",
    [jnp.zeros((3,), int), jnp.zeros((2, 4), int), jnp.zeros((3, 17), int), jnp.zeros((3, 4))],
)
def test_wrong_keep_is_refused(vit, keep):
    module, variables, images = vit
    with pytest.raises(ValueError, match=r"keep holds integer patch indices \[N, K\] with N=3"):
        module.apply(variables, images, keep, method="reconstruct")


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="patch divides both sides"):
        ViT(image_size=8, patch=3)
    with pytest.raises(ValueError, match="decoder_width is a multiple of 4"):
        ViT(decoder_width=10)
    with pytest.raises(ValueError, match="width is a multiple of 4"):
        ViT(width=190)
    with pytest.raises(ValueError, match="patch divides both sides"):
        patchify(jnp.zeros((1, 8, 8, 1)), 3)
    with pytest.raises(ValueError, match="head_depth is at least 0, received -1"):
        ViT(head_depth=-1)
    with pytest.raises(ValueError, match="received 'flash': choose one"):
        ViT(attention="flash")
    with pytest.raises(ValueError, match="unpatchify takes patches"):
        unpatchify(jnp.zeros((1, 16, 4)), 2, (6, 8))


def layer_norm(x, leaves):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * leaves["scale"] + leaves["bias"]


def project(x, leaves):
    flat = leaves["kernel"].reshape(x.shape[-1], -1)
    return x @ flat + leaves["bias"].ravel()


def block_by_hand(x, block):
    n, tokens, width = x.shape
    y = layer_norm(x, block["norm1"])
    query, key, value = (
        project(y, block["attention"][name]).reshape(n, tokens, 2, width // 2)
        for name in ("query", "key", "value")
    )
    weights = np.exp(np.einsum("nqhd,nkhd->nhqk", query, key) / np.sqrt(width // 2))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("nhqk,nkhd->nqhd", weights, value).reshape(x.shape)
    x = x + project(mixed, block["attention"]["out"])
    y = project(layer_norm(x, block["norm2"]), block["up"])
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return x + project(y, block["down"])


def tokens_by_hand(images, encoder):
    x = project(np.asarray(patchify(images, 2), np.float64), encoder["patch_embed"])
    x = block_by_hand(x + sincos_positions(4, 4, 16), encoder["block_0"])
    return layer_norm(x, encoder["norm"])


def exactly(variables):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])


@pytest.mark.parametrize("attention", ["xla", "fused"])
def test_features_by_an_independent_forward_pass(vit, attention):
    _, variables, images = vit
    module = ViT(**OPTIONS, attention=attention)  # the fused form needs a GPU and 16 bits
    found = jax.jit(lambda v: module.apply(v, images, method="features"))(variables)
    wanted = tokens_by_hand(images, exactly(variables)["encoder"]).mean(1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_deeper_head_by_an_independent_forward_pass(filled):
    module = ViT(**OPTIONS, head_depth=2)
    variables, images = (
        filled(module, (8, 8, 2)),
        jax.random.normal(jax.random.key(1), (3, 8, 8, 2)),
    )
    params = exactly(variables)
    assert set(params) == {"encoder", "decoder", "head", "head_blocks", "rotation_head"}
    x = encoded = tokens_by_hand(images, params["encoder"])
    for index in range(2):
        x = block_by_hand(x, params["head_blocks"][f"block_{index}"])
    x = layer_norm(x, params["head_blocks"]["norm"]).mean(1)
    logits, features = jax.jit(
        lambda v: (module.apply(v, images), module.apply(v, images, method="features"))
    )(variables)
    np.testing.assert_allclose(logits, project(x, params["head"]), rtol=1e-4, atol=1e-4)
    # The other heads see what the encoder gives.
    np.testing.assert_allclose(features, encoded.mean(1), rtol=1e-4, atol=1e-4)


def test_bfloat16_products_take_bfloat16_operands(vit):
    _, variables, images = vit
    module = ViT(**OPTIONS, dtype=jnp.bfloat16)
    gradient = jax.grad(lambda v: module.apply(v, images, method="features").sum())
    text = jax.jit(gradient).lower(variables).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    # Forward: the embedding, 4 of attention and 2 inside it, 2 of the MLP; twice that backward,
    # but for the gradient of the images.
    assert len(products) == 9 + 2 * 9 - 1
    assert all(line.rpartition(" : ")[2].count("bf16") == 3 for line in products)

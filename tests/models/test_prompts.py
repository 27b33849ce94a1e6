"""Prompt tokens of the vision transformer, against a transformer written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import ttt_jax as ttt
from ttt_jax.models import ViT, from_linen, patchify, unpatchify
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
IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
PROMPT = ttt.select.paths(r".*prompt")


@pytest.fixture(scope="module")
def prompted(filled):
    module = ViT(**OPTIONS, num_prompts=3)
    return module, filled(module, (8, 8, 2)), jax.random.normal(jax.random.key(1), (3, 8, 8, 2))


def normed(x, leaf):
    """LayerNorm."""
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * leaf["scale"] + leaf["bias"]


def dense(x, leaf):
    return x @ leaf["kernel"] + leaf["bias"]


def attended(x, leaf):
    """Attention of one sequence ``[T, D]``, head by head."""
    total = np.zeros_like(x) + leaf["out"]["bias"]
    for head in range(leaf["query"]["kernel"].shape[1]):
        query, key, value = (
            x @ leaf[name]["kernel"][:, head] + leaf[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        scores = query @ key.T / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        total = total + weights @ value @ leaf["out"]["kernel"][head]
    return total


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mixed(x, block):
    x = x + attended(normed(x, block["norm1"]), block["attention"])
    return x + dense(gelu(dense(normed(x, block["norm2"]), block["up"])), block["down"])


def encoded(encoder, patches, places):
    """Tokens of some of one image's patches ``[K, 8]``: a sequence of prompts, then patches."""
    tokens = dense(patches, encoder["patch_embed"]) + sincos_positions(4, 4, 16)[places]
    x = mixed(np.concatenate([encoder["prompt"], tokens]), encoder["block_0"])
    return normed(x, encoder["norm"])[3:]


def classified(params, patches):
    """Logits of one image's patches ``[16, 8]``."""
    return dense(encoded(params["encoder"], patches, np.arange(16)).mean(0), params["head"])


def reconstruction(params, patches, keep):
    """Mean squared error at the hidden patches, each with mean 0 and variance 1 over n - 1."""
    decoder = params["decoder"]
    x = np.tile(decoder["mask_token"], (16, 1))
    x[keep] = dense(encoded(params["encoder"], patches[keep], keep), decoder["embed"])
    x = mixed(x + sincos_positions(4, 4, 8), decoder["block_0"])
    output = dense(normed(x, decoder["norm"]), decoder["pixels"])
    target = patches - patches.mean(axis=1, keepdims=True)
    target /= np.sqrt(patches.var(axis=1, ddof=1, keepdims=True) + 1e-6)
    return np.square(np.delete(output - target, keep, axis=0)).mean()


def exactly(variables):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])


def test_classification_by_hand(prompted):
    module, variables, images = prompted
    found = jax.jit(module.apply)(variables, images)
    patches = np.asarray(patchify(images, 2), np.float64)
    expected = [classified(exactly(variables), one) for one in patches]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_without_prompts_nothing_changes():
    """Names and initial values of the other parameters do not depend on the prompts."""
    modules = [ViT(**OPTIONS, num_prompts=count) for count in (0, 3)]

    @jax.jit
    def draw(key):
        return [module.lazy_init(key, IMAGE, method="features") for module in modules]

    plain, three = (
        traverse_util.flatten_dict(variables["params"], sep="/")
        for variables in jax.device_get(draw(jax.random.key(0)))
    )
    assert set(plain) == set(three) - {"encoder/prompt"}
    assert all(np.array_equal(plain[name], three[name]) for name in plain)
    prompt = three["encoder/prompt"]
    limit = np.sqrt(6 / (2 * 2 * 2 + 16))
    assert prompt.shape == (3, 16) and prompt.dtype == jnp.float32
    assert 0.8 * limit < np.abs(prompt).max() <= limit


def test_reconstruction_keeps_patch_indices(prompted):
    """``keep`` counts patches: hidden ones stay unseen, their order does not matter."""
    module, variables, images = prompted
    run = jax.jit(lambda v, x, keep: module.apply(v, x, keep, method="reconstruct"))
    keep = jnp.array([[0, 5, 15]] * 3)
    found = np.asarray(run(variables, images, keep))
    assert found.shape == (3, 16, 8)
    visible = np.isin(np.arange(16), keep[0])
    patches = np.where(visible[None, :, None], patchify(images, 2), np.float32(7))
    swapped = unpatchify(patches, 2, (8, 8))
    np.testing.assert_array_equal(found, run(variables, swapped, keep))
    np.testing.assert_allclose(found, run(variables, images, keep[:, ::-1]), rtol=1e-4, atol=1e-5)
    # The prompts are read, at every place of the output.
    moved = jax.tree.map(np.array, variables)
    moved["params"]["encoder"]["prompt"] *= -1
    assert (np.abs(found - run(moved, images, keep)).max(axis=(0, 2)) > 1e-4).all()


def test_only_the_prompts_adapt(prompted):
    """A masked-reconstruction step and its prediction, by central differences of the loss."""
    module, variables, images = prompted
    described = ttt.select.describe(PROMPT, variables)
    assert described.paths == ("params/encoder/prompt",) and described.num_elements == 3 * 16
    reconstruct, classify = from_linen(module, "reconstruct"), from_linen(module)
    seen = []

    def recorded(params, images, keep):
        seen.append(keep)
        return reconstruct(params, images, keep)

    loss = ttt.losses.masked_reconstruction(recorded, patch=2)
    adapter = ttt.gradient_adapter(loss, optax.sgd(0.5), select=PROMPT)

    def step(variables, image):
        state, info = adapter.step(variables, adapter.init(variables), image, jax.random.key(3))
        adapted = adapter.merge(variables, state)
        return adapted, info, classify(adapted, image[None])[0], seen[0]

    adapted, info, logits, keep = jax.jit(step)(variables, images[0])
    params, patches = exactly(variables), np.asarray(patchify(images[:1], 2)[0], np.float64)
    (keep,) = np.asarray(keep)
    assert len(keep) == 4
    prompt, gradient = params["encoder"]["prompt"], np.zeros((3, 16))

    def value(prompt):
        return reconstruction(
            {**params, "encoder": params["encoder"] | {"prompt": prompt}}, patches, keep
        )

    for place in np.ndindex(gradient.shape):
        nudge = np.zeros((3, 16))
        nudge[place] = 1e-5
        gradient[place] = (value(prompt + nudge) - value(prompt - nudge)) / 2e-5
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(info.loss, value(prompt))
    close(info.grad_norm, np.linalg.norm(gradient))
    assert np.abs(gradient).max() > 1e-2
    params["encoder"]["prompt"] = prompt - 0.5 * gradient
    jax.tree.map(close, adapted["params"], params)
    close(logits, classified(params, patches))


def test_weights_stay_shared(filled):
    """Sizes that no activation has, so that a copy of a matrix could be told."""
    sizes = {"image_size": 6, "channels": 3, "width": 20, "num_classes": 13}
    module = ViT(**OPTIONS | sizes, num_prompts=2)
    apply = from_linen(module)
    adapter = ttt.gradient_adapter(ttt.losses.entropy(apply), optax.sgd(0.5), select=PROMPT)
    predict = ttt.episodic(adapter, ttt.unbatched(apply), num_steps=2)
    variables = filled(module, (6, 6, 3))
    images = jax.random.normal(jax.random.key(1), (7, 6, 6, 3))
    keys = ttt.sample_keys(jax.random.key(0), np.arange(7))
    assert ttt.audit.copied_frozen(predict, PROMPT, variables, images, keys) == []


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="num_prompts is at least 0, received -1"):
        ViT(**OPTIONS, num_prompts=-1)

"""AugMix against Pillow, operation by operation and as a whole."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from ttt_jax.views import augmix

LEVELS = (0.1, 0.55, 0.99, 2.9, 5.3, 9.9)
# All levels of an operation, both ways, in one call.
apply_operation = jax.jit(jax.vmap(augmix.apply_operation, (None, None, 0, 0)))
view_of = jax.jit(augmix.augmix)
views_of = jax.jit(jax.vmap(augmix.augmix, (None, 0)))
draws_of = jax.jit(jax.vmap(augmix.draw_steps))
BILINEAR, AFFINE = Image.Resampling.BILINEAR, Image.Transform.AFFINE


def pillow(image, name, level, negative):
    """The public operations at a level that was drawn, written for any size."""
    (width, height), sign = image.size, -1 if negative else 1
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    if name == "posterize":
        return ImageOps.posterize(image, 4 - int(level * 4 / 10))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - int(level * 256 / 10))
    if name == "rotate":
        return image.rotate(sign * int(level * 30 / 10), resample=BILINEAR, fillcolor=128)
    matrix = {
        "shear_x": (1, sign * level * 0.3 / 10, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * level * 0.3 / 10, 1, 0),
        "translate_x": (1, 0, sign * int(level * width / 3 / 10), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * int(level * height / 3 / 10)),
    }[name]
    return image.transform(image.size, AFFINE, matrix, resample=BILINEAR, fillcolor=128)


def through_pillow(pixels, *what):
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return np.asarray(pillow(image, *what)).reshape(pixels.shape)


def images():
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(32), np.arange(32))
    # One value; 300 pixels below it, so that Pillow's table of equalize passes 255; two values.
    odd = np.full((32, 32, 3), 77, np.uint8)
    odd[..., 1].flat[:300] = np.arange(300) % 70
    odd[..., 2] = np.where(rng.random((32, 32)) < 0.5, 13, 14)
    return {
        "noise": rng.integers(0, 256, (32, 32, 3), np.uint8),
        "smooth": np.stack([ramp * 4, 90 + ramp, 200 - ramp // 2], axis=-1).astype(np.uint8),
        "odd": odd,
        "gray": rng.integers(40, 90, (8, 8, 1), np.uint8),
        "wide": rng.integers(0, 200, (20, 28, 3), np.uint8),
    }


@pytest.mark.parametrize("name", augmix.OPERATIONS)
def test_an_operation_is_pillows(name):
    operation, changed, off = augmix.OPERATIONS.index(name), 0, []
    cases = list(itertools.product(LEVELS, (False, True)))
    levels, negatives = map(np.array, zip(*cases, strict=True))
    for pixels in images().values():
        ours = apply_operation(pixels, operation, levels.astype(np.float32), negatives)
        for found, case in zip(np.asarray(ours).astype(int), cases, strict=True):
            theirs = through_pillow(pixels, name, *case).astype(int)
            off.append(np.abs(found - theirs).ravel())
            changed += (theirs != pixels).any()
    off = np.concatenate(off)
    # Pillow cuts off fractions in double precision, also of what would be whole without rounding:
    # there one value more or less. What is whole throughout is equal.
    rounded = name in ("autocontrast", "rotate", "shear_x", "shear_y")
    assert off.max() <= rounded and (off > 0).mean() < 1e-3
    assert changed


def test_shares_by_hand():
    image = jnp.array([[[0.2, 0.9]]])
    chains = jnp.array([[[[255, 0]]], [[[0, 51]]], [[[102, 204]]]], jnp.uint8)
    weights = jnp.array([0.5, 0.3, 0.2])
    # 0.5 + 0.2 * 0.4 = 0.58 and 0.3 * 0.2 + 0.2 * 0.8 = 0.22.
    for share, expected in ((0.0, [0.58, 0.22]), (0.75, [0.295, 0.73])):
        view = augmix.mix(image, chains, weights, share)
        np.testing.assert_allclose(view[0, 0], expected, rtol=1e-6)
        # The authors take the mean of normalized images.
        normal = [(part - 0.5) / 0.5 for part in (image, *(chains / 255))]
        shares = [share, *((1 - share) * weights)]
        mean = sum(a * part for a, part in zip(shares, normal, strict=True))
        np.testing.assert_allclose((view - 0.5) / 0.5, mean, rtol=1e-5)
    np.testing.assert_array_equal(augmix.mix(image, chains, weights, 1.0), image)


def test_a_view_is_the_mixture_of_its_chains_through_pillow():
    @jax.jit
    def drawn(key):
        draw_key, weight_key, share_key = jax.random.split(key, 3)
        weights = jax.random.exponential(weight_key, (3,))
        return augmix.draw_steps(draw_key), weights, jax.random.uniform(share_key)

    lengths, off, pictures = set(), [], images()
    for seed in range(20):
        pixels = pictures["noise" if seed % 2 else "smooth"][:16, :16]
        key = jax.random.key(seed)
        (draw, weights, share), mean = jax.device_get(drawn(key)), 0
        for i in range(3):
            chain = pixels
            for j in range(draw.used[i].sum()):
                name = augmix.OPERATIONS[draw.operation[i, j]]
                level, negative = float(draw.level[i, j]), draw.negative[i, j]
                chain = through_pillow(chain, name, level, negative)
            lengths.add(int(draw.used[i].sum()))
            mean = mean + weights[i] / weights.sum() * chain
        expected = share * pixels + (1 - share) * mean
        off.append(np.abs(np.asarray(view_of(pixels / np.float32(255), key)) * 255 - expected))
    assert lengths == {1, 2, 3}
    # One value more or less may cross a threshold of a later step.
    assert (np.stack(off) > 0.01).mean() < 1e-3


def test_draws_are_those_published():
    draw = jax.device_get(draws_of(jax.random.split(jax.random.key(0), 3000)))
    assert draw.used[..., 0].all() and not (draw.used[..., 2] & ~draw.used[..., 1]).any()
    # Of 9000 chains a third has each length; of 27000 steps a ninth each operation.
    counts = np.bincount(draw.used.sum(axis=-1).ravel(), minlength=4)
    assert counts[0] == 0 and np.abs(counts[1:] - 3000).max() < 200
    counts = np.bincount(draw.operation.ravel(), minlength=9)
    assert len(counts) == 9 and np.abs(counts - 3000).max() < 260
    assert 0.1 <= draw.level.min() < 0.101 and 0.999 < draw.level.max() <= 1
    assert abs(draw.level.mean() - 0.55) < 0.01 and abs(draw.negative.mean() - 0.5) < 0.02


@pytest.mark.parametrize("name", ["noise", "odd", "gray"])
def test_views_are_images_that_follow_their_keys(name):
    image = jnp.asarray(images()[name][:16, :16] / np.float32(255))
    keys = jax.random.split(jax.random.key(1), 32)
    if name == "gray":
        views = np.stack([view_of(image, key) for key in keys])
    else:
        views = np.asarray(views_of(image, keys))
        for view, key in zip(views[:8], keys, strict=False):
            np.testing.assert_allclose(view, view_of(image, key), atol=1e-6)
    assert views.shape == (32, *image.shape) and views.dtype == image.dtype
    assert views.min() >= 0 and views.max() <= 1 + 1e-6
    assert len(np.unique(views.round(5), axis=0)) > 30
    # Everything but equalize and autocontrast hardly changes it.
    assert 1e-3 < np.median(np.abs(views - np.asarray(image))) < 0.1


def test_images_are_rounded_to_whole_values():
    image = jnp.array([100.4, 100.6]) / 255
    np.testing.assert_array_equal(augmix.to_bytes(image), [100, 101])
    everything = jnp.arange(256).reshape(16, 16, 1)
    np.testing.assert_array_equal(augmix.to_bytes(everything / 255.0), everything)
    np.testing.assert_array_equal(augmix.to_bytes(jnp.array([-0.1, 1.2])), [0, 255])

"""Random views of one image, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from ttt_jax.views import image as views


def drawn(view, image, keys):
    """A view for each key, ``[N, H, W, C]``."""
    return np.asarray(quickly(jax.vmap(view, (None, 0)), image, keys))


def test_factors_by_hand():
    # Luma of red 1, green 0.5, blue 0: 0.299 + 0.2935 = 0.5925; of black: 0. Their mean: 0.29625.
    image = jnp.array([[[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]])
    contrast = views.adjust_color(image, jnp.array([1.0, 0.5, 1.0]))
    np.testing.assert_allclose(contrast[0, 0], [0.648125, 0.398125, 0.148125], rtol=1e-5)
    np.testing.assert_allclose(contrast[0, 1], [0.148125] * 3, rtol=1e-5)
    saturation = views.adjust_color(image, jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(saturation[0, 0], [0.5925] * 3, rtol=1e-5)
    brightness = views.adjust_color(image, jnp.array([1.6, 1.0, 1.0]))
    np.testing.assert_allclose(brightness[0, 0], [1.0, 0.8, 0.0], rtol=1e-5, atol=1e-6)


def test_a_crop_is_the_part_stretched():
    image = jnp.arange(16.0).reshape(4, 4, 1) / 16
    stretch = jax.jit(views.stretch)
    whole = stretch(image, jnp.zeros(2), jnp.ones(2))
    np.testing.assert_allclose(whole, image, atol=1e-6)
    # The lower half of the rows at their places 1.75, 2.25, 2.75, 3.25: the last is clamped.
    part = stretch(image, jnp.array([0.5, 0.0]), jnp.array([0.5, 1.0]))
    rows = np.interp([1.75, 2.25, 2.75, 3.25], np.arange(4), np.arange(0.0, 16.0, 4.0))
    expected = (rows[:, None] + np.arange(4.0)[None]) / 16
    np.testing.assert_allclose(part[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_images_that_differ(channels):
    image = jax.random.uniform(jax.random.key(0), (8, 8, channels))
    made = drawn(views.simclr(), image, jax.random.split(jax.random.key(1), 200))
    assert made.shape == (200, 8, 8, channels)
    assert made.min() >= 0 and made.max() <= 1 + 1e-6
    assert len(np.unique(made.round(5), axis=0)) == 200
    if channels == 3:
        gray = (np.ptp(made, axis=-1) < 1e-6).all((1, 2))
        # 40 expected, standard deviation 5.7.
        assert 18 <= gray.sum() <= 62


def test_crops_have_the_share_that_was_asked_for():
    ramp = jnp.linspace(0.0, 1.0, 16)
    image = jnp.stack(jnp.broadcast_arrays(ramp[:, None], ramp[None, :]), axis=-1)
    keys = jax.random.split(jax.random.key(0), 300)
    crops = drawn(views.resized_crop(0.2), image, keys)
    # On a ramp the range of a channel is the share of that side.
    shares = np.ptp(crops, axis=(1, 2)) * 15 / 16
    assert (shares.prod(1) > 0.1).all() and shares.prod(1).min() < 0.35
    assert shares.prod(1).max() > 0.8


def test_padding_repeats_the_edge_or_is_black():
    image = jnp.array([[0.2, 0.4], [0.6, 0.8]])[..., None]
    edge, black = (
        np.asarray(views.every_view(1, False, mode)(image)) for mode in ("edge", "constant")
    )
    # Of the nine shifts the first is up and to the left, the middle one none.
    np.testing.assert_allclose(edge[0, ..., 0], [[0.2, 0.2], [0.2, 0.2]])
    np.testing.assert_allclose(black[0, ..., 0], [[0.0, 0.0], [0.0, 0.2]])
    np.testing.assert_array_equal(edge[4], image)
    np.testing.assert_array_equal(black[4], image)


@pytest.mark.parametrize("pad_mode", ["edge", "constant"])
def test_a_shift_draws_every_view(pad_mode):
    image = jax.random.uniform(jax.random.key(0), (3, 3, 1))
    keys = jax.random.split(jax.random.key(1), 200)
    shifted = drawn(views.shift(1, pad_mode), image, keys)
    every = np.asarray(views.every_view(1, False, pad_mode)(image))
    shifted, every = ({bytes(view) for view in images} for images in (shifted, every))
    assert shifted == every and len(every) == 9


def test_the_published_crop_and_flip_is_padded_with_black():
    image = jnp.arange(1.0, 10.0).reshape(3, 3, 1)
    keys = jax.random.split(jax.random.key(2), 400)
    shifted = drawn(views.crop_flip(1), image, keys)
    every = np.asarray(views.every_view(1, True, "constant")(image))
    shifted, every = ({bytes(view) for view in images} for images in (shifted, every))
    assert shifted == every and len(every) == 18


@pytest.mark.parametrize("make", [views.shift, views.crop_flip])
def test_bad_padding_is_refused_in_a_sentence(make):
    with pytest.raises(ValueError, match=r"pad_mode must be one of .*edge.*; got 'black'"):
        make(1, "black")
    with pytest.raises(ValueError, match=r"padding must be an integer of at least 0, got -1"):
        make(-1)

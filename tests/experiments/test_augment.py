"""The views of contrastive training, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import augment, problem
from tests.experiments import tiny_config


def test_factors_by_hand():
    # Luma of red 1, green 0.5, blue 0: 0.299 + 0.2935 = 0.5925; of black: 0. Their mean: 0.29625.
    image = jnp.array([[[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]])
    contrast = augment.adjusted(image, jnp.array([1.0, 0.5, 1.0]))
    np.testing.assert_allclose(contrast[0, 0], [0.648125, 0.398125, 0.148125], rtol=1e-5)
    np.testing.assert_allclose(contrast[0, 1], [0.148125] * 3, rtol=1e-5)
    saturation = augment.adjusted(image, jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(saturation[0, 0], [0.5925] * 3, rtol=1e-5)
    brightness = augment.adjusted(image, jnp.array([1.6, 1.0, 1.0]))
    np.testing.assert_allclose(brightness[0, 0], [1.0, 0.8, 0.0], rtol=1e-5, atol=1e-6)


def test_a_crop_is_the_part_stretched():
    image = jnp.arange(16.0).reshape(4, 4, 1) / 16
    whole = augment.stretched(image, jnp.zeros(2), jnp.ones(2))
    np.testing.assert_allclose(whole, image, atol=1e-6)
    # The lower half of the rows at their places 1.75, 2.25, 2.75, 3.25: the last is clamped.
    part = augment.stretched(image, jnp.array([0.5, 0.0]), jnp.array([0.5, 1.0]))
    rows = np.interp([1.75, 2.25, 2.75, 3.25], np.arange(4), np.arange(0.0, 16.0, 4.0))
    expected = (rows[:, None] + np.arange(4.0)[None]) / 16
    np.testing.assert_allclose(part[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_images_that_differ(channels):
    image = jax.random.uniform(jax.random.key(0), (8, 8, channels))
    views = jax.vmap(augment.simclr(), (None, 0))(image, jax.random.split(jax.random.key(1), 200))
    assert views.shape == (200, 8, 8, channels)
    assert views.min() >= 0 and views.max() <= 1 + 1e-6
    assert len(np.unique(np.asarray(views).round(5), axis=0)) == 200
    if channels == 3:
        gray = (np.ptp(np.asarray(views), axis=-1) < 1e-6).all((1, 2))
        # 40 expected, standard deviation 5.7.
        assert 18 <= gray.sum() <= 62


def test_crops_have_the_share_that_was_asked_for():
    ramp = jnp.linspace(0.0, 1.0, 16)
    image = jnp.stack(jnp.broadcast_arrays(ramp[:, None], ramp[None, :]), axis=-1)
    keys = jax.random.split(jax.random.key(0), 300)
    views = np.asarray(jax.vmap(augment.resized_crop(0.2), (None, 0))(image, keys))
    # On a ramp the range of a channel is the share of that side.
    shares = np.ptp(views, axis=(1, 2)) * 15 / 16
    assert (shares.prod(1) > 0.1).all() and shares.prod(1).min() < 0.35
    assert shares.prod(1).max() > 0.8


def test_the_rim_repeats_the_edge_or_is_black():
    image = jnp.array([[0.2, 0.4], [0.6, 0.8]])[..., None]
    edge, black = (
        np.asarray(augment.every_view(1, False, rim)(image)) for rim in ("edge", "black")
    )
    # Of the nine shifts the first is up and to the left, the middle one none.
    np.testing.assert_allclose(edge[0, ..., 0], [[0.2, 0.2], [0.2, 0.2]])
    np.testing.assert_allclose(black[0, ..., 0], [[0.0, 0.0], [0.0, 0.2]])
    np.testing.assert_array_equal(edge[4], image)
    np.testing.assert_array_equal(black[4], image)


@pytest.mark.parametrize("rim", ["edge", "black"])
def test_a_shift_draws_every_view(rim):
    image = jax.random.uniform(jax.random.key(0), (3, 3, 1))
    keys = jax.random.split(jax.random.key(1), 200)
    drawn = jax.vmap(augment.shift(1, rim), (None, 0))(image, keys)
    drawn, every = (
        {bytes(view) for view in np.asarray(views)}
        for views in (drawn, augment.every_view(1, False, rim)(image))
    )
    assert drawn == every and len(every) == 9


def test_another_rim_is_named():
    config = tiny_config.get_config()
    config.views.rim = "white"
    with pytest.raises(ValueError, match=r"rim of views must be one of .*edge.*got 'white'"):
        problem.build(config, problem.load_data(config, "test"))


def test_views_of_a_config_have_its_rim():
    config = tiny_config.get_config()
    config.views.rim = "black"
    made = problem.build(config, problem.load_data(config, "test"))
    white = jnp.ones(made.image_shape)
    corner = made.every_view(white)[0]
    assert corner[0].max() == 0 and corner[1:, 1:].min() == 1
    drawn = jax.vmap(made.view, (None, 0))(white, jax.random.split(jax.random.key(0), 50))
    assert drawn.min() == 0

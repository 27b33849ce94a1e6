"""The option ``views.rim``: what lies beyond an image that is shifted."""

import jax
import jax.numpy as jnp
import pytest

from experiments import problem
from tests.experiments import tiny_config


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

"""Parameters without compiling an initialization: real shapes, NumPy's random values."""

import jax
import numpy as np
import pytest

from ttt_jax.models import init


def _filled(module, image_shape, seed=0):
    shapes = jax.eval_shape(lambda key: init(module, key, image_shape), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype)
        # Scales and running variances are positive in any trained network.
        return 1 + np.abs(values) if path[-1].key in ("scale", "var") else values

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def filled():
    """``filled(module, image_shape) -> variables``."""
    return _filled

"""Every default of the methods over batches is its published setting."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core import golden, models
from ttt_jax import AdapterState, Info, methods, resets, select

AFFINE, ALL = select.norm_affine(), select.everything()
NEVER = ("never",)
SGD = {"rate": 2.5e-4, "momentum": 0.9}  # of EATA and its kin, for batches of 64 images

# Optimizers as the NumPy rules of ``golden``, resets by what they do. Sources: the papers and the
# authors' code, named in each docstring.
PUBLISHED = {
    "tent": {"optimizer": golden.Adam(1e-3), "select": AFFINE, "predict": "before"},
    "pseudo_label": {
        "threshold": 0.0,
        "optimizer": golden.Adam(1e-3),
        "select": AFFINE,
        "predict": "before",
    },
    "rpl": {"q": 0.8, "optimizer": golden.SGD(0.75e-3), "select": AFFINE, "predict": "before"},
    "eata": {
        "epsilon": 0.05,
        "fisher_weight": 2000.0,
        "margin": 0.4,
        "optimizer": golden.SGD(**SGD),
        "select": AFFINE,
        "predict": "before",
    },
    "rdumb": {
        "epsilon": 0.05,
        # E0 is ln(1000) / 2 - 1 nats; here it is a share of ln C.
        "margin": (math.log(1000) / 2 - 1) / math.log(1000),
        "optimizer": golden.SGD(**SGD),
        "select": AFFINE,
        "reset": ("every", 1000),
        "predict": "before",
    },
    "sar": {
        "margin": 0.4,
        "rho": 0.05,
        "reset_below": 0.2,
        "optimizer": golden.SGD(**SGD),
        "select": AFFINE,
        "predict": "before",
    },
    "deyo": {
        "patches": 4,
        "threshold": 0.2,
        "entropy_margin": 0.5,
        "margin": 0.4,
        "optimizer": golden.SGD(**SGD),
        "select": AFFINE,
        "predict": "before",
    },
    "actmad": {
        "augment": None,
        "num_views": 1,
        "optimizer": golden.SGD(1e-2, 0.9, nesterov=True, decay=5e-4),
        "select": ALL,
        "predict": "after",
    },
    "ttt_plus_plus": {
        "encoder_weight": 0.05,
        "head_weight": 0.2,
        "contrastive_weight": 0.5 / 0.07,
        "temperature": 0.5,
        "queue": 1280,
        "count": 1280 + 256,
        "optimizer": golden.SGD(0.01, 0.9),
        "select": ALL,
        "predict": "after",
    },
    "cotta": {
        "num_views": 32,
        "threshold": 0.92,
        "decay": 0.999,
        "optimizer": golden.Adam(1e-3),
        "select": ALL,
        "reset": ("restore", 0.01),
        "predict": "before",
    },
    "rotta": {
        "capacity": 64,
        "update_every": 64,
        "momentum": 0.05,
        "decay": 1 - 0.001,
        "timeliness": 1.0,
        "uncertainty": 1.0,
        "optimizer": golden.Adam(1e-3),
        "select": AFFINE,
        "predict": "before",
    },
    "note": {
        "capacity": 64,
        "update_every": 64,
        "momentum": 0.01,
        "optimizer": golden.Adam(1e-4),
        "select": AFFINE,
        "predict": "before",
    },
    "dua": {
        "num_views": 64,
        "momentum": 0.1,
        "decay": 0.94,
        "floor": 0.005,
        "predict": "after",
        "batch": False,
    },
    "t3a": {"num_supports": 100, "predict": "after"},
    "lame": {"num_neighbors": 5, "max_steps": 100},
}
COMMON = {"num_steps": 1, "reset": NEVER, "batch": True, "serve": None}


def same_optimizer(actual, published):
    """Three steps on two parameters."""
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    state, rng = actual.init(params), np.random.default_rng(0)
    for _ in range(3):
        gradient = {name: rng.normal(size=leaf.shape) for name, leaf in p.items()}
        slopes = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in gradient.items()}
        updates, state = actual.update(slopes, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        p = published.step(p, gradient)
    for name, leaf in p.items():
        np.testing.assert_allclose(params[name], leaf, rtol=1e-6)


def same_selection(actual, published):
    params = models.make_params()
    assert select.describe(actual, params).paths == select.describe(published, params).paths


def same_reset(actual, published):
    """When it fires in a stream, and how many elements it restores then."""

    def state(value):
        return AdapterState(jnp.full(10_000, value), (), (), jnp.zeros((), jnp.int32))

    info = Info(jnp.ones(1), jnp.ones(1), jnp.array(True), jnp.array(True))

    def step(carry, key):
        carry, new, fired = actual.apply(carry, state(1.0), state(0.0), None, info, key)
        return carry, (fired, (new.fast == 0).mean())

    keys = jax.random.split(jax.random.key(0), 1001)
    _, (fired, restored) = jax.jit(lambda: jax.lax.scan(step, actual.init(), keys))()
    kind, *numbers = published
    if kind == "restore":
        assert fired.all() and float(restored.mean()) == pytest.approx(numbers[0], rel=0.01)
        return
    times = [] if kind == "never" else list(range(numbers[0] - 1, 1001, numbers[0]))
    assert np.flatnonzero(fired).tolist() == times
    assert np.flatnonzero(restored == 1).tolist() == times


CHECKS = {"optimizer": same_optimizer, "select": same_selection, "reset": same_reset}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults(name):
    parameters = inspect.signature(getattr(methods, name)).parameters
    defaults = {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert set(PUBLISHED[name]) <= set(defaults) <= set(PUBLISHED[name]) | set(COMMON)
    for key, default in defaults.items():
        published = PUBLISHED[name].get(key, COMMON.get(key))
        if key in CHECKS:
            CHECKS[key](default, published)
        elif isinstance(published, float):
            assert default == pytest.approx(published)
        else:
            assert default is published or default == published, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_but_model_functions_is_keyword_only(name):
    parameters = inspect.signature(getattr(methods, name)).parameters.values()
    heads = {"classify", "classify_statistics", "features", "project", "activations", "statistics"}
    assert {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY} <= heads
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters)


@pytest.mark.parametrize(
    ("actual", "published", "check"),
    [
        (resets.every(999), ("every", 1000), same_reset),
        (resets.stochastic_restore(0.02), ("restore", 0.01), same_reset),
        (select.biases(), AFFINE, same_selection),
    ],
)
def test_the_checks_tell_settings_apart(actual, published, check):
    with pytest.raises(AssertionError):
        check(actual, published)

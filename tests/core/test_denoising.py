"""Denoising against errors computed in NumPy from the inputs that the model was given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import losses

from .compiling import quickly, recorded

KEY = jax.random.key(3)
IMAGE = np.random.default_rng(1).normal(size=(6, 6, 1)).astype(np.float32)
IMAGES = np.random.default_rng(2).normal(size=(3, 6, 6, 1)).astype(np.float32)


def scale(params, inputs):
    return inputs * params


def seen(x, **options):
    def build(record):
        def apply(params, inputs):
            record(inputs)
            return inputs * params

        return losses.denoising(apply, **options)

    value, (inputs,) = recorded(build, 0.7, x, KEY)
    return value, np.asarray(inputs)


def raises(*words):
    return pytest.raises(ValueError, match=r"(?s)" + ".*".join(words))


@pytest.mark.parametrize(
    ("x", "copies", "batch"),
    [(IMAGE, 1, False), (IMAGE, 4, False), (IMAGES, 1, True), (IMAGES, 2, True)],
)
def test_value(x, copies, batch):
    value, inputs = seen(x, noise=0.3, num_copies=copies, batch=batch)
    clean = np.repeat(x if batch else x[None], copies, axis=0)
    assert inputs.shape == clean.shape
    assert len(np.unique((inputs - clean).round(5))) > 0.9 * clean.size
    np.testing.assert_allclose(value, np.square(0.7 * inputs - clean).mean(), rtol=1e-5)


def test_noise_is_normal_with_this_deviation():
    _, inputs = seen(np.ones(5000, np.float32), noise=0.3)
    np.testing.assert_allclose(inputs.mean(), 1.0, atol=0.02)
    np.testing.assert_allclose(inputs.std(), 0.3, rtol=0.05)
    np.testing.assert_allclose(np.mean(np.abs(inputs - 1) < 0.3), 0.683, atol=0.03)


def test_by_hand():
    """A decoder of zeros pays the mean square of the instance; without noise, identity nothing."""
    x = np.array([1.0, 2.0, 3.0], np.float32)
    assert quickly(losses.denoising(scale, noise=0.5), 0.0, x, KEY) == pytest.approx(14 / 3)
    assert quickly(losses.denoising(scale, noise=0.0), 1.0, x, KEY) == 0


def test_gradient():
    """d/dp mean (p z - x)^2 = 2 mean z (p z - x)."""
    _, inputs = seen(IMAGE, noise=0.3)
    gradient = quickly(jax.grad(losses.denoising(scale, noise=0.3)), 0.7, IMAGE, KEY)
    expected = 2 * np.mean(inputs[0] * (0.7 * inputs[0] - IMAGE))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def test_noise_maps():
    def value(noise):
        return losses.denoising(scale, noise=noise)(1.0, IMAGE, KEY)

    none, some = quickly(jax.vmap(value), np.array([0.0, 1.0], np.float32))
    assert none == 0 and some > 0.1


def test_computed_in_float32():
    loss = losses.denoising(scale, noise=0.3)
    assert quickly(loss, jnp.bfloat16(1), IMAGE.astype(jnp.bfloat16), KEY).dtype == jnp.float32


def test_stochastic():
    def noisy(params, inputs, key):
        return params * jax.random.normal(key, inputs.shape)

    loss = losses.denoising(noisy, noise=0.0, stochastic=True)
    keys = jnp.stack([KEY, KEY, jax.random.key(4)])
    values = quickly(jax.vmap(loss, (None, None, 0)), 1.0, IMAGE, keys)
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("copies", [0, 2.0, True])
def test_number_of_copies(copies):
    with raises("num_copies", "at least 1", str(copies)):
        losses.denoising(scale, noise=0.1, num_copies=copies)


def test_noise_is_a_scalar():
    with raises("noise", "one standard deviation", r"\(3,\)", "Scale"):
        losses.denoising(scale, noise=np.ones(3))


def test_batch_of_images():
    with raises("denoising", "one instance", r"\(3, 6, 6, 1\)", "batch=True"):
        jax.eval_shape(losses.denoising(scale, noise=0.1), 1.0, IMAGES, KEY)


@pytest.mark.parametrize(("x", "kind"), [(np.ones(3, np.uint8), "uint8"), ({"a": IMAGE}, "dict")])
def test_floating_arrays_only(x, kind):
    with raises("floating", f"got {kind}", "Scale"):
        jax.eval_shape(losses.denoising(scale, noise=0.1), 1.0, x, KEY)


def test_shape_of_the_output():
    loss = losses.denoising(lambda params, inputs: inputs[..., 0], noise=0.1)
    with raises("denoising", r"\(1, 6, 6, 1\)", r"\(1, 6, 6\)"):
        jax.eval_shape(loss, 1.0, IMAGE, KEY)

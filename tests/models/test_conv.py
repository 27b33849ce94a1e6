"""Both forms of the 3x3 convolution agree, also with private kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels.conv.xla import _choose, conv3x3
from ttt_jax.models.conv import Conv3x3


def _data(channels=3, features=4, side=6, batch=2):
    images, kernels = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(images, (batch, side, side, channels)),
        jax.random.normal(kernels, (5, 3, 3, channels, features)),
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [6, 7])
def test_forms_agree_in_value_and_gradient_also_under_vmap(stride, side):
    images, kernels = _data(side=side)

    def loss(form):
        def one(images, kernel):
            out = conv3x3(images, kernel, stride=stride, form=form)
            return jnp.sum(jnp.sin(out)), out

        step = jax.value_and_grad(one, argnums=(0, 1), has_aux=True)
        return jax.jit(jax.vmap(step, in_axes=(None, 0)))(images, kernels)

    (_, out), grads = loss("patches")
    (_, out_lax), grads_lax = loss("lax")
    assert out.shape == (5, 2, -(-side // stride), -(-side // stride), 4)
    np.testing.assert_allclose(out, out_lax, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads, grads_lax, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_patches_compile_to_no_convolution():
    images, kernels = _data()

    def text(form):
        fn = jax.vmap(lambda kernel: conv3x3(images, kernel, form=form))
        return jax.jit(fn).lower(kernels).as_text()

    assert "stablehlo.convolution" in text("lax")
    assert "stablehlo.convolution" not in text("patches")


@pytest.mark.parametrize(
    ("backend", "dtype", "form"),
    [
        ("cpu", jnp.float32, "patches"),
        ("cpu", jnp.bfloat16, "patches"),
        ("gpu", jnp.float32, "patches"),
        ("gpu", jnp.bfloat16, "lax"),
        ("tpu", jnp.float32, "lax"),
        ("tpu", jnp.bfloat16, "lax"),
    ],
)
def test_auto_follows_the_measurements(backend, dtype, form):
    assert _choose(backend, jnp.zeros((), dtype).dtype) == form


def test_bfloat16_compute_keeps_a_float32_kernel():
    images, _ = _data()
    conv = Conv3x3(4, dtype=jnp.bfloat16)
    variables = conv.init(jax.random.key(1), images)
    assert variables["params"]["kernel"].dtype == jnp.float32
    assert conv.apply(variables, images).dtype == jnp.bfloat16


def test_kernel_starts_he_normal_over_fan_out():
    kernel = Conv3x3(64).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))["params"]["kernel"]
    np.testing.assert_allclose(jnp.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.03)


def test_bad_arguments_are_named():
    images, kernels = _data()
    with pytest.raises(ValueError, match=r"'patches'.*received 'patch'"):
        conv3x3(images, kernels[0], form="patch")
    with pytest.raises(ValueError, match="stride 1 or 2, received 3"):
        conv3x3(images, kernels[0], stride=3)
    with pytest.raises(ValueError, match=r"\[3, 3, C, O\]"):
        conv3x3(images[..., :2], kernels[0])

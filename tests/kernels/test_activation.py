"""The activation inside the kernels: its plain form, and its PTX where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tests.kernels.lowering import lowered_for_gpu
from ttt_jax import models
from ttt_jax.kernels import conv
from ttt_jax.kernels.conv import activation, passes
from ttt_jax.kernels.conv.convolution import Convolution

GPU = jax.default_backend() == "gpu"


def run(x, a, b, inside, compiled):
    """``affine_relu`` and ``round_to`` of all of ``x [M, K]`` in one program."""

    def kernel(x_ref, a_ref, b_ref, inside_ref, u_ref, y_ref):
        x, mask = x_ref[...], None if inside is None else inside_ref[...] > 0
        a, b = a_ref[...][None], b_ref[...][None]
        u_ref[...] = activation.affine_relu(x, a, b, mask, compiled)
        wide = a * x.astype(jnp.float32)
        y_ref[...] = activation.round_to(wide, x.dtype, compiled)

    mask = jnp.ones(x.shape, jnp.int32) if inside is None else inside.astype(jnp.int32)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=not compiled,
    )(x, a, b, mask)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (16, 16), (32, 128)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_masks_and_nans(shape, dtype, compiled):
    if compiled and not GPU:
        pytest.skip("needs a GPU: compiles PTX")
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(dtype)
    x[3, 5] = np.nan
    a, b = rng.normal(size=(2, shape[1])).astype(np.float32)
    # Not by rows nor by columns: each value has its own entry in the mask.
    inside = rng.random(shape) < 0.5
    inside[3, 5] = True
    # In float64: a and b are float32, so that the products are exact and one sum is rounded.
    wide = np.asarray(x, np.float64) * np.asarray(a, np.float64) + np.asarray(b, np.float64)
    masks = (inside, None)
    both = jax.jit(lambda *operands: [run(*operands, mask, compiled) for mask in masks])(x, a, b)
    for mask, (u, y) in zip(masks, jax.device_get(both), strict=True):
        due = np.maximum(wide, 0) if mask is None else np.where(mask, np.maximum(wide, 0), 0)
        limit = {"rtol": 2**-8 if dtype == jnp.bfloat16 else 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(np.asarray(u, np.float64), due, **limit)
        assert np.isnan(float(u[3, 5])) and np.isnan(u.astype(np.float32)).sum() == 1
        products = (a * x.astype(np.float32)).astype(dtype)
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(products, np.float32))


@pytest.mark.skipif(GPU, reason="lowered for a GPU from here")
@pytest.mark.parametrize(("dtype", "ptx"), [(jnp.bfloat16, True), (jnp.float32, False)])
def test_what_a_gpu_is_given(dtype, ptx):
    x, vector = jnp.zeros((2, 256, 16), dtype), jnp.zeros((2, 16))
    forward = functools.partial(passes.forward, Convolution(16, 16))
    text = lowered_for_gpu(forward, x, vector, vector, jnp.zeros((9, 16, 16), dtype))
    assert ("cvt.rn.relu.bf16x2.f32" in text) == ptx


@pytest.mark.parametrize(
    ("capability", "dtype", "due"),
    [
        ("7.5", jnp.bfloat16, False),
        ("7.5", jnp.float32, True),
        ("8.0", jnp.bfloat16, True),
        ("12.0", jnp.bfloat16, True),
    ],
)
def test_bfloat16_needs_a_card_that_has_it(monkeypatch, capability, dtype, due):
    class Card:
        platform = "cuda"
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [Card()])
    assert conv.supported((32, 32, 3), 16, 8, dtype) is due
    net = models.ResNet(depth=8, conv="fused", dtype=dtype).bind({"params": {}})
    if due:
        assert net._fused(1, (32, 32, 3))
    else:
        with pytest.raises(ValueError, match=f"8 or more, received {capability}: use float32"):
            net._fused(1, (32, 32, 3))

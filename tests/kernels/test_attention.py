"""The forms of attention against one another.

On a CPU the kernel is interpreted; on a GPU it is compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels import attention
from ttt_jax.kernels.attention import forms, kernel


def arrays(tokens, size):
    """Query, key, value and a cotangent ``[2, 3, T, 2, D]``."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 2, 3, tokens, 2, size)).astype(np.float32)


def results(operands, *forms):
    """By each form, the result of every instance and its derivative."""

    def one(query, key, value, dout, form):
        out, backward = jax.vjp(form, query, key, value)
        return out, *backward(dout)

    @jax.jit
    def all_forms(operands):
        return [jax.vmap(functools.partial(one, form=form))(*operands) for form in forms]

    with jax.default_matmul_precision("highest"):
        return jax.device_get(all_forms(operands))


@pytest.mark.parametrize(("tokens", "size"), [(49, 64), (64, 16), (5, 32), (1, 16)])
def test_the_kernel_is_attention(tokens, size):
    assert attention.fits(tokens, size)
    both = results(arrays(tokens, size), kernel.attend, attention.products)
    for ours, plain in zip(*both, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


def test_the_kernel_rounds_as_the_products_do():
    [exact] = results(arrays(49, 32), attention.products)
    rounded = arrays(49, 32).astype(jnp.bfloat16)
    for form in results(rounded, kernel.attend, attention.products):
        for ours, wanted in zip(form, exact, strict=True):
            assert ours.dtype == jnp.bfloat16
            ours = ours.astype(np.float32)
            assert 1e-4 < np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) < 1e-2


@pytest.mark.parametrize("tokens", [6, 7])
def test_an_appended_token_is_not_seen(tokens):
    flash = lambda *operands: attention.flash(*operands, "xla")  # noqa: E731
    for ours, plain in zip(*results(arrays(tokens, 8), flash, attention.products), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


def test_where_which_form_is_taken(monkeypatch):
    assert attention.form_of("fused", jnp.bfloat16) == ("fused" if on_nvidia() else "xla")
    assert attention.form_of("fused", jnp.float32) == "xla"
    assert attention.form_of("xla", jnp.bfloat16) == "xla"
    monkeypatch.setattr(forms, "flash", lambda *args: args[-1])
    monkeypatch.setattr(forms, "products", lambda *args: "products")
    monkeypatch.setattr(kernel, "attend", lambda *args: "kernel")

    def taken(tokens, size, form="fused"):
        return attention.attend(*arrays(tokens, size)[:3, 0], form)

    assert [taken(64, 64), taken(65, 64), taken(64, 24), taken(64, 4)] == [
        "kernel",
        "cudnn",
        "cudnn",
        "products",
    ]
    assert taken(64, 64, "xla") == "products"


def on_nvidia():
    return jax.default_backend() == "gpu" and jax.devices()[0].platform != "rocm"


def test_what_the_kernel_refuses():
    long, odd = arrays(65, 16)[:3, 0], arrays(8, 8)[:3, 0]
    for operands in (long, odd, (long[0][:, :8], long[1], long[2])):
        with pytest.raises(ValueError, match=r"T <= 64 and D among \(16, 32, 64, 128\), received"):
            kernel.attend(*operands)

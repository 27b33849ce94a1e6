"""Gated features: both derivatives from one kernel, as XLA has them; again differentiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.kernels.test_ttt_linear import equations
from ttt_jax.kernels.gating import forms

every = pytest.mark.parametrize("activation", forms.ACTIVATIONS)


def arrays(shape=(2, 8, 32), dtype=jnp.float32):
    return (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(3))


def derivatives(activation, form):
    def made(gate, up, dout):
        call = functools.partial(forms.gated, activation=activation, form=form)
        out, backward = jax.vjp(call, gate, up)
        return out, *backward(dout)

    return made


@every
def test_the_derivatives_are_those_of_the_product(activation):
    gate, up, dout = arrays()
    made = quickly(derivatives(activation, "fused"), gate, up, dout)
    for leaf, due in zip(made, derivatives(activation, "xla")(gate, up, dout), strict=True):
        np.testing.assert_allclose(leaf, due, atol=2e-6)


def test_sixteen_bits_are_rounded_once():
    """What is between is float32, so that the kernel is nearer to float32 than XLA is."""
    gate, up, dout = arrays((1, 16, 64), jnp.bfloat16)
    wide = [leaf.astype(jnp.float32) for leaf in (gate, up, dout)]
    due = derivatives("silu", "xla")(*wide)[1:]
    made = quickly(derivatives("silu", "fused"), gate, up, dout)[1:]
    for leaf, exact in zip(made, due, strict=True):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, exact.astype(jnp.bfloat16))


def test_instances_are_mapped():
    gate, up, dout = arrays((3, 2, 8, 32))
    made = quickly(jax.vmap(derivatives("silu", "fused")), gate, up, dout)
    for leaf, due in zip(
        made, derivatives("silu", "xla")(*map(flat, (gate, up, dout))), strict=True
    ):
        np.testing.assert_allclose(flat(leaf), due, atol=2e-6)


def flat(leaf):
    return leaf.reshape(6, 8, 32)


@every
def test_it_may_be_differentiated_again(activation):
    gate, up, direction = arrays()

    def slope(form):
        def value(gate, up):
            return jnp.sin(forms.gated(gate, up, activation=activation, form=form)).sum()

        def reverse(gate, up):
            first, second = jax.grad(value, (0, 1))(gate, up)
            return (first * direction).sum() + (second**2).sum()

        forward = jax.jvp(jax.grad(value), (gate, up), (direction, up))[1]
        return jax.grad(reverse, (0, 1))(gate, up), forward

    made, due = quickly(lambda: slope("fused")), slope("xla")
    for leaf, other in zip(jax.tree.leaves(made), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-5)


def test_sizes_that_the_kernel_does_not_take_are_xla():
    gate, up, dout = arrays((1, 3, 5))
    program = jax.make_jaxpr(derivatives("silu", "fused"))(gate, up, dout)
    assert not list(equations(program.jaxpr, "pallas_call"))
    gate, up, dout = arrays()
    program = jax.make_jaxpr(derivatives("silu", "fused"))(gate, up, dout)
    assert len(list(equations(program.jaxpr, "pallas_call"))) == 1


def test_bad_input_is_said():
    gate, up, _ = arrays()
    with pytest.raises(ValueError, match="activation must be one of"):
        forms.gated(gate, up, activation="relu", form="xla")
    with pytest.raises(ValueError, match="one shape and dtype"):
        forms.gated(gate, up[:1], activation="silu", form="xla")
    with pytest.raises(ValueError, match="gate must be an array of real numbers with 3 axes"):
        forms.gated(gate[0], up[0], activation="silu", form="xla")

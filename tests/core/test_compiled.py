"""What the compiled program must not contain: copies or gradients of frozen parameters."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import audit, losses, select

# Shapes that no activation has, so that a shape in the program's text can only be a parameter.
N, INPUTS, HIDDEN, CLASSES = 7, 37, 211, 13
RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": RNG.normal(size=(INPUTS, HIDDEN)).astype(np.float32) / 6},
    "norm": {"scale": np.ones(HIDDEN, np.float32), "bias": np.zeros(HIDDEN, np.float32)},
    "second": {"kernel": RNG.normal(size=(HIDDEN, CLASSES)).astype(np.float32) / 14},
}
XS = RNG.normal(size=(N, INPUTS)).astype(np.float32)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(N))


def dense(params, inputs):
    hidden = inputs @ params["first"]["kernel"]
    hidden = jnp.tanh(hidden * params["norm"]["scale"][None] + params["norm"]["bias"][None])
    return hidden @ params["second"]["kernel"]


def entropy_ttt(selection, num_steps=2, **options):
    adapter = ttt.gradient_adapter(
        losses.entropy(dense), optax.adam(1e-2), select=selection, **options
    )
    return ttt.episodic(adapter, ttt.unbatched(dense), num_steps=num_steps)


@functools.cache
def everything_adapts():
    predict = ttt.batched(entropy_ttt(select.everything()))
    return jax.jit(predict).lower(PARAMS, XS, KEYS).compile()


class TestFrozenLeaves:
    # The program of three steps holds that of one: the first step is peeled.
    @pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.full), 3])
    def test_are_neither_copied_nor_differentiated(self, steps):
        selection = select.norm_affine()
        predict = entropy_ttt(selection, steps, anchor=0.1)
        assert audit.copied_frozen(predict, selection, PARAMS, XS, KEYS) == []

    def test_are_not_copied_for_a_failed_instance_either(self):
        """The fall-back to the pristine prediction chooses fast parameters only."""
        selection = select.paths("second/.*")
        predict = ttt.filtered(
            ttt.sharpness_aware_adapter(
                losses.entropy(dense), optax.sgd(0.1), select=selection, rho=0.05
            ),
            lambda params, x, key: x.sum() > 0,
        )
        predict = ttt.episodic(predict, ttt.unbatched(dense), num_steps=2, trace=True)
        assert audit.copied_frozen(predict, selection, PARAMS, XS, KEYS) == []

    @pytest.mark.parametrize(
        "leaf", ["first/kernel", pytest.param("second/kernel", marks=pytest.mark.full)]
    )
    def test_the_audit_finds_a_copy(self, leaf):
        """Positive control: a leaf that adapts is copied, and the audit says which."""
        predict = entropy_ttt(select.union(select.norm_affine(), select.paths(leaf)))
        found = audit.copied_frozen(predict, select.norm_affine(), PARAMS, XS, KEYS)
        assert found == [leaf]

    def test_the_audit_finds_a_gradient(self):
        """One that is computed and then thrown away, which a mask in the optimizer would do."""

        def predict(params, x, key):
            grads = jax.grad(losses.entropy(dense))(params, x, key)
            size = optax.tree.norm(grads)
            return dense(params, x[None])[0] * size, ttt.source(lambda p, x: x)(params, x, key)[1]

        found = audit.copied_frozen(predict, select.norm_affine(), PARAMS, XS, KEYS)
        assert found == ["first/kernel", "second/kernel"]

    def test_need_no_memory_per_instance(self):
        """Temporary memory holds activations and fast copies, far from N frozen kernels."""
        frozen = N * PARAMS["first"]["kernel"].nbytes
        predict = ttt.batched(entropy_ttt(select.norm_affine()))
        programs = jax.jit(predict).lower(PARAMS, XS, KEYS).compile(), everything_adapts()
        small, large = (program.memory_analysis().temp_size_in_bytes for program in programs)
        assert small < frozen / 2
        assert large > frozen


def test_a_trace_stacks_outputs_and_not_weights():
    """Five steps: no array holds a kernel of every instance for every step."""
    adapter = ttt.gradient_adapter(
        losses.entropy(dense), optax.sgd(0.1), select=select.paths(".*/kernel")
    )
    predict = ttt.episodic(adapter, ttt.unbatched(dense), num_steps=5, trace=True)
    text = jax.jit(ttt.batched(predict)).lower(PARAMS, XS, KEYS).compile().as_text()
    shapes = [sorted(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", text)]
    kernel = sorted([N, INPUTS, HIDDEN])
    assert kernel in shapes
    assert not any(sorted([steps, *kernel]) in shapes for steps in (4, 5, 6))


def convolve(params, images):
    for kernel in params["kernels"]:
        images = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        images = jnp.tanh(images)
    return images.mean(axis=(1, 2)) @ params["head"]


CONV = {
    "kernels": [
        RNG.normal(size=(3, 3, 3, 5)).astype(np.float32) / 5,
        RNG.normal(size=(3, 3, 5, 5)).astype(np.float32) / 6,
    ],
    "head": RNG.normal(size=(5, 4)).astype(np.float32),
}
IMAGES = RNG.normal(size=(N, 8, 8, 3)).astype(np.float32)


def rotation_ttt(selection, num_steps):
    adapter = ttt.gradient_adapter(losses.rotation(convolve), optax.sgd(0.1), select=selection)
    return ttt.episodic(adapter, ttt.unbatched(convolve), num_steps=num_steps)


def test_the_audit_finds_copied_convolution_kernels():
    """Which XLA holds with the instances folded into the output channels."""
    args = (CONV, IMAGES, KEYS)
    head = select.paths("head")
    assert audit.copied_frozen(rotation_ttt(head, 2), head, *args) == []
    found = audit.copied_frozen(rotation_ttt(select.everything(), 2), head, *args)
    assert found == ["kernels/0", "kernels/1"]


class TestPeeledStep:
    """In the first step all instances share the pristine weights: no grouped convolution."""

    def convolutions(self, num_steps, selection):
        """``(grouped, not grouped)`` convolutions of the program, as it is given to XLA."""
        predict = rotation_ttt(selection, num_steps)
        lowered = jax.jit(ttt.batched(predict)).lower(CONV, IMAGES, KEYS)
        lines = [line for line in lowered.as_text().splitlines() if "convolution(" in line]
        groups = [
            max(int(count) for count in re.findall(r"(?:feature|batch)_group_count = (\d+)", line))
            for line in lines
        ]
        return sum(count > 1 for count in groups), sum(count == 1 for count in groups)

    def test_one_step(self):
        """Forward and the gradient of the input are ungrouped; two layers, so three in all.

        Grouped are the two weight gradients, one per instance, and the two layers of the
        prediction with private weights.
        """
        assert self.convolutions(1, select.everything()) == (4, 3)

    def test_later_steps_are_grouped(self):
        """The scan body adds two forward, two weight and one input convolution, all grouped."""
        assert self.convolutions(2, select.everything()) == (9, 3)

    def test_shared_kernels_are_never_grouped(self):
        grouped, shared = self.convolutions(3, select.paths("head"))
        assert grouped == 0 and shared > 0


def test_pristine_parameters_survive_their_use():
    """No buffer is donated: the same arrays serve any number of calls, unchanged."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    run = everything_adapts()
    first, _ = run(params, XS, KEYS)
    second, _ = run(params, XS, KEYS)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)

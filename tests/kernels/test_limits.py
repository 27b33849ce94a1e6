"""What the fused kernels take, and what goes to XLA or is refused instead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import models
from ttt_jax.kernels import conv
from ttt_jax.kernels.conv import limits, passes, tiles
from ttt_jax.kernels.conv.convolution import Affine, Convolution


@functools.cache
def variables():
    """Zeros for the network, whatever its form and its images."""
    module = models.ResNet(depth=8, num_classes=4, conv="lax")
    shapes = jax.eval_shape(lambda key: models.init(module, key, (4, 4, 3)), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def network(**options):
    """A small network as ``(apply, variables)``."""
    return models.from_linen(models.ResNet(depth=8, num_classes=4, **options)), variables()


def runs_kernels(apply, variables, images):
    return "pallas_call" in str(jax.make_jaxpr(apply)(variables, images))


@pytest.mark.parametrize(
    ("sides", "fused"), [((32, 32), True), ((16, 64), True), ((64, 32), False), ((512, 512), False)]
)
def test_larger_images_than_were_timed_take_xla(monkeypatch, sides, fused):
    monkeypatch.setattr(conv, "supported", conv.fits)
    shape = (*sides, 3)
    assert conv.fits(shape, 16, 8, jnp.float32) is fused
    apply, variables = network()
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    assert runs_kernels(apply, variables, images) is fused


def test_larger_images_are_refused_by_name():
    apply, variables = network(conv="fused")
    with pytest.raises(ValueError, match=r"16 x 16 to 32 x 32 pixels.*\(64, 64, 3\): use conv="):
        apply(variables, jnp.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize("groups", [0, -8, 3])
def test_groups_that_divide_nothing_do_not_fit(groups):
    assert conv.fits((16, 16, 3), 16, 8, jnp.float32)
    assert not conv.fits((16, 16, 3), 16, groups, jnp.float32)


@pytest.mark.parametrize("form", ["auto", "fused"])
def test_an_empty_batch(monkeypatch, form):
    monkeypatch.setattr(conv, "supported", conv.fits)
    apply, variables = network(conv=form)
    images = jnp.zeros((2, 16, 16, 3))
    assert runs_kernels(apply, variables, images)
    logits = jax.jit(apply)(variables, images[:0])
    assert (logits.shape, logits.dtype) == ((0, 4), jnp.float32)
    several = jax.eval_shape(jax.vmap(apply, (None, 0)), variables, images[:, None][:, :0])
    assert several.shape == (2, 0, 4)


def operands(sides=(4, 4), stride=1, channels=16, outputs=16, count=2, dtype=jnp.float32):
    """The arguments of the three kernels by name, all as they should be."""
    height, width = sides
    x = jnp.zeros((count, height * width, channels), dtype)
    vector = jnp.zeros((count, channels))
    dy = jnp.zeros((count, height * width // stride**2, outputs), dtype)
    w = jnp.zeros((9, channels, outputs), dtype)
    arrays = {"x": x, "a": vector, "b": vector, "w": w, "dy": dy, "gamma": jnp.zeros(channels)}
    return arrays, Convolution(height, width, stride, groups=8, interpret=True)


def call(kernel, arrays, size, residual=None):
    x, a, b = arrays["x"], arrays["a"], arrays["b"]
    if kernel == "forward":
        return passes.forward(size, x, a, b, arrays["w"], residual)
    if kernel == "weight_gradient":
        return passes.weight_gradient(size, x, a, b, arrays["dy"])
    affine = Affine(a, b, a, a)
    return passes.input_gradient(
        size, arrays["dy"], arrays["w"], x, affine, arrays["gamma"], residual
    )


KERNELS = ("forward", "weight_gradient", "input_gradient")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sides": (5, 7), "stride": 2}, r"sides are powers of two.*received 5 x 7 with stride 2"),
        ({"sides": (1, 8), "stride": 2}, r"at least the stride, received 1 x 8 with stride 2"),
        ({"sides": (64, 32)}, r"at most 1024 positions, received 64 x 32: use conv3x3"),
        ({"stride": 3}, r"stride 1 or 2, received 3"),
        ({"outputs": 24}, r"takes 16, 32, 64 channels, received 16 with 24 outputs"),
        ({"channels": 128}, r"takes 16, 32, 64 channels, received 128"),
        ({"count": 0}, r"N >= 1, received shape \(0, 16, 16\).*conv3x3"),
        ({"dtype": jnp.float16}, r"float32 or bfloat16, received float16: cast x"),
    ],
)
def test_sizes_beyond_the_limits(kernel, options, words):
    with pytest.raises(ValueError, match=f"^{kernel} .*{words}"):
        call(kernel, *operands(**options))


@pytest.mark.parametrize("kernel", KERNELS)
def test_arrays_that_do_not_belong_together(kernel):
    arrays, size = operands()
    with pytest.raises(ValueError, match=rf"{kernel} takes x \[N, height \* width, C\].*of 8 x 4"):
        call(kernel, arrays, size._replace(height=8))
    with pytest.raises(ValueError, match=rf"{kernel} takes x \[N, P, C\].*\(2, 4, 4, 16\)"):
        call(kernel, arrays | {"x": jnp.zeros((2, 4, 4, 16))}, size)
    with pytest.raises(ValueError, match=r"takes a of shape \(2, 16\).*received \(16,\)"):
        call(kernel, arrays | {"a": jnp.zeros(16)}, size)
    with pytest.raises(ValueError, match=r"takes b .* in float32 .* in bfloat16: reshape or cast"):
        call(kernel, arrays | {"b": arrays["b"].astype(jnp.bfloat16)}, size)
    if kernel != "forward":
        with pytest.raises(ValueError, match=r"takes dy of shape \(2, 16, 16\).*\(2, 4, 16\)"):
            call(kernel, arrays | {"dy": jnp.zeros((2, 4, 16))}, size)
    if kernel != "weight_gradient":
        with pytest.raises(ValueError, match=r"takes w of shape \(9, 16, 16\).*\(3, 3, 16, 16\)"):
            call(kernel, arrays | {"w": jnp.zeros((3, 3, 16, 16))}, size)
        with pytest.raises(ValueError, match=r"takes residual of shape \(2, 16, 16\)"):
            call(kernel, arrays, size, residual=jnp.zeros((2, 4, 16)))


def test_the_groups_of_an_input_gradient():
    arrays, size = operands()
    for groups in (0, 3, 32):
        with pytest.raises(ValueError, match=f"groups.*received {groups} for 16 channels"):
            call("input_gradient", arrays, size._replace(groups=groups))


def test_a_residual_has_the_shape_of_what_it_is_added_to():
    arrays, size = operands((8, 8), stride=2, outputs=32)
    after, before = jnp.zeros((2, 16, 32)), arrays["x"]
    shapes = lambda *args, **more: jax.tree.map(jnp.shape, jax.eval_shape(*args, **more))  # noqa: E731
    assert shapes(lambda: call("forward", arrays, size, residual=after))[0] == after.shape
    assert shapes(lambda: call("input_gradient", arrays, size, residual=before))[0] == before.shape
    with pytest.raises(ValueError, match="takes residual"):
        call("forward", arrays, size, residual=before)


def test_limits_are_those_of_the_tiles():
    assert set(tiles.OTHERS) == set(limits.CHANNELS)
    assert {n for key in tiles.TIMED for n in key[:2]} == set(limits.CHANNELS)
    assert all(
        tile.rows in (1, 2)
        for three in tiles.TIMED.values()
        for tile in three
        if hasattr(tile, "rows")
    )
    sizes = [size for size in range(70) if limits.power_of_two(size)]
    np.testing.assert_array_equal(sizes, [1, 2, 4, 8, 16, 32, 64])

"""The fused kernels against the same network written with flax layers.

On a CPU the kernels are interpreted; on a GPU they are compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from ttt_jax import models
from ttt_jax.kernels import conv
from ttt_jax.kernels.conv import passes
from ttt_jax.kernels.conv.convolution import Convolution
from ttt_jax.models import resnet

SHAPE = (16, 16, 3)


def _moved(tree, scale):
    """Scales and biases away from 1 and 0, so that each has a part in the result."""
    rng = np.random.default_rng(1)
    noise = lambda leaf: scale * rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(leaf) + noise(leaf), tree)


@pytest.fixture(scope="module")
def drawn():
    """Initial variables, of the network with flax layers and of the fused one."""
    nets = [models.ResNet(depth=8, conv=form) for form in ("lax", "fused")]
    draws = [jax.jit(lambda key, net=net: models.init(net, key, SHAPE)) for net in nets]
    return jax.device_get([draw(jax.random.key(0)) for draw in draws])


@pytest.fixture(scope="module")
def variables(drawn):
    return _moved(drawn[0], 0.1)


def _distance(a, b):
    a, b = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in (a, b))
    square = lambda tree: sum(np.sum(leaf**2) for leaf in jax.tree.leaves(tree))  # noqa: E731
    return (square(jax.tree.map(np.subtract, a, b)) / square(b)) ** 0.5


def _maps(x):
    flat = x.reshape(len(x), -1, x.shape[-1]).astype(jnp.float32)
    sums = jnp.stack([flat.sum(axis=1), (flat**2).sum(axis=1)], axis=1)
    return conv.Maps(flat.astype(x.dtype), sums, *x.shape[1:3])


@functools.cache
def _block(features, stride):
    """``(params, x) -> (scalar, gradients)`` with flax layers and on the kernels; arguments."""
    net = resnet._Block(features, stride, 8, "group", "lax", jnp.float32)
    rng = np.random.default_rng(7)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights, x = normal(2, 8 // stride, 8 // stride, features), normal(2, 8, 8, 16)

    def plain(params, x):
        return jnp.sum(weights * jnp.sin(net.apply(params, x, False)))

    def fused(params, x):
        y = net.apply(params, _maps(x), False)
        # The sums belong to the values that they came with.
        np.testing.assert_equal(y.sums.shape, (2, 2, features))
        return jnp.sum(weights * jnp.sin(y.images()))

    shapes = jax.eval_shape(lambda key: net.init(key, x, False), jax.random.key(9))
    ones = lambda path, leaf: np.full(leaf.shape, path[-1].key == "scale", np.float32)  # noqa: E731
    params = _moved(jax.tree_util.tree_map_with_path(ones, shapes), 0.3)
    slopes = (jax.jit(jax.value_and_grad(form, argnums=(0, 1))) for form in (plain, fused))
    return *slopes, params, x


@pytest.mark.parametrize(("features", "stride"), [(16, 1), (32, 2)])
def test_a_block_and_its_gradients_equal_the_flax_layers(features, stride):
    plain, fused, params, x = _block(features, stride)
    with jax.default_matmul_precision("highest"):
        expected, value = plain(params, x), fused(params, x)
    np.testing.assert_allclose(value[0], expected[0], rtol=1e-5)
    for part, due in zip(jax.tree.leaves(value[1]), jax.tree.leaves(expected[1]), strict=True):
        assert _distance(part, due) < 1e-5


@pytest.mark.full
def test_private_kernels_equal_the_loop():
    """Vmapped over parameters, as from the second inner step on; adapted ones: test_gradients."""
    _, fused, params, x = _block(16, 1)
    private = jax.tree.map(lambda v: np.stack([v, v * np.float32(1.1)]), params)
    gradients = lambda params, x: fused(params, x)[1][0]  # noqa: E731
    with jax.default_matmul_precision("highest"):
        together = jax.jit(jax.vmap(gradients, in_axes=(0, None)))(private, x)
        for place in range(2):
            alone = gradients(jax.tree.map(lambda v, i=place: v[i], private), x)
            assert _distance(jax.tree.map(lambda v, i=place: v[i], together), alone) < 1e-5


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: compiles the kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_on_a_gpu(variables, dtype):
    images = jax.random.uniform(jax.random.key(3), (2, *SHAPE))
    keys = jax.random.split(jax.random.key(2), 2)

    def gradients(form, dtype):
        net = models.ResNet(depth=8, conv=form, dtype=dtype)
        loss = ttt.losses.rotation(models.from_linen(net, "rotation"), copies=8)
        return jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(variables, images, keys)

    with jax.default_matmul_precision("highest"):
        exact = gradients("lax", jnp.float32)
    if dtype == "float32":
        with jax.default_matmul_precision("highest"):
            assert _distance(gradients("fused", jnp.float32), exact) < 1e-5
    else:
        far = _distance(gradients("lax", jnp.bfloat16), exact)
        assert 0 < _distance(gradients("fused", jnp.bfloat16), exact) < 1.5 * far


def test_classification_of_one_image(variables):
    image = jax.random.uniform(jax.random.key(4), (1, *SHAPE))
    with jax.default_matmul_precision("highest"):
        both = [models.from_linen(models.ResNet(depth=8, conv=form)) for form in ("fused", "lax")]
        fused, plain = jax.jit(lambda *args: [apply(*args) for apply in both])(variables, image)
    np.testing.assert_allclose(fused, plain, atol=1e-4)


def test_parameters_are_those_of_the_flax_layers(drawn):
    jax.tree.map(np.testing.assert_array_equal, *drawn)


@pytest.mark.parametrize("count", [1, pytest.param(6, marks=pytest.mark.full), 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_weight_gradient_by_any_number_of_images(count, stride):
    rng = np.random.default_rng(0)
    shapes = (count, 64, 16), (9, 16, 16), (2, count, 16), (count, 64 // stride**2, 16)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    size = Convolution(8, 8, stride, interpret=jax.default_backend() != "gpu")

    @jax.jit
    def both(x, w, affine, dy):
        a, b = affine

        def plain(w):
            h = jax.nn.relu(a[:, None] * x + b[:, None]).reshape(count, 8, 8, 16)
            return jax.lax.conv_general_dilated(
                h,
                w.reshape(3, 3, 16, 16),
                (stride, stride),
                ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ).reshape(dy.shape)

        y, backward = jax.vjp(plain, w)
        ours = *passes.forward(size, x, a, b, w), passes.weight_gradient(size, x, a, b, dy)
        return ours, (y, y.sum(axis=1), *backward(dy))

    with jax.default_matmul_precision("highest"):
        (out, sums, dw), due = both(*arrays)
    np.testing.assert_allclose(out, due[0], atol=1e-3)
    np.testing.assert_allclose(sums[:, 0], due[1], atol=1e-2)
    np.testing.assert_allclose(dw, due[2], atol=1e-3)


def test_what_does_not_fit_is_refused_or_falls_back(variables):
    images = jnp.zeros((1, 12, 12, 3))
    with pytest.raises(ValueError, match=r"powers of two.*\(12, 12, 3\).*use conv=\"auto\""):
        models.from_linen(models.ResNet(depth=8, conv="fused"))(variables, images)
    falls_back = models.from_linen(models.ResNet(depth=8))
    assert jax.eval_shape(falls_back, variables, images).shape == (1, 10)
    with pytest.raises(ValueError, match="norm"):
        models.ResNet(conv="fused", norm="batch")
    assert not conv.fits(SHAPE, 32, 8, jnp.float32)
    assert not conv.fits(SHAPE, 16, 8, jnp.float16)

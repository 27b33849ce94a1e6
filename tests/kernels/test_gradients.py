"""What is differentiated through the fused kernels: images, gradients, adapted predictions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax.kernels.conv import conv3x3, stem
from ttt_jax.models import resnet

SHAPE = (8, 8, 3)
BLOCKS = ((16, 1), (32, 2))


def encode(form, params, images):
    """The maps of the first convolution and of a block of each kind, on 8 x 8 pixels."""
    kernel = params["conv1"].astype(images.dtype)
    x = stem(images, kernel) if form == "fused" else conv3x3(images, kernel, form=form)
    for name, (features, stride) in zip(("same", "halved"), BLOCKS, strict=True):
        if name in params:
            plain = "lax" if form == "fused" else form
            block = resnet._Block(features, stride, 8, "group", plain, images.dtype)
            x = block.apply({"params": params[name]}, x, False)
    return x.images() if form == "fused" else x


def classify(form, params, images):
    """``[N, 8, 8, 3] -> [N, 4]``."""
    features = jnp.mean(encode(form, params, images), (1, 2))
    return features @ params["fc"][: features.shape[-1]]


def value(form, params, images):
    """A scalar in which every output has a part of its own."""
    y = encode(form, params, images).astype(jnp.float32)
    return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * jnp.sin(y))


def draw(*names):
    """Parameters with those blocks; scales and biases away from 1 and 0."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(0.3 * rng.normal(size=shape))  # noqa: E731
    params = {"conv1": normal(3, 3, 3, 16), "fc": normal(32, 4)}
    for name, (features, _) in zip(("same", "halved"), BLOCKS, strict=True):
        if name in names:
            params[name] = {}
            for index, channels in ((1, 16), (2, features)):
                params[name] |= {
                    f"gn{index}": {"scale": 1 + normal(channels), "bias": normal(channels)},
                    f"conv{index}": {"kernel": normal(3, 3, channels, features)},
                }
    return params


def photos(*leading):
    return np.random.default_rng(1).normal(size=(*leading, *SHAPE)).astype(np.float32)


def assert_close(tree, due, limit=1e-4):
    for part, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(due), strict=True):
        part, wanted = (np.asarray(leaf, np.float64) for leaf in (part, wanted))
        assert np.linalg.norm(part - wanted) <= limit * np.linalg.norm(wanted)


def distance(tree, due):
    return optax.tree.norm(jax.tree.map(np.subtract, tree, due))


def private(params):
    """Two instances, each with parameters of its own."""
    return jax.tree.map(lambda leaf: np.stack([leaf, np.float32(1.1) * leaf]), params)


def test_the_images_gradient_with_private_kernels():
    params, images = draw("halved"), photos(2, 2)
    gradients = [
        jax.vmap(jax.grad(functools.partial(value, form), argnums=1)) for form in ("fused", "lax")
    ]
    ours, due = jax.jit(lambda *args: [gradient(*args) for gradient in gradients])(
        private(params), images
    )
    assert np.linalg.norm(due) > 1
    assert_close(ours, due)


def products(jaxpr):
    """The matrix products and convolutions of a program, but those inside of the kernels."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found += 1
        elif equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(
                tuple(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                found += products(inner) if hasattr(inner, "eqns") else 0
    return found


def test_the_images_gradient_costs_nothing_where_it_is_not_asked_for():
    """Not even dead code: an adaptation step runs the kernels alone."""
    params, images = draw("same"), photos(2, 2)
    fused = functools.partial(value, "fused")

    def steps(params, images):
        def step(params, _):
            return jax.tree.map(jnp.add, params, jax.grad(fused)(params, images)), None

        return jax.lax.scan(step, params, length=2)[0]

    many = private(params)
    assert products(jax.make_jaxpr(jax.vmap(steps))(many, images).jaxpr) == 0
    training = jax.grad(lambda p, x: jax.vmap(fused)(p, x).sum())
    assert products(jax.make_jaxpr(training)(many, images).jaxpr) == 0
    both = jax.vmap(jax.grad(fused, argnums=(0, 1)))
    assert products(jax.make_jaxpr(both)(many, images).jaxpr) == 1


# Interpreted kernels compile slowly: float32 has its second derivatives of a block in
# test_adaptation_and_its_outer_gradient, of the other in the full run.
@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        ("bfloat16", "halved"),
        pytest.param("bfloat16", "same", marks=pytest.mark.full),
        pytest.param("float32", "same", marks=pytest.mark.full),
        pytest.param("float32", "halved", marks=pytest.mark.full),
    ],
)
def test_second_derivatives(dtype, block):
    params = draw(block)
    images = photos(2)
    params.pop("fc")
    rng = np.random.default_rng(1)
    along = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), params)

    def second(form, dtype):
        def slope(params, images):
            gradient = jax.grad(lambda p: value(form, p, images.astype(dtype)))(params)
            return optax.tree.vdot(gradient, along)

        return jax.grad(slope, argnums=(0, 1))

    forms = [second("fused", dtype), second("lax", dtype), second("lax", jnp.float32)]
    ours, plain, exact = jax.device_get(
        jax.jit(lambda *args: [form(*args) for form in forms])(params, images)
    )
    if dtype == "float32":
        assert_close(ours, exact)
        return
    assert 0 < distance(ours, exact) < 1.5 * distance(plain, exact)


def episodic(form, num_steps):
    """``(params, image, key) -> (logits[4], info)`` after some steps of rotation."""
    apply = functools.partial(classify, form)
    adapter = ttt.gradient_adapter(
        ttt.losses.rotation(apply), optax.sgd(0.1), select=ttt.select.everything()
    )
    return ttt.episodic(adapter, ttt.unbatched(apply), num_steps=num_steps)


@pytest.mark.parametrize("num_steps", [1, pytest.param(2, marks=pytest.mark.full)])
def test_adaptation_and_its_outer_gradient(num_steps):
    """The kernels on a mesh of two devices, where there are two, and the plain form on one."""
    mesh = None
    if jax.device_count() > 1:
        mesh = jax.make_mesh(
            (2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
        )
    params, images = draw("same"), photos(4)
    keys = ttt.sample_keys(jax.random.key(0), np.arange(4))

    def outer(form, mesh):
        predict = ttt.batched(episodic(form, num_steps), mesh=mesh)

        def loss(params, images, keys):
            logits, info = predict(params, images, keys)
            return jnp.sum(jnp.sin(logits)), (logits, info)

        return jax.jit(jax.grad(loss, has_aux=True))(params, images, keys)

    slopes, (spread, info) = outer("fused", mesh)
    due, (alone, _) = outer("lax", None)
    assert info.ok.all() and info.updated.all()
    assert mesh is None or len(spread.sharding.device_set) == 2
    ttt.audit.require_close(spread, alone)
    assert_close(slopes, due)


def test_parameters_narrower_than_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw("halved"))
    gradient = jax.eval_shape(jax.grad(functools.partial(value, "fused")), params, photos(2))
    assert jax.tree.map(lambda leaf: leaf.dtype, gradient) == jax.tree.map(
        lambda leaf: leaf.dtype, params
    )


def test_the_sums_have_no_gradient_of_their_own():
    kernel = draw()["conv1"]
    gradient = jax.grad(lambda kernel: jnp.sum(stem(photos(1), kernel).sums))(kernel)
    np.testing.assert_array_equal(gradient, 0)


def test_forward_mode_is_refused():
    params, images = draw("same"), photos(1)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda p: value("fused", p, images), (params,), (params,))

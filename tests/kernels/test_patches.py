"""The kernels by patches against those by taps, and which of the two forms a size takes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels.conv import passes, patches, patching, taps, tiles
from ttt_jax.kernels.conv.convolution import Affine, Convolution

INTERPRET = jax.default_backend() != "gpu"
LAYERS = [(16, 16, 1), (32, 32, 1), (16, 32, 2), (32, 64, 2)]
IN_BLOCKS = [(16, 16, 1, 4), (16, 32, 2, 4)]
EXACT = 1e-5 if INTERPRET else 1e-2  # compiled float32 products are TF32


def operands(size, layer, dtype=jnp.float32, count=3):
    (height, width), (channels, outputs, stride) = size, layer
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    maps = (count, height * width, channels)
    out = (count, height * width // stride**2, outputs)
    x, dy, before, after = (draw(*s).astype(dtype) for s in (maps, out, maps, out))
    w = (draw(9, channels, outputs) / 10).astype(dtype)
    affine = Affine(*(draw(count, channels) for _ in range(3)), 1 + draw(count, channels) ** 2)
    gamma = np.linspace(0.5, 1.5, channels, dtype=np.float32)
    return x, dy, w, affine, gamma, before, after


def assert_equal(found, wanted, limit=2e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(part, np.float64) for part in (a, b))
        assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b)


def cells():
    """Every stride with every map; widths, and what goes along, take turns or the full run."""
    for i, layer in enumerate(LAYERS):
        for j, (size, rows) in enumerate([((4, 8), 1), ((8, 4), 2), ((2, 2), 2)]):
            for along in (True, False):
                kept = i % 2 == j % 2 and along == ((i // 2 + j) % 2 == 0)
                marks = () if kept else pytest.mark.full
                yield pytest.param(layer, size, rows, along, marks=marks)


@pytest.mark.skipif(not INTERPRET, reason="compiled products are of tensor cores")
@pytest.mark.parametrize(("layer", "size", "rows", "along"), list(cells()))
def test_both_forms_are_equal(layer, size, rows, along):
    """With an activation and residuals along, and without."""
    conv = Convolution(*size, layer[2], groups=8, interpret=True)
    form = conv._replace(activate=along)

    @jax.jit
    def both(x, dy, w, affine, gamma, before, after):
        (a, b), residual = affine[:2], after if along else None
        tile = tiles.WeightPatches(rows, 1 if along else 3, 2, 1, 3)
        arrays = (dy, w, x, affine, gamma, before if along else None)
        by_patches = (
            patches.forward(form, tiles.ForwardPatches(rows, 4, 1, 1), x, a, b, w, residual),
            patches.weight_gradient(form, tile, x, a, b, dy),
            patches.input_gradient(conv, tiles.InputPatches(rows, 1, 3), *arrays),
        )
        by_taps = (
            taps.forward(form, tiles.ForwardTaps(4, 1, 2), x, a, b, w, residual),
            taps.weight_gradient(form, tiles.WeightTaps(3, 4, 3, 1, 3), x, a, b, dy),
            taps.input_gradient(conv, tiles.InputTaps(1), *arrays),
        )
        return by_patches, by_taps

    assert_equal(*both(*operands(size, layer)))


@pytest.mark.parametrize("layer", LAYERS)
def test_narrow_is_the_transpose_of_widen(layer):
    channels, outputs, stride = layer
    rng = np.random.default_rng(0)
    w = rng.normal(size=(9, channels, outputs)).astype(np.float32)
    for cut in (patching.output_patches(stride, 2), patching.input_patches(stride, 1)):
        shape = jax.eval_shape(lambda w, cut=cut: patching.widen(w, cut), w).shape
        grown = rng.normal(size=shape).astype(np.float32)

        @jax.jit
        def both(w, grown, cut=cut):
            found = patching.narrow(grown.swapaxes(1, 2), cut).swapaxes(1, 2)
            return found, *jax.vjp(lambda w: patching.widen(w, cut), w)[1](grown)

        np.testing.assert_allclose(*both(w, grown), rtol=1e-5, atol=1e-5)


def test_every_tap_of_every_position_is_in_its_window():
    for rows, (name, stride) in itertools.product((1, 2), itertools.product(("out", "in"), (1, 2))):
        cut = (patching.output_patches if name == "out" else patching.input_patches)(stride, rows)
        found = np.moveaxis(cut.taps, (2, 3), (0, 1)).reshape(cut.area, -1)
        # A position of a map with stride 1, or an output, has all nine taps; an input of stride 2
        # those that lead to it.
        due = [list(range(9))] * cut.area
        if name == "in" and stride == 2:
            due = [[4], [3, 5], [1, 7], [0, 2, 6, 8]]
        assert [sorted(row[row < 9]) for row in found] == due


def by_xla(size, layer, x, dy, w, affine, gamma, before, after):
    """Result, its sums, weight gradient, input gradient and moments, from XLA's convolution."""
    (a, b, mean, rstd), gamma = (v[:, None] for v in affine), gamma[None, None]
    wide, dtype, members = x.astype(jnp.float32), x.dtype, layer[0] // 8
    u = jax.nn.relu(a * wide + b).astype(dtype)

    def convolve(u, w):
        return jax.lax.conv_general_dilated(
            u.reshape(len(u), *size, -1).astype(jnp.float32),
            w.reshape(3, 3, *w.shape[1:]).astype(jnp.float32),
            (layer[2],) * 2,
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        ).reshape(dy.shape)

    def over_groups(v):
        means = v.reshape(len(v), -1, 8, members).mean((1, 3))
        return jnp.repeat(means, members, axis=1)[:, None]

    y, back = jax.vjp(convolve, u, w)
    y = (y + after.astype(jnp.float32)).astype(dtype)
    dh, dw = back(dy.astype(jnp.float32))
    du = jnp.where(a * wide + b > 0, dh.astype(jnp.float32), 0.0)
    normal = (wide - mean) * rstd
    first, second = over_groups(gamma * du), over_groups(gamma * du * normal)
    dx = rstd * (gamma * du - first - normal * second)
    dx = (dx + before.astype(jnp.float32)).astype(dtype)
    wide = y.astype(jnp.float32)
    sums = jnp.stack([wide.sum(1), (wide**2).sum(1)], axis=1)
    return y, sums, dw.astype(jnp.float32), dx, jnp.stack([(du * normal).sum(1), du.sum(1)], axis=1)


def assert_as_by_xla(size, layer, dtype):
    conv = Convolution(*size, layer[2], groups=8, interpret=INTERPRET)

    @jax.jit
    def both(*arrays):
        x, dy, w, affine, gamma, before, after = arrays
        a, b = affine[:2]
        by_kernels = (
            *passes.forward(conv, x, a, b, w, after),
            passes.weight_gradient(conv, x, a, b, dy),
            *passes.input_gradient(conv, dy, w, x, affine, gamma, before),
        )
        return by_kernels, by_xla(size, layer, *arrays)

    assert_equal(*both(*operands(size, layer, dtype)), 1e-2 if dtype == jnp.bfloat16 else EXACT)


# The maps of a ResNet of width 16 on images of 16 x 16 and of 32 x 32.
@pytest.mark.parametrize("side", [16] if INTERPRET else [16, 32])
@pytest.mark.parametrize(
    "key",
    # Interpreted, the dtypes of the layers take turns; the full run has both. Two layers have
    # theirs in float32 in test_block.py, on maps of 8 x 8.
    [
        pytest.param(
            key,
            marks=pytest.mark.full if INTERPRET and (index % 2 or key in IN_BLOCKS) else (),
        )
        for index, key in enumerate(sorted(tiles.TIMED, key=lambda key: (key[3], key)))
    ],
)
def test_the_chosen_tiles_against_xla(key, side):
    side //= key[0] // 16
    assert_as_by_xla((side, side), key[:3], jnp.bfloat16 if key[3] == 2 else jnp.float32)


SMALL_MAPS = [
    ((8, 8), (16, 16, 1), True),
    ((2, 32), (16, 16, 1), True),
    ((1, 64), (16, 16, 1), False),
    ((8, 4), (16, 16, 1), False),
    ((4, 16), (16, 32, 2), True),
    ((4, 8), (16, 32, 2), False),
    ((16, 16), (64, 16, 1), False),
]


@pytest.mark.parametrize(("size", "layer", "patches"), SMALL_MAPS)
def test_small_maps_and_other_layers_go_by_taps(size, layer, patches):
    channels, outputs, _ = layer
    chosen = tiles.choose(*layer, 4, size)
    assert isinstance(chosen.input_gradient, tiles.InputPatches) == patches
    if not patches:
        assert chosen == tiles.OTHERS[max(channels, outputs)]


@pytest.mark.skipif(not INTERPRET, reason="the layers of a ResNet are enough, compiled")
@pytest.mark.parametrize(
    ("size", "layer"),
    [
        # Every tile has one of its maps here or in test_block.py; the full run has all.
        pytest.param(
            size, layer, marks=pytest.mark.full if size in ((8, 8), (8, 4), (4, 16)) else ()
        )
        for size, layer, _ in SMALL_MAPS[:-1]
    ],
)
def test_small_maps_against_xla(size, layer):
    assert_as_by_xla(size, layer, jnp.float32)


def test_images_per_program():
    assert tiles.images_per_program(8, 32, 1) == 8
    assert tiles.images_per_program(8, 6, 1) == 6
    assert tiles.images_per_program(4, 7, 1) == 1
    # A batch of one instance is spread over more programs.
    assert tiles.images_per_program(8, 128, 1) == 1
    assert tiles.images_per_program(8, 2048, 2) == 8

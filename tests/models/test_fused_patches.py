"""The kernels by patches against those by taps, and which of the two forms a size takes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models import (
    fused_conv,
    fused_cuts as cuts,
    fused_patches as patches,
    fused_taps as taps,
    fused_tiles as tiles,
)

INTERPRET = jax.default_backend() != "gpu"
LAYERS = [(16, 16, 1), (32, 32, 1), (16, 32, 2), (32, 64, 2)]


def operands(size, layer, dtype=jnp.float32, count=3):
    (height, width), (channels, outputs, stride) = size, layer
    keys = iter(jax.random.split(jax.random.key(0), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    maps = (count, height * width, channels)
    out = (count, height * width // stride**2, outputs)
    x, dy, before, after = (draw(*s).astype(dtype) for s in (maps, out, maps, out))
    w = (draw(9, channels, outputs) / 10).astype(dtype)
    affine = tuple(draw(count, channels) for _ in range(3)) + (1 + draw(count, channels) ** 2,)
    return x, dy, w, affine, jnp.linspace(0.5, 1.5, channels), before, after


def assert_equal(found, wanted, limit=2e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert float(jnp.linalg.norm(a - b)) <= limit * float(jnp.linalg.norm(b))


@pytest.mark.skipif(not INTERPRET, reason="compiled products are of tensor cores")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("size", "rows"), [((4, 8), 1), ((8, 4), 2), ((2, 2), 2)])
def test_both_forms_are_equal(layer, size, rows):
    x, dy, w, affine, gamma, before, after = operands(size, layer)
    given = {"height": size[0], "width": size[1], "stride": layer[2], "interpret": True}
    a, b = affine[:2]
    for activate, residual in ((True, after), (False, None)):
        more = given | {"activate": activate}
        found = patches.forward(x, a, b, w, residual, tiles.ForwardPatches(rows, 4, 1, 1), **more)
        assert_equal(found, taps.forward(x, a, b, w, residual, tiles.ForwardTaps(4, 1, 2), **more))
        wanted = taps.weight_gradient(x, a, b, dy, tiles.WeightTaps(3, 4, 9, 1, 3), **more)
        window = cuts.of_inputs(layer[2], rows).window[0]
        for images, runs in ((1, 1), (3, window)):
            tile = tiles.WeightPatches(rows, images, 2, runs, 1, 3)
            assert_equal(patches.weight_gradient(x, a, b, dy, tile, **more), wanted)
    more = given | {"groups": 8}
    for residual in (before, None):
        wanted = taps.input_gradient(dy, w, x, affine, gamma, residual, tiles.InputTaps(1), **more)
        tile = tiles.InputPatches(rows, 1, 3)
        found = patches.input_gradient(dy, w, x, affine, gamma, residual, tile, **more)
        assert_equal(found, wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_narrow_is_the_transpose_of_widen(layer):
    channels, outputs, stride = layer
    for cut in (cuts.of_outputs(stride, 2), cuts.of_inputs(stride, 1)):
        w = jax.random.normal(jax.random.key(0), (9, channels, outputs))
        wide, back = jax.vjp(lambda w, cut=cut: cuts.widen(w, cut), w)
        grown = jax.random.normal(jax.random.key(1), wide.shape)
        found = cuts.narrow(grown.swapaxes(1, 2), cut).swapaxes(1, 2)
        np.testing.assert_allclose(found, back(grown)[0], rtol=1e-5, atol=1e-5)


def test_every_tap_of_every_place_is_in_its_window():
    for rows, (name, stride) in itertools.product((1, 2), itertools.product(("out", "in"), (1, 2))):
        cut = (cuts.of_outputs if name == "out" else cuts.of_inputs)(stride, rows)
        found = np.moveaxis(cut.taps, (2, 3), (0, 1)).reshape(cut.places, -1)
        # A place of a map with stride 1, or an output, has all nine taps; an input of stride 2
        # those that lead to it.
        due = [list(range(9))] * cut.places
        if name == "in" and stride == 2:
            due = [[4], [3, 5], [1, 7], [0, 2, 6, 8]]
        assert [sorted(row[row < 9]) for row in found] == due


# The maps of a ResNet of width 16 on images of 16 x 16 and of 32 x 32.
@pytest.mark.parametrize("side", [16] if INTERPRET else [16, 32])
@pytest.mark.parametrize("key", sorted(tiles.TIMED))
def test_the_chosen_tiles(key, side):
    channels, outputs, stride, itemsize = key
    side //= channels // 16
    x, dy, w, affine, gamma, before, after = operands(
        (side, side), key[:3], jnp.bfloat16 if itemsize == 2 else jnp.float32
    )
    given = {"height": side, "width": side, "stride": stride, "interpret": INTERPRET}
    a, b = affine[:2]
    plain = given | {"activate": True}
    other, limit = tiles.OTHERS[outputs], 1e-2
    found = fused_conv.forward(x, a, b, w, after, **given)
    assert_equal(found, taps.forward(x, a, b, w, after, other.forward, **plain), limit)
    found = fused_conv.weight_gradient(x, a, b, dy, **given)
    wanted = taps.weight_gradient(x, a, b, dy, other.weight_gradient, **plain)
    assert_equal(found, wanted, limit)
    found = fused_conv.input_gradient(dy, w, x, affine, gamma, before, groups=8, **given)
    wanted = taps.input_gradient(
        dy, w, x, affine, gamma, before, other.input_gradient, groups=8, **given
    )
    assert_equal(found, wanted, limit)


def test_maps_of_one_row_go_by_taps():
    assert tiles.choose(16, 16, 1, 2, (2, 16)) == tiles.TIMED[16, 16, 1, 2]
    for size in ((1, 16), (16, 1)):
        assert tiles.choose(16, 16, 1, 2, size) == tiles.OTHERS[16]
    assert tiles.choose(64, 16, 1, 2, (16, 16)) == tiles.OTHERS[64]
    row = {"height": 1, "width": 16, "interpret": INTERPRET}
    if INTERPRET:
        x, dy, w, affine, *_ = operands((1, 16), (16, 16, 1), jnp.bfloat16)
        y, _ = fused_conv.forward(x, *affine[:2], w, None, **row)
        assert y.shape == dy.shape


def test_images_per_program():
    assert tiles.images_per_program(8, 32, 1) == 8
    assert tiles.images_per_program(8, 6, 1) == 6
    assert tiles.images_per_program(4, 7, 1) == 1
    # A batch of one instance is spread over more programs.
    assert tiles.images_per_program(8, 128, 1) == 1
    assert tiles.images_per_program(8, 2048, 2) == 8

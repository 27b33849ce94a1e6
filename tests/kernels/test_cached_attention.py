"""Attention beside a cache: the kernel against products under a mask.

On a CPU the kernel is interpreted; on a GPU it is compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels.attention import cached, limits, sparse_kernel
from ttt_jax.kernels.attention.sight import blocks_of

WINDOW, SINKS = 40, 3


def operands(tokens, slots, *, heads=6, kv_heads=2, size=16, batch=2, documents=3, dtype=None):
    """Query, key, value, held keys and values, and a cotangent, of every document."""
    rng = np.random.default_rng(0)
    shape = documents, batch
    make = lambda count, heads: rng.normal(size=(*shape, count, heads, size))  # noqa: E731
    arrays = (
        make(tokens, heads),
        make(tokens, kv_heads),
        make(tokens, kv_heads),
        make(slots, kv_heads),
        make(slots, kv_heads),
        make(tokens, heads),
    )
    return [jnp.asarray(array, dtype or jnp.float32) for array in arrays]


def reach_of(tokens, slots, *, begin, batch=2, documents=3):
    """Positions of a chunk from ``begin`` on, and of a ring that holds what was before."""
    positions = np.broadcast_to(begin + np.arange(tokens), (documents, batch, tokens)).copy()
    positions[1, :, -5:] = -1
    held = np.full(slots, -1)
    for position in range(begin):
        ring = SINKS + (position - SINKS) % (slots - SINKS)
        held[position if position < SINKS else ring] = position
    held = np.broadcast_to(held, (documents, batch, slots)).copy()
    held[2, 0, :10] = -1
    return positions.astype(np.int32), held.astype(np.int32)


def results(arrays, positions, held, form, window=WINDOW):
    """By document: the result, and the gradients of query, key and value."""
    scale = arrays[0].shape[-1] ** -0.5

    def document(query, key, value, held_key, held_value, dout, positions, held):
        reach = cached.Reach(positions, held, jnp.int32(window), jnp.int32(SINKS))

        def attend(query, key, value):
            if form == "kernel":
                sight = cached.sight_of(reach)
                return sparse_kernel.attend(scale, query, key, value, held_key, held_value, sight)
            return cached.attend_cached(query, key, value, (held_key, held_value), reach, form=form)

        out, backward = jax.vjp(attend, query, key, value)
        return out, *backward(dout)

    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(jax.vmap(document))(*arrays, positions, held))


def seen_rows(positions):
    return positions >= 0


@pytest.mark.parametrize(
    ("tokens", "slots", "begin"), [(16, 60, 0), (32, 70, 96), (96, 140, 200), (64, 128, 64)]
)
def test_the_kernel_is_attention_under_the_mask(tokens, slots, begin):
    assert limits.fits_sparse(tokens, 16)
    arrays = operands(tokens, slots)
    positions, held = reach_of(tokens, slots, begin=begin)
    # The cotangent of a token that sees nothing is zero, as its loss has no weight.
    arrays[-1] = arrays[-1] * seen_rows(positions)[..., None, None]
    ours, plain = (results(arrays, positions, held, form) for form in ("kernel", "xla"))
    for kernel, wanted in zip(ours, plain, strict=True):
        rows = seen_rows(positions)
        np.testing.assert_allclose(kernel[rows], wanted[rows], atol=3e-5)
        assert np.isfinite(kernel).all()


def test_a_window_wider_than_all_sees_all():
    """Blocks that are seen wholly have no mask: result and gradients."""
    arrays = operands(128, 256)
    positions, held = reach_of(128, 256, begin=256)
    rows = seen_rows(positions)
    arrays[-1] = arrays[-1] * rows[..., None, None]
    sight = cached.sight_of(
        cached.Reach(positions[0], held[0], jnp.int32(1 << 30), jnp.int32(SINKS))
    )
    blocks = blocks_of(sight, sparse_kernel.FORWARD)
    assert int(blocks.whole.min()) > 0
    ours, plain = (results(arrays, positions, held, form, 1 << 30) for form in ("kernel", "xla"))
    for kernel, wanted in zip(ours, plain, strict=True):
        np.testing.assert_allclose(kernel[rows], wanted[rows], atol=3e-5)
    narrow = results(arrays, positions, held, "kernel")
    assert np.abs(narrow[0][rows] - ours[0][rows]).max() > 1e-2


def test_the_kernel_rounds_as_the_products_do():
    positions, held = reach_of(32, 64, begin=70)
    rows = seen_rows(positions)
    exact = results(operands(32, 64), positions, held, "xla")
    narrow = operands(32, 64, dtype=jnp.bfloat16)
    for form in ("kernel", "xla"):
        ours = results(narrow, positions, held, form)[0]
        assert ours.dtype == jnp.bfloat16
        error = ours.astype(np.float32)[rows] - exact[0][rows]
        assert 1e-4 < np.linalg.norm(error) / np.linalg.norm(exact[0][rows]) < 1e-2


def test_blocks_that_nothing_sees_are_not_read():
    """NaN in slots that no query sees, in blocks of their own, reach nothing."""
    tokens, slots = 64, 64 * 4
    arrays = operands(tokens, slots)
    positions, held = reach_of(tokens, slots, begin=100)
    spoiled = [array.at[:, :, 128:].set(jnp.nan) for array in arrays[3:5]]
    arrays[-1] = arrays[-1] * seen_rows(positions)[..., None, None]
    whole = results(arrays, positions, held, "kernel")
    rows = seen_rows(positions)
    for kernel, wanted in zip(
        results([*arrays[:3], *spoiled, arrays[-1]], positions, held, "kernel"), whole, strict=True
    ):
        np.testing.assert_array_equal(kernel[rows], wanted[rows])


def test_no_gradient_goes_to_the_cache():
    arrays = [array[0] for array in operands(16, 32)]
    positions, held = (each[0] for each in reach_of(16, 32, begin=32))
    reach = cached.Reach(positions, held, jnp.int32(WINDOW), jnp.int32(SINKS))
    for form in ("kernel", "xla"):

        def total(held, form=form):
            call = cached.attend_cached
            if form == "kernel":
                call = functools.partial(_as_attend_cached, sparse_kernel.attend)
            return call(*arrays[:3], held, reach, form="xla").sum()

        for leaf in jax.grad(total)(tuple(arrays[3:5])):
            np.testing.assert_array_equal(leaf, 0)


def test_gradients_go_to_the_cache_where_they_are_asked_for():
    """As of one softmax over held and own keys."""
    arrays = [array[0, :1] for array in operands(16, 32)]
    positions, held = (each[0, :1] for each in reach_of(16, 32, begin=32))
    reach = cached.Reach(positions, held, jnp.int32(WINDOW), jnp.int32(SINKS))

    def total(held):
        out = cached.attend_cached(*arrays[:3], held, reach, form="xla", held_gradients=True)
        return (out * arrays[5]).sum()

    def plain(held):
        keys, values = (
            jnp.repeat(jnp.concatenate(pair, 1)[0], 3, axis=1)
            for pair in zip(held, arrays[1:3], strict=True)
        )
        seen = cached.sees(positions[0][:, None], reach.held[0][None], WINDOW, SINKS)
        seen = jnp.concatenate([seen, jnp.tril(jnp.ones((16, 16), bool))], 1)
        scores = jnp.einsum("thd,shd->hts", arrays[0][0], keys) / 4
        weights = jax.nn.softmax(jnp.where(seen[None], scores, -jnp.inf))
        return (jnp.einsum("hts,shd->thd", weights, values) * arrays[5][0]).sum()

    given = tuple(arrays[3:5])
    for found, due in zip(jax.grad(total)(given), jax.grad(plain)(given), strict=True):
        assert np.abs(due).max() > 0.1
        np.testing.assert_allclose(found, due, atol=1e-5)


def _as_attend_cached(kernel, query, key, value, held, reach, form):
    del form
    return kernel(query.shape[-1] ** -0.5, query, key, value, *held, cached.sight_of(reach))

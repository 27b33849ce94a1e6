"""The Linen modules of the TTT layers over packed and padded sequences, and from a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.layers.test_linen import (
    BATCH,
    CHUNK,
    TOKENS,
    applied,
    every_backbone,
    every_kind,
    in_numpy,
    module,
    parameters,
    tokens,
)
from tests.layers.test_ttt import relative, to

# Of one row: segments of 9, 1 and 12 tokens; of the other 4 and 18.
SEGMENTS = np.stack([np.repeat([1, 0, 1], [9, 1, 12]), np.repeat([3, 2], [4, 18])])


@every_kind
@every_backbone
def test_packed_segments_are_separate_sequences(kind, backbone):
    x = tokens()
    out = applied(kind, backbone, x, segments=SEGMENTS.astype(np.int32))
    for row, marks, actual in zip(x, SEGMENTS, out, strict=True):
        bounds = np.flatnonzero(np.diff(marks)) + 1
        due = [in_numpy(kind, backbone, part) for part in np.split(row, bounds)]
        assert relative(actual, np.concatenate(due)) < 1e-12


@every_backbone
def test_padding_stands_before_or_after(backbone):
    """Of a sequence alone in its row, or of packed ones, whose numbers differ across it or not."""
    x = tokens()
    mask = np.ones((BATCH, TOKENS), bool)
    mask[0, :5] = mask[1, 13:] = False
    actual = applied("linear", backbone, x, mask=mask)
    for row, real, out in zip(x, mask, actual, strict=True):
        assert relative(out[real], in_numpy("linear", backbone, row[real])) < 1e-12
    mask[0, 16:19] = mask[1, 9] = False
    marks = np.stack([np.repeat([4, 5], [10, 12]), np.zeros(TOKENS)]).astype(np.int32)
    actual = applied("linear", backbone, x, mask=mask, segments=marks)
    for index, start, end in ((0, 5, 10), (0, 10, 16), (0, 19, 22), (1, 0, 9), (1, 10, 13)):
        due = in_numpy("linear", backbone, x[index, start:end])
        assert relative(actual[index, start:end], due) < 1e-12


@every_kind
@every_backbone
def test_a_prompt_and_single_tokens_are_the_whole(kind, backbone):
    """Prompts of 2 and 6 tokens in one batch, padded at their ends; then one token at a time."""
    x, lengths = tokens(), np.array([2, 6])
    net = module(kind, backbone)
    mask = np.arange(6)[None] < lengths[:, None]
    later = np.stack([row[n : n + 16] for row, n in zip(x, lengths, strict=True)], 1)[:, :, None]

    def read(p, prompt, rows):
        cache = net.apply(p, BATCH, method="empty_cache")
        first, cache = net.apply(p, prompt, mask=mask, cache=cache)

        def step(held, row):
            out, held = net.apply(p, row, cache=held)
            return held, out

        cache, rest = jax.lax.scan(step, cache, rows)
        return first, rest[:, :, 0], cache

    with jax.enable_x64(True):
        first, rest, cache = quickly(read, parameters(kind, backbone), x[:, :6], later)
    for index, length in enumerate(lengths):
        due = in_numpy(kind, backbone, x[index])
        actual = np.concatenate([first[index, :length], rest[:, index]])
        assert relative(actual, due[: length + 16]) < 1e-12
    np.testing.assert_array_equal(cache.memory.position, np.stack([(lengths + 16) % CHUNK] * 2, 1))


def test_a_sequence_that_has_ended_keeps_its_cache():
    net, params = module("linear", "mamba", jnp.float32), parameters("linear", "mamba")
    params, x = to(np.float32, params), to(np.float32, tokens(1))

    def read(p, x):
        cache = net.apply(p, BATCH, method="empty_cache")
        _, cache = net.apply(p, x, cache=cache)
        return cache, net.apply(p, x + 1, mask=np.array([[True], [False]]), cache=cache)[1]

    cache, after = quickly(read, params, x)
    for leaf, old in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(leaf[1], old[1])
    np.testing.assert_array_equal(after.memory.position, [[2, 2], [1, 1]])
    assert (after.taps[0] != cache.taps[0]).any()


@every_backbone
@pytest.mark.parametrize("what", [np.nan, np.inf, 1e30])
def test_whatever_stands_in_padding_changes_nothing(backbone, what):
    """Neither outputs nor gradients, without a cache and beside one."""
    x, net = tokens()[:, :8], module("linear", backbone)
    mask = np.ones((BATCH, 8), bool)
    mask[0, 5:] = mask[1, 7:] = False
    spoiled = np.where(mask[..., None], x, what)

    def total(p, x, caches):
        held = {"cache": net.apply(p, BATCH, method="empty_cache")} if caches else {}
        out = net.apply(p, x, mask=mask, **held)
        out = out[0] if caches else out
        return jnp.where(mask[..., None], jnp.sin(out), 0).sum(), out

    def both(p, x):
        return [jax.value_and_grad(total, (0, 1), has_aux=True)(p, x, c) for c in (False, True)]

    with jax.enable_x64(True):
        run = jax.jit(both)
        actual, due = (run(parameters("linear", backbone), rows) for rows in (spoiled, x))
    for (made, given), (wanted, expected) in zip(actual, due, strict=True):
        np.testing.assert_array_equal(made[1][mask], wanted[1][mask])
        jax.tree.map(np.testing.assert_array_equal, given[0], expected[0])
        np.testing.assert_array_equal(given[1][mask], expected[1][mask])


@every_kind
@every_backbone
def test_packed_gradients_are_those_of_separate_sequences(kind, backbone):
    x, net = tokens(), module(kind, backbone)
    bounds = [np.flatnonzero(np.diff(marks)) + 1 for marks in SEGMENTS]

    def packed(p, x):
        return jnp.sin(net.apply(p, x, segments=SEGMENTS.astype(np.int32))).sum()

    def apart(p, x):
        parts = [part for row, cut in zip(x, bounds, strict=True) for part in jnp.split(row, cut)]
        return sum(jnp.sin(net.apply(p, part[None])).sum() for part in parts)

    with jax.enable_x64(True):
        p = parameters(kind, backbone)
        actual, due = quickly(lambda: [jax.grad(f, (0, 1))(p, x) for f in (packed, apart)])
    for made, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(due), strict=True):
        assert relative(made, wanted) < 1e-11


@pytest.mark.parametrize("pair", [(72, 200, np.uint8), (5, 133, np.uint8), (-128, 0, np.int8)])
def test_segments_of_narrow_integers_stay_apart_beside_a_mask(pair):
    """Twice these numbers are one number, eight bits wide."""
    first, second, dtype = pair
    x = tokens()
    marks = np.repeat([first, second], [10, 12])[None].repeat(BATCH, 0)
    mask = np.ones((BATCH, TOKENS), bool)
    mask[:, -2:] = False
    actual = applied("linear", "transformer", x, mask=mask, segments=marks.astype(dtype))
    due = applied("linear", "transformer", x, mask=mask, segments=marks.astype(np.int32))
    np.testing.assert_array_equal(actual[mask], due[mask])
    one = applied("linear", "transformer", x, mask=mask)
    assert np.abs(due - one)[mask].max() > 1e-3


def test_a_cache_of_another_layer_is_refused():
    x = tokens()[:, :4]
    p, other = parameters("linear", "transformer"), parameters("mlp", "transformer")
    net, mlp = module("linear", "transformer"), module("mlp", "transformer")
    with jax.enable_x64(True):
        own, more = (net.apply(p, count, method="empty_cache") for count in (BATCH, 3))
        learned = mlp.apply(other, BATCH, method="empty_cache")
        for cache in (more, learned):
            with pytest.raises(ValueError, match="takes a cache of its own, weights of shapes"):
                net.apply(p, x, cache=cache)
        mask = np.array([[False, True, True, True]] * BATCH)
        with pytest.raises(ValueError, match="a mask with padding before a token"):
            net.apply(p, x, mask=mask, cache=own)
        with pytest.raises(ValueError, match="N and T at least 1"):
            net.apply(p, x[:0])

"""Attention over spans: the kernel against products under a mask, and against sequences apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels.attention import spans, sparse_kernel

HEADS, KV_HEADS, SIZE = 4, 2, 16
LENGTHS = ((20, 37, 60), (128,), (5, 6, 7, 100))
PREFIXES = ((7, 30, 1), (64,), (5, 2, 3, 99))


def packed(tokens=128):
    """First and last of rows with sequences of these lengths, the prefixes seen both ways."""
    first = np.zeros((len(LENGTHS), tokens), np.int32)
    last = np.full((len(LENGTHS), tokens), -1, np.int32)
    for row, (lengths, prefixes) in enumerate(zip(LENGTHS, PREFIXES, strict=True)):
        begin = 0
        for length, prefix in zip(lengths, prefixes, strict=True):
            span = np.arange(begin, begin + length)
            first[row, span] = begin
            last[row, span] = np.maximum(span, begin + prefix - 1)
            begin += length
    return first, last


def arrays(tokens=128):
    rng = np.random.default_rng(0)
    shapes = [(len(LENGTHS), tokens, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def results(form, query, key, value, dout, first, last, monkeypatch=None):
    def attend(*operands):
        return spans.attend_spans(*operands, first, last, form=form)

    with jax.default_matmul_precision("highest"):
        out, backward = jax.vjp(attend, query, key, value)
        return jax.device_get((out, *backward(dout)))


@pytest.fixture(scope="module")
def both():
    first, last = packed()
    inside = (last >= first)[..., None, None]
    *operands, dout = arrays()
    return [
        results(form, *operands, dout * inside, first, last) for form in ("fused", "xla")
    ], inside


def test_the_kernel_is_attention_under_the_mask(both):
    (kernel, plain), inside = both
    for ours, wanted in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(ours * inside, wanted * inside, atol=3e-5)
        assert np.isfinite(ours).all()


def test_sequences_of_a_row_do_not_see_each_other(both):
    """Each alone, as a dense softmax over its own keys."""
    query, key, value, _ = map(np.asarray, arrays())
    _first, last = packed()
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            span = slice(begin, begin + length)
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                scores = query[row, span, head] @ key[row, span, group].T / np.sqrt(SIZE)
                place = np.arange(begin, begin + length)
                scores = np.where(place[None] <= last[row, span, None], scores, -np.inf)
                weights = np.exp(scores - scores.max(1, keepdims=True))
                mixed = weights / weights.sum(1, keepdims=True) @ value[row, span, group]
                np.testing.assert_allclose(both[0][0][0][row, span, head], mixed, atol=3e-5)
            begin += length


def test_blocks_of_other_sequences_are_not_read():
    """NaN in a sequence, in blocks of its own, stays there."""
    first = np.repeat(np.array([[0, 64]], np.int32), 64, 1)
    last = np.arange(128, dtype=np.int32)[None]
    query, key, value, dout = (array[:1] for array in arrays())
    clean = results("fused", query, key, value, dout, first, last)
    key, value = (array.at[:, 64:].set(jnp.nan) for array in (key, value))
    spoiled = results("fused", query, key, value, dout.at[:, 64:].set(0), first, last)
    np.testing.assert_array_equal(spoiled[0][:, :64], clean[0][:, :64])
    assert np.isnan(spoiled[0][:, 64:]).all()
    assert sparse_kernel.FORWARD.keys == 64

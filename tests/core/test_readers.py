"""Readers against one forward pass over what they say they see."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import tiny_decoder as tiny
from ttt_jax import readers

from .compiling import quickly

CONTEXT, LENGTH = 5, 3
TOKENS = tiny.TOKENS[:2].reshape(2, -1)


def chunk(first, length=LENGTH, pads=0):
    """Tokens from a place on, and their positions; the last ``pads`` are padding."""
    positions = np.arange(first, first + length)
    positions = np.where(np.arange(length) < length - pads, positions, -1)
    tokens = TOKENS[:, first : first + length]
    return {"tokens": tokens, "positions": np.tile(positions, (2, 1)).astype(np.int32)}


def read_all(read, chunks):
    """Logits of one chunk after the other."""
    memory = read.init(2, TOKENS.shape[1], LENGTH)
    rows = []
    for inputs in chunks:
        logits, memory = read.read(tiny.PARAMS, memory, inputs)
        rows.append(logits)
    return rows


def forward(first, last):
    """One pass over a part of both documents, by the plain model function."""
    return quickly(lambda tokens: tiny.decode(tiny.PARAMS, tokens), TOKENS[:, first:last])


def test_recomputed_sees_its_context_and_no_more():
    read = readers.recomputed(tiny.decode, context=CONTEXT)
    found = quickly(lambda: read_all(read, [chunk(first) for first in range(0, 12, LENGTH)]))
    for index, logits in enumerate(found):
        first = index * LENGTH
        expected = forward(max(0, first - CONTEXT), first + LENGTH)[:, -LENGTH:]
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_chunk_read_again_replaces_itself():
    read = readers.recomputed(tiny.decode, context=CONTEXT)
    once, twice = quickly(
        lambda: [
            read_all(read, [chunk(0), chunk(3), *again, chunk(6)])[-1]
            for again in ([], [chunk(3), chunk(3)])
        ]
    )
    np.testing.assert_array_equal(once, twice)


def test_padding_is_seen_by_none_and_forgets_nothing():
    """A chunk that ends in padding, one that is nothing else, and then the document goes on."""
    read = readers.recomputed(tiny.decode, context=CONTEXT)
    whole = {name: np.full((2, LENGTH), -1, np.int32) for name in ("tokens", "positions")}
    whole["tokens"] = whole["tokens"] * 0
    found = quickly(lambda: read_all(read, [chunk(0), chunk(3, pads=2), whole, chunk(4)]))
    expected = forward(0, 7)
    np.testing.assert_allclose(found[1][:, 0], expected[:, 3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[-1], expected[:, 4:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vacant", [False, True])
def test_isolated_sees_its_chunk_alone(vacant):
    """Where the first place is vacant, no token sees what stands there."""
    inputs = chunk(4)
    if vacant:
        inputs["positions"] = np.tile(np.array([-1, 0, 1], np.int32), (2, 1))
    read = readers.isolated(tiny.decode)
    logits, memory = quickly(lambda: read.read(tiny.PARAMS, (), inputs))
    expected = forward(4 + vacant, 7)
    np.testing.assert_allclose(logits[:, int(vacant) :], expected, rtol=1e-5, atol=1e-6)
    assert memory == () and jnp.isfinite(logits).all()

"""Attention of one new token to a cache: the kernel, and XLA's sums, against a dense softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels.attention import decoding

LAYERS, COUNT, SLOTS, HEADS, SIZE = 3, 5, 150, 2, 16
# Nothing seen, one slot, a part of the first tile, into the third one, and from within the second.
BEGIN = jnp.array([0, 3, 0, 0, 70])
END = jnp.array([0, 4, 40, 150, 131])


def operands(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    token = [jnp.asarray(rng.normal(size=(COUNT, HEADS, SIZE)), dtype) for _ in range(3)]
    shape = (LAYERS, COUNT, SLOTS, HEADS, SIZE)
    return tuple(token), tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))


def dense(token, cache, layer, scale):
    query, key, value = (np.asarray(each, np.float64) for each in token)
    keys, values = (np.asarray(each, np.float64)[layer] for each in cache)
    out = np.zeros(query.shape)
    for row in range(COUNT):
        span = slice(int(BEGIN[row]), max(int(BEGIN[row]), int(END[row])))
        for head in range(HEADS):
            seen = np.concatenate([keys[row, span, head], key[row, None, head]])
            mixed = np.concatenate([values[row, span, head], value[row, None, head]])
            weights = np.exp(scale * seen @ query[row, head])
            out[row, head] = weights @ mixed / weights.sum()
    return out


@pytest.mark.parametrize("form", ["xla", "fused"])
def test_it_is_a_softmax_over_what_is_seen(form):
    token, cache = operands()
    run = jax.jit(
        lambda layer: decoding.attend_token(token, cache, layer, BEGIN, END, form=form, scale=0.7)
    )
    for layer in range(LAYERS):
        np.testing.assert_allclose(run(layer), dense(token, cache, layer, 0.7), atol=2e-6)


def test_the_scale_is_that_of_the_head_size_where_it_is_not_given():
    token, cache = operands()
    out = decoding.attend_token(token, cache, 1, BEGIN, END, form="fused")
    np.testing.assert_allclose(out, dense(token, cache, 1, SIZE**-0.5), atol=2e-6)


@pytest.mark.parametrize("form", ["xla", "fused"])
def test_slots_that_are_not_seen_have_no_weight(form):
    token, cache = operands()
    place = jnp.arange(SLOTS)[None]
    hidden = ((place < BEGIN[:, None]) | (place >= END[:, None]))[None, :, :, None, None]
    spoiled = tuple(jnp.where(hidden, jnp.nan, each) for each in cache)
    if form == "xla":  # A product with a weight of zero.
        spoiled = tuple(jnp.where(hidden, 1e6, each) for each in cache)
    outs = [
        decoding.attend_token(token, each, 0, BEGIN, END, form=form) for each in (cache, spoiled)
    ]
    np.testing.assert_array_equal(*outs)


def test_the_kernel_takes_16_bits():
    token, cache = operands(jnp.bfloat16)
    out = decoding.attend_token(token, cache, 2, BEGIN, END, form="fused")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32), dense(token, cache, 2, SIZE**-0.5), atol=0.02
    )


def test_caches_of_several_decoders_at_once_are_each_alone():
    made = [operands(seed=seed) for seed in range(3)]
    token, cache = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
    ends = jnp.stack([END, END - 1, jnp.minimum(END, 20)])

    def single(token, cache, end):
        return decoding.attend_token(token, cache, 1, BEGIN, end, form="fused")

    together = jax.jit(jax.vmap(single))(token, cache, ends)
    for number, (own, held) in enumerate(made):
        np.testing.assert_allclose(together[number], single(own, held, ends[number]), atol=1e-6)


@pytest.mark.parametrize("form", ["xla", "fused"])
def test_gradients_are_those_of_a_softmax_over_what_is_seen(form):
    """Written as a masked softmax over the slots and the token, for :func:`jax.grad`."""

    def masked(token, cache):
        keys, values = (
            jnp.concatenate([held[1], own[:, None]], 1)
            for held, own in zip(cache, token[1:], strict=True)
        )
        place = jnp.arange(SLOTS + 1)[None]
        seen = (place >= BEGIN[:, None]) & (place < END[:, None]) | (place == SLOTS)
        scores = jnp.einsum("nhd,nshd->nsh", token[0], keys) * SIZE**-0.5
        weights = jax.nn.softmax(jnp.where(seen[..., None], scores, -jnp.inf), axis=1)
        return jnp.einsum("nsh,nshd->nhd", weights, values)

    def attend(token, cache):
        return decoding.attend_token(token, cache, 1, BEGIN, END, form=form)

    given = operands()
    pull = jax.random.normal(jax.random.key(0), given[0][0].shape)
    with jax.default_matmul_precision("highest"):
        computed, due = (jax.vjp(function, *given)[1](pull) for function in (attend, masked))
    for left, right in zip(jax.tree.leaves(computed), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-6)
        assert np.asarray(right).any()

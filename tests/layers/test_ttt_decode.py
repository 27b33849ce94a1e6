"""Reading in parts and token by token: prefill of n and decoding of m are n + m."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.layers import formulas
from tests.layers.test_ttt import LAYERS, every_layer, relative, to
from ttt_jax import layers

TOKENS = 100


@pytest.fixture(scope="module", params=LAYERS)
def case(request):
    """Arguments, outputs and last state, and a program for every cut."""
    arguments = formulas.inputs(TOKENS, 16, LAYERS[request.param][1])
    q, k, v, gate, scale, state, norm = arguments

    @jax.jit
    def read(count):
        rows = (q, k, v, gate)
        cache = layers.ttt_cache(state)
        out, cache = layers.ttt_prefill(*rows, scale, cache, norm, length=count)

        def step(held, row):
            index, *token = row
            made, new = layers.ttt_decode(*token, scale, held, norm)
            # The tokens of the prompt are skipped.
            skip = index < count
            return jax.tree.map(lambda a, b: jnp.where(skip, a, b), held, new), made

        cache, rest = jax.lax.scan(step, cache, (jnp.arange(TOKENS), *map(jnp.asarray, rows)))
        return jnp.where((jnp.arange(TOKENS) < count)[:, None], out, rest), cache

    due, after = formulas.ttt(*arguments)
    return read, due, after


@pytest.mark.parametrize("prompt", [0, 1, 15, 16, 17, 31, 32, 33, 99, 100])
def test_a_prompt_and_single_tokens_are_the_whole(case, prompt):
    read, due, after = case
    with jax.enable_x64(True):
        out, cache = read(prompt)
    assert relative(out, due) < 1e-13
    assert relative(cache.weights, after[-1]) < 1e-13
    assert int(cache.position) == TOKENS % 16


@every_layer
@pytest.mark.parametrize(
    ("tokens", "dtype", "least"), [(1000, np.float64, 1e-11), (128, np.float32, 3e-6)]
)
def test_single_tokens_are_the_formula(name, tokens, dtype, least):
    """All of them, over a thousand, and in single precision."""
    arguments = formulas.inputs(tokens, 16, LAYERS[name][1])
    due, after = formulas.ttt(*arguments)

    def read(q, k, v, gate, scale, state, norm):
        def step(held, row):
            out, held = layers.ttt_decode(*row, scale, held, norm)
            return held, out

        cache, out = jax.lax.scan(step, layers.ttt_cache(state), (q, k, v, gate))
        return out, cache.weights

    with jax.enable_x64(dtype == np.float64):
        out, weights = quickly(read, *to(dtype, arguments))
    assert out.dtype == dtype
    assert relative(out, due) < least
    assert relative(weights, after[-1]) < least


@every_layer
def test_a_prompt_may_come_in_any_parts(name):
    _, depth = LAYERS[name]
    arguments = formulas.inputs(44, 8, depth, chunk=8)
    *rows, scale, state, norm = arguments
    due, after = formulas.ttt(*arguments)
    # Within a chunk, across one, and from the middle of one over several to a boundary.
    cuts = [0, 3, 12, 40, 44]

    def parts():
        cache, outs = layers.ttt_cache(state), []
        for start, end in itertools.pairwise(cuts):
            part = (leaf[start:end] for leaf in rows)
            out, cache = layers.ttt_prefill(*part, scale, cache, norm)
            outs.append(out)
        return jnp.concatenate(outs), cache

    with jax.enable_x64(True):
        out, cache = quickly(parts)
    assert relative(out, due) < 1e-13
    assert relative(cache.weights, after[-1]) < 1e-13
    assert int(cache.position) == 4


def test_padding_after_a_prompt_changes_nothing():
    """Of any values, nan among them."""
    *rows, scale, state, norm = to(np.float32, formulas.inputs(40, 8))
    cache = layers.ttt_cache(state)
    read = jax.jit(layers.ttt_prefill)
    for length in (0, 5, 16, 21):
        dirty = [leaf.at[length:].set(jnp.nan) for leaf in rows]
        out, after = read(*dirty, scale, cache, norm, length=length)
        clean, due = read(
            *(leaf.at[length:].set(7.0) for leaf in rows), scale, cache, norm, length=length
        )
        np.testing.assert_array_equal(out[:length], clean[:length])
        for leaf, other in zip(jax.tree.leaves(after), jax.tree.leaves(due), strict=True):
            np.testing.assert_array_equal(leaf, other)
        assert int(after.position) == length % 16


def test_prompts_of_several_lengths_are_mapped():
    *rows, scale, state, norm = formulas.inputs(40, 8)
    lengths = np.array([0, 9, 16, 40])

    def prompt(length):
        return layers.ttt_prefill(*rows, scale, layers.ttt_cache(state), norm, length=length)

    with jax.enable_x64(True):
        out, cache = quickly(jax.vmap(prompt), lengths)
    np.testing.assert_array_equal(cache.position, lengths % 16)
    for index, length in enumerate(lengths):
        due, after = formulas.ttt(*(leaf[:length] for leaf in rows), scale, state, norm)
        if length:
            assert relative(out[index, :length], due) < 1e-13
        weights = tuple(leaf[index] for leaf in cache.weights)
        assert relative(weights, after[-1] if after else state) < 1e-13


def test_a_cache_is_of_the_state():
    state = to(np.float32, formulas.inputs(1, 8, 2)[5])
    cache = layers.ttt_cache(state)
    assert jax.tree.structure(cache.sums) == jax.tree.structure(cache.weights)
    assert int(cache.position) == 0
    with pytest.raises(ValueError, match="state must have shapes"):
        layers.ttt_cache(state[:2])
    with pytest.raises(TypeError, match=r"Begin with layers.ttt_cache\(state\)"):
        layers.ttt_decode(*np.ones((3, 8)), 0.1, np.ones(16), state, (np.ones(8), np.ones(8)))
    with pytest.raises(ValueError, match="length must be an integer from 0 to T = 2"):
        layers.ttt_prefill(
            *np.ones((3, 2, 8)),
            np.ones(2),
            np.ones(16),
            cache,
            (np.ones(8), np.ones(8)),
            length=1.5,
        )

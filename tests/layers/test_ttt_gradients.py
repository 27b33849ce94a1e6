"""Outer gradients of the TTT layers: against differences, and of all forms against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.layers import formulas
from tests.layers.test_ttt import LAYERS, every_layer, relative
from ttt_jax import layers

TOKENS, WIDTH, CHUNK = 19, 6, 4
STEP = 1e-5
SEGMENTS = np.repeat([0, 1, 0, 3], [6, 3, 1, 9]).astype(np.int32)


def decoded(q, k, v, gate, scale, state, norm, name):
    """Some tokens one by one, and the rest from within a chunk on."""
    rows = (q, k, v, gate)

    def step(held, row):
        out, held = layers.ttt_decode(*row, scale, held, norm)
        return held, out

    cache, first = jax.lax.scan(step, layers.ttt_cache(state), tuple(leaf[:7] for leaf in rows))
    second, cache = layers.ttt_prefill(*(leaf[7:] for leaf in rows), scale, cache, norm)
    return jnp.concatenate([first, second]), cache.weights


WAYS = {
    "dual": lambda *a, name: LAYERS[name][0](*a, chunk_size=CHUNK),
    "dual, all kept": lambda *a, name: LAYERS[name][0](*a, chunk_size=CHUNK, remat=0),
    "primal": lambda *a, name: LAYERS[name][0](*a, chunk_size=CHUNK, form="primal"),
    "decoded": decoded,
    "packed": lambda *a, name: LAYERS[name][0](*a, chunk_size=CHUNK, segments=SEGMENTS),
    "packed, primal": lambda *a, name: LAYERS[name][0](
        *a, chunk_size=CHUNK, segments=SEGMENTS, form="primal"
    ),
}


def weighed(made):
    """A scalar: outputs and last state, weighed at random."""
    random = np.random.default_rng(1)
    return sum((leaf * random.normal(size=leaf.shape)).sum() for leaf in jax.tree.leaves(made))


def loss(way, name):
    return lambda *arguments: weighed(WAYS[way](*arguments, name=name))


@functools.cache
def gradients(way, name):
    arguments = formulas.inputs(TOKENS, WIDTH, LAYERS[name][1], CHUNK)
    with jax.enable_x64(True):
        return quickly(jax.grad(loss(way, name), argnums=range(7)), *arguments)


def check_differences(way, name, actual):
    """Of q, k, v, gate, scale, every weight, gamma and beta, each along a random direction."""
    arguments = formulas.inputs(TOKENS, WIDTH, LAYERS[name][1], CHUNK)
    leaves, structure = jax.tree.flatten(arguments)
    random = np.random.default_rng(2)
    directions = [random.normal(size=leaf.shape) for leaf in leaves]

    def changed(size):
        for index, (leaf, direction) in enumerate(zip(leaves, directions, strict=True)):
            moved = [*leaves[:index], leaf + size * direction, *leaves[index + 1 :]]
            yield jax.tree.unflatten(structure, moved)

    many = jax.tree.map(lambda *same: np.stack(same), *changed(STEP), *changed(-STEP))
    with jax.enable_x64(True):
        values = quickly(jax.vmap(loss(way, name)), *many)
    plus, minus = values.reshape(2, -1)
    due = (plus - minus) / (2 * STEP)
    along = [(g * d).sum() for g, d in zip(jax.tree.leaves(actual), directions, strict=True)]
    assert np.abs(due).min() > 1e-3
    np.testing.assert_allclose(along, due, rtol=1e-6)


@every_layer
def test_gradients_are_differences(name):
    check_differences("dual", name, gradients("dual", name))


@every_layer
@pytest.mark.parametrize("way", ["dual, all kept", "primal", "decoded"])
def test_all_forms_have_one_gradient(way, name):
    assert relative(gradients(way, name), gradients("dual", name)) < 1e-12


def test_a_gradient_of_a_gradient():
    """Through the inner steps twice: a Hessian's product is symmetric."""
    arguments = formulas.inputs(9, 4, chunk=4)

    def value(q, k):
        return (layers.ttt_linear(q, k, *arguments[2:], chunk_size=4)[0] ** 2).sum()

    random = np.random.default_rng(3)
    a, b = random.normal(size=(2, 2, 9, 4))

    def along(direction):
        def slope(q, k):
            return jax.jvp(value, (q, k), tuple(direction))[1]

        return jax.grad(slope, argnums=(0, 1))(*arguments[:2])

    with jax.enable_x64(True):
        of_a, of_b = quickly(lambda: (along(a), along(b)))
    np.testing.assert_allclose(
        sum((x * y).sum() for x, y in zip(of_a, b, strict=True)),
        sum((x * y).sum() for x, y in zip(of_b, a, strict=True)),
        rtol=1e-10,
    )


def test_fewer_kept_states_need_less_memory():
    arguments = formulas.inputs(1024, 16)

    def memory(remat):
        def value(*a):
            return layers.ttt_linear(*a, remat=remat)[0].sum()

        compiled = jax.jit(jax.grad(value, argnums=(0, 1, 2))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8) < 0.5 * memory(0)

"""Packed segments in the fast-weight layer: outputs, states and gradients of separate sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.layers import formulas, test_conformance as conformance
from tests.layers.test_ttt import relative
from ttt_jax import layers
from ttt_jax.layers import memories

CHUNK = conformance.CHUNK
# A window of four tokens holds the end of a first segment; the next one has two chunks and a rest.
SEGMENTS = np.repeat([7, 3, 7], [1, 9, 4]).astype(np.int32)
OTHERS = (
    np.repeat([7, 3, 9, 3, 5], [2, 1, 5, 1, 5]).astype(np.int32),
    np.repeat([0, 1, 2, 3], [4, 8, 1, 1]).astype(np.int32),
    np.arange(14, dtype=np.int32),
    np.zeros(14, np.int32),
)
ROWS = [*conformance.TABLE, "TTT-Linear", "TTT-MLP"]


def row(name):
    """``(arrays, run)`` of a row: ``run(rows, rates, weights, segments=...)``."""
    if not name.startswith("TTT"):
        _, (given, run) = conformance.TABLE[name]
        if name == "LaCT":
            # With segments a rate for each token.
            (rows, rates, weights) = given
            given = (rows, rates._replace(momentum=conformance.MOMENTUM), weights)
        return given, run
    linear, width = name == "TTT-Linear", conformance.WIDTH
    *rows, gate, scale, state, norm = formulas.inputs(
        conformance.TOKENS, width, 1 if linear else 2, CHUNK
    )
    inner = memories.linear(bias=True) if linear else memories.mlp(2 * width)

    def run(rows, own, weights, **more):
        memory = memories.residual(inner, norm)
        return layers.fast_weight(
            *rows, own, layers.fast_state(weights), memory=memory, chunk_size=CHUNK, **more
        )

    return (tuple(rows), layers.Rates(gate, scale=scale), state), run


def apart(name, run, rows, rates, weights, segments):
    """The segments one by one, by the layer without segments."""
    bounds = [0, *np.flatnonzero(np.diff(segments)) + 1, len(segments)]
    outs = []
    for start, end in itertools.pairwise(bounds):
        part = jax.tree.map(lambda leaf, own=slice(start, end): leaf[own], (rows, rates))
        own = part[1]._replace(scale=rates.scale)
        if name == "LaCT":
            own = own._replace(momentum=own.momentum[::CHUNK])
        out, state = run(part[0], own, weights)
        outs.append(out)
    return jnp.concatenate(outs), state


@pytest.mark.parametrize("name", ROWS)
def test_packed_is_separate_forward_and_backward(name):
    given, run = row(name)
    weigh = np.random.default_rng(2).normal(size=(conformance.TOKENS, 16))

    def weighed(made):
        out, state = made
        total = sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(state.weights))
        return (out * weigh[:, : out.shape[1]]).sum() + total, made

    def packed(*given):
        return weighed(run(*given, segments=SEGMENTS))

    def separate(*given):
        return weighed(apart(name, run, *given, SEGMENTS))

    def both(function):
        return jax.grad(function, argnums=(0, 1, 2), has_aux=True)

    with jax.enable_x64(True):
        (gradients, (out, state)), (due, (outs, last)) = quickly(
            lambda *given: (both(packed)(*given), both(separate)(*given)), *given
        )
    assert relative(out, outs) < 1e-12
    assert relative(state.weights, last.weights) < 1e-12
    assert relative(gradients, due) < 1e-11
    for leaf, other in zip(
        jax.tree.leaves(state.optimizer), jax.tree.leaves(last.optimizer), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["delta rule", "Titans", "LaCT", "OmegaNet"])
def test_segments_of_all_kinds_may_be_traced(name):
    given, run = row(name)
    many = np.stack(OTHERS)
    with jax.enable_x64(True):
        out, state = quickly(
            jax.vmap(lambda s, given: run(*given, segments=s), (0, None)), many, given
        )
        due = [quickly(lambda *given, s=s: apart(name, run, *given, s), *given) for s in OTHERS]
    assert relative(out, np.stack([each[0] for each in due])) < 1e-12
    for place, (_, last) in enumerate(due):
        own = jax.tree.map(lambda leaf, place=place: leaf[place], state.weights)
        assert relative(own, last.weights) < 1e-12

"""Outer gradients through packed segments: those of separate sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tests.core.compiling import quickly
from tests.layers import formulas, test_ttt_gradients as whole
from tests.layers.test_ttt import every_layer, relative
from ttt_jax import layers


@every_layer
def test_gradients_are_differences_and_those_of_the_primal_form(name):
    actual = whole.gradients("packed", name)
    whole.check_differences("packed", name, actual)
    assert relative(actual, whole.gradients("packed, primal", name)) < 1e-12


def test_gradients_are_those_of_separate_sequences():
    arguments = formulas.inputs(whole.TOKENS, whole.WIDTH, 1, whole.CHUNK)
    bounds = [0, *np.flatnonzero(np.diff(whole.SEGMENTS)) + 1, whole.TOKENS]

    def apart(q, k, v, gate, *shared):
        outs = []
        for start, end in itertools.pairwise(bounds):
            rows = (leaf[start:end] for leaf in (q, k, v, gate))
            out, state = layers.ttt_linear(*rows, *shared, chunk_size=whole.CHUNK, remat=0)
            outs.append(out)
        return whole.weighed((jnp.concatenate(outs), state))

    with jax.enable_x64(True):
        due = quickly(jax.grad(apart, argnums=range(7)), *arguments)
    assert relative(whole.gradients("packed", "linear"), due) < 1e-12

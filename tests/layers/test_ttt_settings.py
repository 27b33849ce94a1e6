"""The TTT layers under settings of jax that users turn on for whole programs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from tests.core.compiling import quickly
from tests.layers import formulas
from tests.layers.test_ttt import to
from tests.methods.test_jax_settings import SETTINGS
from ttt_jax import layers

ARGUMENTS = to(np.float32, formulas.inputs(20, 8, 2, chunk=8))
SEGMENTS = np.repeat([0, 1], [11, 9]).astype(np.int32)
CHUNK = {"chunk_size": 8}


def decoded(q, k, v, gate, scale, state, norm):
    cache = layers.ttt_cache(state)
    first, cache = layers.ttt_prefill(q[:5], k[:5], v[:5], gate[:5], scale, cache, norm)
    return first, layers.ttt_decode(q[5], k[5], v[5], gate[5], scale, cache, norm)


WAYS = {
    "dual": lambda *a: layers.ttt_mlp(*a, **CHUNK),
    "primal": lambda *a: layers.ttt_mlp(*a, **CHUNK, form="primal"),
    "packed": lambda *a: layers.ttt_mlp(*a, **CHUNK, segments=SEGMENTS),
    "decoded": decoded,
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def known():
    return {way: quickly(run, *ARGUMENTS) for way, run in WAYS.items()}


@every_way
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_nothing(known, setting, way):
    with SETTINGS[setting]():
        actual = quickly(lambda *a: WAYS[way](*a), *ARGUMENTS)
    for leaf, due in zip(jax.tree.leaves(actual), jax.tree.leaves(known[way]), strict=True):
        assert leaf.dtype == due.dtype
        np.testing.assert_allclose(leaf, due, rtol=1e-5, atol=1e-6)


def test_operands_of_16_bits_under_strict_promotion():
    narrow = (*to(jnp.bfloat16, ARGUMENTS[:3]), *ARGUMENTS[3:])
    with SETTINGS["strict_promotion"]():
        out, state = jax.eval_shape(WAYS["packed"], *narrow)
    assert out.dtype == jnp.bfloat16 and state[0].dtype == np.float32


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@every_way
def test_a_shard_map_of_the_callers_own(known, way):
    """Sequences over devices; scale, state and norm on each."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    both = [jnp.stack([leaf, leaf[::-1]]) for leaf in ARGUMENTS[:4]]
    run = jax.vmap(WAYS[way], (0, 0, 0, 0, None, None, None))
    spread = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(*(P("d"),) * 4, P(), P(), P()),
        out_specs=P("d"),
        check_vma=True,
    )
    actual = quickly(spread, *both, *ARGUMENTS[4:])
    for leaf, due in zip(jax.tree.leaves(actual), jax.tree.leaves(known[way]), strict=True):
        np.testing.assert_allclose(leaf[0], due, rtol=1e-5, atol=1e-6)


def test_the_functions_need_no_flax():
    script = """
import sys
sys.modules["flax"] = None
import ttt_jax
assert "ttt_jax.layers" not in sys.modules
ttt_jax.layers.ttt_linear
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr

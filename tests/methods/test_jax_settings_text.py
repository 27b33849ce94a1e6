"""Methods over documents under settings of jax that users turn on for whole programs.

64 bits, strict promotion of types, ``jax_debug_nans`` and a ``shard_map`` of the caller's own.
``make test-full`` has all methods; ``make test`` one.
"""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import ttt_jax as ttt
from tests.core.compiling import quickly
from tests.methods import test_conformance_text as text, tiny_decoder as tiny
from tests.methods.test_jax_settings import SETTINGS

KEYS = ttt.sample_keys(jax.random.key(0), np.arange(2))
XS = {name: leaf[:2] for name, leaf in tiny.DOCUMENTS.items()}
cases = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "document_ttt" else pytest.mark.full) for n in text.METHODS],
)


def build(name):
    # Optax's adam does not work under strict promotion.
    more = {} if name in ("merged_adapters", "in_place_targets") else {"optimizer": optax.sgd(0.1)}
    return ttt.batched(text.make(name, **more))


@pytest.mark.parametrize("setting", SETTINGS)
@cases
def test_a_setting_changes_nothing(setting, name):
    expected = quickly(build(name), tiny.PARAMS, XS, KEYS)
    with SETTINGS[setting]():
        found = quickly(build(name), tiny.PARAMS, XS, KEYS)
    for output, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert output.dtype == other.dtype
        np.testing.assert_allclose(output, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@cases
def test_a_shard_map_of_the_callers_own(name):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    run = build(name)
    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P("d"), check_vma=True
    )
    expected = quickly(run, tiny.PARAMS, XS, KEYS)
    found = quickly(spread, tiny.PARAMS, XS, KEYS)
    assert float(ttt.audit.relative_distance(found, expected)) <= ttt.audit.tolerance(4)

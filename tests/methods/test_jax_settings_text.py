"""Methods over documents and prompts under settings of jax that users turn on for whole programs.

64 bits, strict promotion of types, ``jax_debug_nans`` and a ``shard_map`` of the caller's own.
``make test-full`` has all methods; ``make test`` one of each.
"""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import ttt_jax as ttt
from tests.core import small_reader
from tests.core.compiling import quickly
from tests.methods import (
    test_conformance_text as text,
    test_discover as discovery,
    test_few_shot_ttt as few_shot,
    test_ttrl as reinforcement,
    tiny_decoder as tiny,
)
from tests.methods.test_jax_settings import SETTINGS
from ttt_jax import generation

KEYS = ttt.sample_keys(jax.random.key(0), np.arange(2))
XS = {name: leaf[:2] for name, leaf in tiny.DOCUMENTS.items()}
PROMPTS = {
    "tokens": np.array([[1, 2, 3], [4, 5, 0]], np.int32),
    "mask": np.array([[1, 1, 1], [1, 1, 0]], bool),
}


def first(xs):
    return jax.tree.map(lambda leaf: leaf[:2], xs)


# What takes prompts or tasks: predictor, parameters, instances.
OTHERS = {
    "ttrl": lambda: (
        reinforcement.predictor(num_steps=2, optimizer=optax.sgd(0.1)),
        reinforcement.params(),
        first(reinforcement.groups()),
    ),
    "discover": lambda: (
        discovery.predictor(num_steps=2, optimizer=optax.sgd(0.1)),
        discovery.params(),
        first(discovery.problems()),
    ),
    "few_shot_ttt": lambda: (
        few_shot.predictor(num_steps=2, held_out=1, every=1, optimizer=optax.sgd(0.1)),
        few_shot.PARAMS,
        first(few_shot.XS),
    ),
    "generate": lambda: (
        generation.generate(
            small_reader.READER, num_tokens=3, sampler=generation.sample(0.9, 0.8), stop=(2,)
        ),
        small_reader.draw_params(),
        PROMPTS,
    ),
}
SHORT = ("document_ttt", "ttrl")
NAMES = (*text.METHODS, *OTHERS)
cases = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.full) for n in NAMES]
)


def build(name):
    """A batched predictor, parameters and instances."""
    if name in OTHERS:
        predict, params, xs = OTHERS[name]()
        return ttt.batched(predict), params, xs
    # Optax's adam does not work under strict promotion.
    more = {} if name in ("merged_adapters", "in_place_targets") else {"optimizer": optax.sgd(0.1)}
    return ttt.batched(text.make(name, **more)), tiny.PARAMS, XS


@pytest.mark.parametrize("setting", SETTINGS)
@cases
def test_a_setting_changes_nothing(setting, name):
    run, params, xs = build(name)
    expected = quickly(run, params, xs, KEYS)
    with SETTINGS[setting]():
        found = quickly(build(name)[0], params, xs, KEYS)
    for output, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert output.dtype == other.dtype
        np.testing.assert_allclose(output, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@cases
def test_a_shard_map_of_the_callers_own(name):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    run, params, xs = build(name)
    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P("d"), check_vma=True
    )
    expected = quickly(run, params, xs, KEYS)
    found = quickly(spread, params, xs, KEYS)
    assert float(ttt.audit.relative_distance(found, expected)) <= ttt.audit.tolerance(4)

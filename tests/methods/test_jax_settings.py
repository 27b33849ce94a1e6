"""Every predictor, stream and adapter under settings of jax that users turn on for whole programs.

Keys of the generator ``rbg``, 64 bits, ``jax_debug_nans``, strict promotion of types, and a
``shard_map`` of the caller's own: the result is that of ordinary settings, or a refusal.
``make test-full`` has all; ``make test`` one of each kind.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import ttt_jax as ttt
from tests.core import models
from tests.core.compiling import quickly
from tests.methods import test_conformance as one_instance, test_conformance_batch as batches
from ttt_jax import losses, resets, select

N = 4
PARAMS = models.make_params()
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(N))
IMAGES = models.make_images(N)
BATCHES = models.make_images(N, batch=4)
RATE = 0.1


def adapters():
    loss, sgd = losses.rotation(models.turn), optax.sgd(RATE)
    chosen = {"select": select.norm_affine()}
    gradient = ttt.gradient_adapter(loss, sgd, **chosen)
    yield "gradient", gradient
    yield "anchored", ttt.gradient_adapter(loss, sgd, anchor=0.3, **chosen)
    yield "stateful", ttt.gradient_adapter(models.moving_center(), sgd, **chosen)
    yield "sharpness_aware", ttt.sharpness_aware_adapter(loss, sgd, rho=0.05, **chosen)
    yield "filtered", ttt.filtered(gradient, lambda params, x, key: x.reshape(-1)[0] < 0)


def build(name):
    """The predictor of a name, and its instances."""
    apply = ttt.unbatched(models.classify)
    made = dict(adapters())
    if name in made:
        return ttt.episodic(made[name], apply, num_steps=2), IMAGES
    if name.startswith("stream_"):
        adapter = made[name.removeprefix("stream_")]
        stream = ttt.online(adapter, apply, num_steps=1, reset=resets.stochastic_restore(0.3))
        # One instance is a stream of two images.
        return ttt.unroll(stream), jnp.stack([IMAGES, IMAGES[::-1]], axis=1)
    if name == "statistics":
        adapter = ttt.statistics_adapter(models.batch_moments, momentum=0.9)
        return ttt.episodic(adapter, models.classify, num_steps=1), BATCHES
    if name == "vote":
        predict = ttt.episodic(made["gradient"], apply, num_steps=1)
        return ttt.vote(predict, 2, combine=lambda outputs: outputs.mean(axis=0)), IMAGES
    if name in one_instance.ADAPTING:
        return one_instance.ADAPTING[name](), IMAGES
    if name in batches.STREAMS:
        return ttt.episode(batches.STREAMS[name]()), batches.instances_of(name)[:N]
    predict, xs = one_instance.WITHOUT_GRADIENT[name]
    return predict, xs[:N]


CORE = (*dict(adapters()), "stream_gradient", "stream_stateful", "statistics", "vote")
NAMES = (*CORE, *one_instance.ADAPTING, *one_instance.WITHOUT_GRADIENT, *batches.STREAMS)
SHORT = ("gradient", "stream_gradient", "memo", "source", "tent")
cases = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.full) for n in NAMES]
)


def loop_distance(predict, xs):
    """Of the batch and of the loop, the outputs of the batch, and whether all are finite."""

    def measure(params, xs, keys):
        together = ttt.batched(predict, chunk_size=3)(params, xs, keys)
        alone = jax.lax.map(lambda pair: predict(params, *pair), (xs, keys))
        return ttt.audit.relative_distance(together, alone), together[0]

    return quickly(measure, PARAMS, xs, KEYS)


def num_steps(name):
    return 4 if name.startswith("stream_") else 2


SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "strict_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_nans": lambda: jax.debug_nans(True),
}


@pytest.mark.parametrize("setting", SETTINGS)
@cases
def test_a_setting_changes_nothing(setting, name):
    predict, xs = build(name)
    before = models.snapshot(PARAMS)
    _, expected = loop_distance(predict, xs)
    # Of adam itself: optax multiplies floats and integers.
    if setting == "strict_promotion" and name in ("tent", "pseudo_label"):
        pytest.skip("optax.adam does not work under strict promotion")
    with SETTINGS[setting](), jax.default_matmul_precision("highest"):
        predict, _ = build(name)
        distance, outputs = loop_distance(predict, xs)
    assert distance <= ttt.audit.tolerance(num_steps(name))
    for output, other in zip(*map(jax.tree.leaves, (outputs, expected)), strict=True):
        assert output.dtype == other.dtype
        limit = ttt.audit.tolerance(num_steps(name)) * max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(output, other, rtol=0, atol=limit)
    assert models.snapshot(PARAMS) == before


@cases
def test_keys_whose_draws_depend_on_the_batch_are_refused(name):
    predict, xs = build(name)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), N)
    with pytest.raises(ValueError, match="'rbg' draws from the first key of the batch"):
        jax.eval_shape(ttt.batched(predict), PARAMS, xs, keys)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@cases
def test_a_shard_map_of_the_callers_own(name):
    predict, xs = build(name)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    run = ttt.batched(predict)
    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P("d"), check_vma=True
    )
    expected = quickly(run, PARAMS, xs, KEYS)
    found = quickly(spread, PARAMS, xs, KEYS)
    size = float(ttt.audit.relative_distance(found, expected))
    assert size <= ttt.audit.tolerance(num_steps(name))


def test_a_spoiled_instance_under_debug_nans_is_the_users_to_see():
    predict, xs = build("gradient")
    with jax.debug_nans(True), contextlib.suppress(FloatingPointError):
        loop_distance(predict, xs.at[1].set(jnp.nan))
        pytest.fail("jax_debug_nans raises where a NaN is, as its user asked")

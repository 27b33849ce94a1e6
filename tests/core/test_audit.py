"""Audits find what they promise to find: each broken promise by name, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import _findings, audit, losses, predictors, select

from . import models
from .compiling import quickly

N = 5
PARAMS = {"w": np.array([0.5, -1.0, 1.5], np.float32)}
IMAGES = models.make_images(N)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(N))


def scale(params, images):
    """Three pixels, each with its weight, as logits."""
    return images[:, 0, :3, 0] * params["w"][None]


classify = ttt.unbatched(scale)


def entropy_adapter():
    return ttt.gradient_adapter(losses.entropy(scale), optax.sgd(0.1), select=select.everything())


def leaking(rule):
    """A predictor whose batched form is ``rule(outputs[N])``: what a careless model might do."""

    @jax.custom_batching.custom_vmap
    def predict(x):
        return x.sum()

    @predict.def_vmap
    def _(size, batched, x):
        return rule(x.sum(axis=(1, 2, 3))), True

    return lambda params, x, key: (predict(x), predictors.no_steps())


def failed(values, **options):
    names = {text: name for name, text in _findings.MEANING.items()}
    return {names[f.name] for f in audit.findings(values, **options) if not f.passed}


def broken(predictor):
    return failed(quickly(lambda *a: audit.differences(predictor, *a), PARAMS, IMAGES, KEYS))


def broken_adapter(adapter):
    def measure(*args):
        return audit.adapter_differences(adapter, classify, *args, num_steps=1)

    return failed(quickly(measure, PARAMS, IMAGES, KEYS))


class TestPredictors:
    def test_an_honest_one_passes(self):
        predict = ttt.episodic(entropy_adapter(), classify, num_steps=1)
        found = audit.check(predict, PARAMS, IMAGES, KEYS)
        assert len(found) == 6 and all(finding.passed for finding in found)

    def test_batch_statistics_leak(self):
        assert broken(leaking(lambda y: y - y.mean())) == {"loop", "order", "mates", "poison"}

    def test_a_place_in_the_batch_leaks(self):
        assert broken(leaking(lambda y: y + jnp.arange(len(y)))) == {"loop", "order"}

    def test_a_neighbor_leaks(self):
        assert broken(leaking(lambda y: jnp.roll(y, 1))) >= {"loop", "order", "mates", "poison"}

    def test_a_failure_that_is_not_reported(self):
        def predict(params, x, key):
            output, info = ttt.episodic(entropy_adapter(), classify, num_steps=1)(params, x, key)
            return output, info._replace(ok=jnp.ones((), bool))

        assert broken(predict) == {"poison_ok"}

    def test_a_filter_may_skip_the_poisoned_instance(self):
        adapter = ttt.filtered(entropy_adapter(), lambda params, x, key: x.max() < 10)
        assert broken(ttt.episodic(adapter, classify, num_steps=1)) == set()

    def test_changed_parameters(self):
        params = {"w": np.ones(3, np.float32)}

        def predict(traced, x, key):
            params["w"] += 1
            return x * traced["w"][0], predictors.no_steps()

        with pytest.raises(audit.AuditError, match="FAILED: the pristine parameters are unchang"):
            audit.check(predict, params, IMAGES, KEYS)

    def test_integer_instances_are_not_poisoned(self):
        predict = ttt.source(lambda params, x: x.sum())
        found = audit.check(predict, PARAMS, np.arange(12).reshape(4, 3), KEYS[:4])
        assert {finding.name for finding in found} == {
            _findings.MEANING[name] for name in ("loop", "order", "mates", "pristine")
        }

    def test_too_few_instances(self):
        with pytest.raises(ValueError, match="at least 3 instances to mix, got 2"):
            audit.check(ttt.source(classify), PARAMS, IMAGES[:2], KEYS[:2])


class TestAdapters:
    def test_an_honest_one_passes(self):
        found = audit.check_adapter(entropy_adapter(), classify, PARAMS, IMAGES, KEYS, num_steps=1)
        assert len(found) == 10 and all(finding.passed for finding in found)

    def test_failures_kept_silent(self):
        honest = entropy_adapter()

        def step(params, state, x, key):
            state, info = honest.step(params, state, x, key)
            return state, info._replace(finite=jnp.ones((), bool))

        assert broken_adapter(honest._replace(step=step)) == {"poison_ok", "stream_poison"}

    def test_one_that_does_nothing(self):
        lazy = ttt.filtered(entropy_adapter(), lambda params, x, key: jnp.isnan(x).any())
        assert broken_adapter(lazy) == {"updates"}


class TestReports:
    def test_the_error_lists_every_broken_promise(self):
        found = audit.findings({"mates": 0.5, "order": 1e-7, "zero_steps": 1e-7, "loop": np.nan})
        assert [finding.passed for finding in found] == [False, True, False, False]
        with pytest.raises(audit.AuditError) as caught:
            audit.require(found)
        lines = str(caught.value).splitlines()
        assert len(lines) == 3
        assert lines[0] == "FAILED: batch mates do not matter: difference 0.5, allowed 0"

    def test_distance(self):
        nan, inf = np.nan, np.inf
        one = {"a": np.float32([1.0, nan, inf]), "b": np.array([True, False])}
        distance = jax.jit(audit.distance)
        assert distance(one, one) == 0
        assert distance(one, {**one, "a": np.float32([1.5, nan, inf])}) == 0.5
        assert distance(one, {**one, "b": np.array([True, True])}) == 1
        assert distance(one, {**one, "a": np.float32([nan, nan, inf])}) > 1e30
        assert distance(one, {**one, "a": np.float32([1.0, nan, -inf])}) > 1e30

    def test_the_tolerance_grows_with_the_steps_and_the_results(self):
        assert [audit.tolerance(n) for n in (0, 1, 49)] == pytest.approx([1e-5, 2e-5, 5e-4])
        expected = {"loss": np.float32([0.5, np.nan]), "logits": np.float32([-200.0, np.inf])}
        assert audit.scale(expected) == 200
        assert audit.scale({"n": np.arange(4)}) == 0

        def moved(by):
            return {**expected, "loss": expected["loss"] + np.float32(by)}

        audit.require_close(moved(3e-3), expected)
        with pytest.raises(audit.AuditError, match=r"difference 2\.5e-05, allowed 2e-05"):
            audit.require_close(moved(5e-3), expected)
        audit.require_close(moved(5e-3), expected, num_steps=2)
        # No rounding makes another integer, nor a number of what is none.
        with pytest.raises(audit.AuditError):
            audit.require_close({"n": np.array([1, 2])}, {"n": np.array([1, 3])})
        with pytest.raises(audit.AuditError):
            audit.require_close({"loss": np.zeros(2)}, {"loss": np.float32([0.0, np.nan])})

    def test_everything_but(self):
        frozen = audit.everything_but(select.norm_affine())
        paths = select.describe(frozen, models.make_params()).paths
        assert "params/head/kernel" in paths and "params/norm/scale" not in paths


def add_one(params):
    params["w"] = params["w"] + 1.0
    return params


@pytest.mark.parametrize("kind", ["predictor", "adapter"])
def test_writing_into_parameters_outside_of_a_trace(kind):
    params = {"w": jnp.asarray(PARAMS["w"])}
    with pytest.raises(audit.AuditError, match="pristine parameters are unchanged"):
        if kind == "predictor":
            apply = ttt.unbatched(lambda params, images: scale(add_one(params), images))
            audit.check(ttt.source(apply), params, IMAGES, KEYS)
        else:
            adapter = entropy_adapter()
            writing = adapter._replace(init=lambda params: adapter.init(add_one(params)))
            audit.check_adapter(writing, classify, params, IMAGES, KEYS)

"""Arguments are checked against signatures: what is refused, and what must not be."""

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ttt_jax as ttt
from tests.core import models
from ttt_jax import diagnostics, losses, metrics, resets, select, views

ENTROPY = losses.entropy(models.classify)
PARAMS = models.make_params()
IMAGE = models.make_images(1)[0]
KEY = jax.random.key(0)


@pytest.mark.parametrize("batch", ["False", 2, None, np.array([True, False]), float("nan")])
def test_a_flag_is_true_or_false(batch):
    with pytest.raises(TypeError, match=r"batch must be True or False; got"):
        losses.entropy(models.classify, batch=batch)


def test_a_flag_of_numpy_is_one():
    assert losses.entropy(models.classify, batch=np.bool_(False))(PARAMS, IMAGE, KEY).shape == ()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (models.classify, r"function classify, which does not take 3 arguments"),
        (losses.entropy, r"call losses.entropy\(...\)"),
        (nn.Dense(3), "build it with models.from_linen"),
        (None, "got None"),
    ],
)
def test_a_function_takes_the_arguments_of_its_form(loss, words):
    with pytest.raises(TypeError, match=rf"loss must be a function .*{words}"):
        ttt.gradient_adapter(loss, optax.sgd(0.1), select=select.everything())


def test_functions_that_take_more_by_default_are_taken():
    def wide(params, inputs, train=False, *, scale=1.0):
        return models.classify(params, inputs)

    class Model:
        def __call__(self, params, inputs):
            return models.classify(params, inputs)

    forms = (wide, functools.partial(wide, scale=2.0), jax.jit(wide), Model(), lambda *a: wide(*a))
    values = [losses.entropy(form)(PARAMS, IMAGE, KEY) for form in forms]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda v: losses.pseudo_label(models.classify, threshold=v),
        lambda v: resets.stochastic_restore(v),
        lambda v: ttt.methods.sar(models.classify, reset_below=v),
        lambda v: ttt.gradient_adapter(ENTROPY, optax.sgd(0.1), select=select.biases(), anchor=v),
    ],
    ids=["threshold", "p", "reset_below", "anchor"],
)
def test_traced_and_mapped_hyperparameters_are_taken(build):
    def traced(value):
        build(value)
        return value

    jax.eval_shape(traced, jnp.float32(7.0))
    jax.eval_shape(jax.vmap(traced), jnp.ones(3))


@pytest.mark.parametrize("traced", [False, True])
def test_several_numbers_for_one_are_refused(traced):
    def build(value):
        losses.pseudo_label(models.classify, threshold=value)
        return value

    with pytest.raises(ValueError, match=r"threshold must be a number .*got an array of shape"):
        (jax.eval_shape if traced else lambda f, x: f(x))(build, jnp.ones(2))


def test_an_anchor_has_the_shapes_of_the_parameters():
    adapter = ttt.gradient_adapter(
        ENTROPY, optax.sgd(0.1), select=select.paths("params/norm/.*"), anchor=jnp.ones(2)
    )
    with pytest.raises(ValueError, match=r"anchor must have numbers.*got \(2,\) for .*\(5,\)"):
        adapter.step(PARAMS, adapter.init(PARAMS), IMAGE, KEY)


def test_lists_are_arrays():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert diagnostics.effective_classes(logits.tolist()) == diagnostics.effective_classes(logits)
    assert metrics.classes(logits.tolist()).tolist() == metrics.classes(logits).tolist()
    image = np.ones((8, 8, 3), np.float32)
    np.testing.assert_array_equal(
        views.image.flip(image.tolist(), KEY), views.image.flip(image, KEY)
    )
    keys = [ttt.sample_keys(KEY, ids) for ids in (range(3), (0, 1, 2), np.arange(3))]
    assert (keys[0] == keys[2]).all() and (keys[1] == keys[2]).all()


@pytest.mark.parametrize("params", [models.make_params, nn.Dense(3), "params", select.biases()])
def test_what_are_no_parameters(params):
    with pytest.raises(TypeError, match=r"params must be a pytree of arrays.*; got"):
        select.describe(select.everything(), params)


def test_any_pytree_of_arrays_is_taken_for_parameters():
    state = nnx.state(nnx.Linear(1, 2, rngs=nnx.Rngs(0)))
    assert select.describe(select.everything(), nnx.to_pure_dict(state)).num_elements == 4
    for params in ({"w": jnp.ones(3)}, [jnp.ones(3)], (jnp.ones(3),), jnp.ones(3)):
        assert select.describe(select.everything(), params).num_elements == 3
    ttt.source_statistics(lambda p, batch: batch.mean(0), None, _Data())


class _Data:
    split = "train"

    def __iter__(self):
        return iter([jnp.ones((2, 3))])


def test_labels_that_no_class_has():
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"labels from 0 to 2.*got 3"):
        diagnostics.harm(logits, logits, [0, 3])
    jax.eval_shape(lambda labels: diagnostics.harm(logits, logits, labels), jnp.array([0, 3]))


def test_checked_functions_keep_their_name_and_can_be_pickled():
    assert pickle.loads(pickle.dumps(losses.entropy)) is losses.entropy
    assert losses.entropy.__name__ == "entropy" and losses.entropy.__doc__.startswith("Shannon")


def test_a_missing_argument_has_pythons_words():
    with pytest.raises(TypeError, match=r"marginal_entropy\(\) missing 1 required keyword-only"):
        losses.marginal_entropy(models.classify, models.jitter)

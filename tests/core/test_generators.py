"""Keys whose draws under ``vmap`` depend on batch mates are refused wherever keys are mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import diagnostics, losses, methods, resets, select
from ttt_jax.methods import _batches

from . import models

PARAMS = models.make_params()
IMAGES = models.make_images(2)
THREEFRY = jax.random.key(0)


def one(params, image):
    return models.classify(params, image[None])[0]


def noisy(params, image, key):
    return one(params, image + jax.random.normal(key, image.shape)).max()


def adapter(loss=noisy):
    return ttt.gradient_adapter(loss, optax.sgd(0.1), select=select.everything())


def keys_of(generator):
    return jax.random.split(jax.random.key(0, impl=generator), 2)


def stream():
    return ttt.online(adapter(), one, reset=resets.never())


def alignment(keys):
    align = diagnostics.gradient_alignment(
        lambda params, x, label, key: noisy(params, x, key), noisy, select=select.everything()
    )
    return jax.vmap(align, in_axes=(None, 0, None, 0))(PARAMS, IMAGES, 0, keys)


def batched(predictor):
    return lambda keys: ttt.batched(predictor)(PARAMS, IMAGES, keys)


def of_loss(loss, batch=False):
    return lambda keys: loss(PARAMS, IMAGES if batch else IMAGES[0], keys[0])


def jitter(image, key):
    return models.jitter(image, key)


MAPPED = {
    "sample_keys": lambda keys: ttt.sample_keys(keys[0], [0, 1]),
    "batched": batched(ttt.episodic(adapter(), one, num_steps=1)),
    "batched stream": batched(ttt.episode(stream())),
    "own vmap": lambda keys: jax.vmap(
        ttt.episodic(adapter(), one, num_steps=1), in_axes=(None, 0, 0)
    )(PARAMS, IMAGES, keys),
    "unroll": lambda keys: ttt.unroll(stream())(PARAMS, IMAGES, keys[0]),
    "vote": lambda keys: ttt.vote(
        ttt.episodic(adapter(), one, num_steps=1), 2, combine=lambda outputs: outputs.mean(0)
    )(PARAMS, IMAGES[0], keys[0]),
    "augmented": lambda keys: ttt.augmented(one, jitter, num_views=2)(PARAMS, IMAGES[0], keys[0]),
    "views": of_loss(losses.marginal_entropy(models.classify, jitter, num_views=2)),
    "views in a batch": of_loss(
        losses.marginal_entropy(models.classify, jitter, num_views=1, batch=True), batch=True
    ),
    "copies in a batch": of_loss(losses.rotation(models.turn, copies=2, batch=True), batch=True),
    "contrastive": of_loss(losses.contrastive(models.features, jitter, batch=True), batch=True),
    "masks": of_loss(
        losses.masked_reconstruction(
            models.reconstruct, patch=models.PATCH, mask_ratio=0.5, num_masks=2
        )
    ),
    "over_batch": of_loss(losses.over_batch(noisy), batch=True),
    "one view each": lambda keys: _batches.one_view_each(jitter, IMAGES, keys[0]),
    "deyo": lambda keys: ttt.episode(methods.deyo(models.classify, patches=2))(
        PARAMS, IMAGES, keys[0]
    ),
    "alignment": alignment,
}


@pytest.mark.parametrize("name", MAPPED)
def test_a_generator_that_draws_from_the_first_key_is_refused(name):
    for generator in ("rbg", "unsafe_rbg"):
        with pytest.raises(ValueError, match=rf"generator '{generator}'.*threefry2x32"):
            jax.eval_shape(MAPPED[name], keys_of(generator))
    jax.eval_shape(MAPPED[name], keys_of("threefry2x32"))


def test_one_instance_may_use_any_generator():
    predict = ttt.episodic(
        adapter(losses.rotation(models.turn, copies=2)), one, num_steps=2, trace=True
    )
    for generator in ("rbg", "unsafe_rbg"):
        jax.eval_shape(predict, PARAMS, IMAGES[0], jax.random.key(0, impl=generator))


def test_views_of_the_source_do_not_depend_on_the_default_generator():
    measure = methods.actmad(models.classify, models.activations, augment=jitter).measure
    want = measure(PARAMS, IMAGES)
    with jax.default_prng_impl("rbg"):
        got = measure(PARAMS, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("ids", [[-1, 0], [0, 2**32]])
def test_known_ids_out_of_range_whatever_holds_them(ids):
    held = [np.array(ids)]
    if ids[0] < 0:
        held.append(jnp.array(ids))
    for array in held:
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, 2\*\*32\); got .*{ids[0]}"):
            ttt.sample_keys(THREEFRY, array)


def test_traced_ids_are_taken():
    assert jax.eval_shape(ttt.sample_keys, THREEFRY, jnp.array([1, 2])).shape == (2,)

"""What the losses refuse, and what they say: the rule, the value, the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from ttt_jax import losses

KEY = jax.random.key(3)
WEIGHTS = np.ones((36, 4), np.float32)
IMAGE = np.ones((6, 6, 1), np.float32)
IMAGES = np.ones((3, 6, 6, 1), np.float32)
LOGITS = np.ones((3, 3), np.float32)


def linear(params, images):
    return images.reshape(images.shape[0], -1) @ params


def identity(params, inputs):
    return inputs * params


def raises(*words):
    """A ValueError whose message holds the rule, the value and the fix."""
    return pytest.raises(ValueError, match=r"(?s)" + ".*".join(words))


def build_images(name, **options):
    if name == "rotation":
        return losses.rotation(linear, **options)
    return losses.masked_reconstruction(lambda p, x, keep: x, patch=3, **options)


class TestErrors:
    @pytest.mark.parametrize("name", ["rotation", "masked_reconstruction"])
    def test_image_losses_refuse_a_batch(self, name):
        with raises(name, "one image", r"\(3, 6, 6, 1\)", "ttt_jax.batched", "batch=True"):
            jax.eval_shape(build_images(name), WEIGHTS, IMAGES, KEY)

    @pytest.mark.parametrize("name", ["rotation", "masked_reconstruction"])
    def test_image_losses_refuse_a_single_image_as_batch(self, name):
        with raises(name, "a batch", r"\(6, 6, 1\)", "batch=False"):
            jax.eval_shape(build_images(name, batch=True), WEIGHTS, IMAGE, KEY)

    @pytest.mark.parametrize("name", ["rotation", "masked_reconstruction"])
    def test_image_losses_refuse_an_image_without_channels(self, name):
        with raises(name, "one image", r"\(6, 6\)"):
            jax.eval_shape(build_images(name), WEIGHTS, IMAGE[..., 0], KEY)

    @pytest.mark.parametrize("dtype", [np.float32, np.uint8])
    @pytest.mark.parametrize("name", ["entropy", "marginal_entropy", "pseudo_label"])
    def test_other_losses_refuse_a_batch_of_images(self, name, dtype):
        loss = {
            "entropy": lambda: losses.entropy(linear),
            "marginal_entropy": lambda: losses.marginal_entropy(
                linear, lambda x, key: x, num_views=2
            ),
            "pseudo_label": lambda: losses.pseudo_label(linear),
        }[name]()
        with raises(name, "one instance", r"\(3, 6, 6, 1\)", "ttt_jax.batched"):
            jax.eval_shape(loss, WEIGHTS, IMAGES.astype(dtype), KEY)

    @pytest.mark.parametrize(
        "build",
        [
            lambda: losses.rotation(linear, batch=True),
            lambda: build_images("masked_reconstruction", batch=True),
            lambda: losses.entropy(linear, batch=True),
            lambda: losses.marginal_entropy(linear, lambda x, key: x, num_views=2, batch=True),
            lambda: losses.pseudo_label(linear, batch=True),
            lambda: losses.reliable_entropy(linear, batch=True),
            lambda: losses.denoising(identity, noise=0.1, batch=True),
        ],
    )
    def test_empty_batches(self, build):
        with raises("at least one instance; got 0", "Leave empty batches out"):
            jax.eval_shape(build(), WEIGHTS, IMAGES[:0], KEY)

    def test_unbatched_model_function(self):
        one = ttt.unbatched(linear)
        with raises("entropy", r"\[1, \.\.\., classes\]", "not unbatched"):
            jax.eval_shape(losses.entropy(lambda p, x: one(p, x[0])), WEIGHTS, IMAGE, KEY)

    def test_rotation_needs_squares(self):
        with raises("square", "6 x 4", "Crop or pad"):
            jax.eval_shape(losses.rotation(linear), WEIGHTS, np.ones((6, 4, 1)), KEY)

    def test_rotation_head_has_four_outputs(self):
        with raises("rotation", r"\[4, \.\.\., 4\]", r"\(4, 3\)"):
            jax.eval_shape(losses.rotation(linear), WEIGHTS[:, :3], IMAGE, KEY)

    @pytest.mark.parametrize("copies", [0, -1, 2.0, True])
    def test_copies(self, copies):
        with raises("copies", str(copies)):
            losses.rotation(linear, copies=copies)

    def test_patch_divides_the_image(self):
        with raises("patch = 4", "6 x 6"):
            jax.eval_shape(
                losses.masked_reconstruction(lambda p, x, keep: x, patch=4), None, IMAGE, KEY
            )

    @pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 2])
    def test_mask_ratio(self, ratio):
        with raises("mask_ratio", "between 0 and 1", str(ratio)):
            losses.masked_reconstruction(linear, patch=3, mask_ratio=ratio)

    @pytest.mark.parametrize("ratio", [0.01, 0.9])
    def test_some_patches_are_visible_and_some_hidden(self, ratio):
        def apply(params, images, keep):
            return jnp.zeros((1, 1, 36))

        with raises("one visible and one hidden", str(ratio), "of 1 patches"):
            jax.eval_shape(
                losses.masked_reconstruction(apply, patch=6, mask_ratio=ratio), None, IMAGE, KEY
            )

    def test_reconstruction_shape(self):
        with raises("patches of shape", r"\(1, 4, 9\)", r"\(1, 4, 5\)"):
            loss = losses.masked_reconstruction(lambda p, x, k: jnp.zeros((1, 4, 5)), patch=3)
            jax.eval_shape(loss, None, IMAGE, KEY)

    def test_a_patch_of_one_value_cannot_be_normalized(self):
        loss = losses.masked_reconstruction(lambda p, x, keep: x, patch=1)
        with raises("single value", "normalize=False"):
            jax.eval_shape(loss, None, IMAGE, KEY)

    @pytest.mark.parametrize("name", ["patch", "num_masks"])
    def test_counts_of_reconstruction(self, name):
        with raises(name, "at least 1", "0"):
            losses.masked_reconstruction(linear, **{"patch": 3, name: 0})

    def test_weight_shape(self):
        loss = losses.entropy(identity, weight=lambda logits: jnp.ones(()), batch=True)
        with raises("one value per instance", r"\(3,\)", r"\(\)"):
            jax.eval_shape(loss, 1.0, LOGITS, KEY)

    def test_number_of_views(self):
        with raises("num_views", "at least 1", "0"):
            losses.marginal_entropy(identity, lambda x, key: x, num_views=0)

    def test_weighted_needs_pairs(self):
        with raises("pairs", r"weighted\(\(1.0, a\)", "function"):
            losses.weighted(identity)

    def test_over_batch_refuses_a_memory(self):
        stateful = ttt.StatefulLoss(lambda p: (), lambda p, m, x, k: (p, m), lambda p, m: m)
        with pytest.raises(TypeError, match=r"plain losses.*StatefulLoss.*over the batch"):
            losses.over_batch(stateful)

"""Source, augmentation and BN-adapt against NumPy in float64: predictions without a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from tests.core import golden
from tests.core.compiling import quickly
from tests.core.golden_models import BATCHES, IMAGES, KEYS, TWO_HEADS, brightness, classify
from ttt_jax import methods

SOURCE = golden.flat(TWO_HEADS)
VIEWS, EPSILON = 4, 1e-5


def predictions(method, params=TWO_HEADS, xs=IMAGES):
    outputs, info = quickly(ttt.batched(method), params, xs, KEYS)
    assert info.loss.shape == (len(xs), 0) and info.ok.all() and not info.updated.any()
    return np.asarray(outputs)


def exact(images):
    return golden.classify(SOURCE, images.astype(np.float64))


def test_source():
    golden.close(predictions(methods.source(classify)), exact(IMAGES))
    batches = predictions(methods.source(classify, batch=True), xs=BATCHES)
    golden.close(batches[1], exact(BATCHES[1]))


@pytest.mark.parametrize("include_identity", [True, False])
@pytest.mark.parametrize("mean", ["probability", "logit"])
def test_augmented(include_identity, mean):
    method = methods.augmented(
        classify,
        augment=brightness,
        num_views=VIEWS,
        include_identity=include_identity,
        mean=mean,
    )
    for output, image, key in zip(predictions(method), IMAGES, KEYS, strict=True):
        keys = jax.random.split(key, VIEWS)
        views = np.stack([brightness(image, key) for key in keys])
        if include_identity:
            views[0] = image
        logits = exact(views)
        if mean == "probability":
            golden.close(output, np.log(golden.softmax(logits).mean(axis=0)))
        else:
            golden.close(output, logits.mean(axis=0))


def test_every_view():
    def views(image):
        return jnp.stack([image, image[:, ::-1], image[::-1]])

    method = methods.every_view(classify, views=views)
    for output, image in zip(predictions(method), IMAGES, strict=True):
        mean = golden.softmax(exact(np.stack([image, image[:, ::-1], image[::-1]]))).mean(axis=0)
        golden.close(output, np.log(3 * mean))


NET = {
    "params": {"norm": {"scale": [1.2, 0.8], "bias": [0.1, -0.3]}},
    "batch_stats": {"norm": {"mean": [0.5, -1.0], "var": [2.0, 0.25]}},
}


def normalized(inputs, mean, variance):
    scale, bias = (np.array(leaf) for leaf in NET["params"]["norm"].values())
    return (inputs - mean) / np.sqrt(variance + EPSILON) * scale + bias


def batch_norm(norm):
    import flax.linen as nn

    from ttt_jax import models

    class Net(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name="norm")(inputs)

    return models.from_linen(Net(), norm=norm)


class TestBNAdapt:
    PARAMS = jax.tree.map(jnp.asarray, NET, is_leaf=lambda leaf: isinstance(leaf, list))
    INPUTS = np.random.default_rng(5).normal(size=(3, 4, 2)).astype(np.float32)
    MEAN, VARIANCE = (np.array(leaf) for leaf in NET["batch_stats"]["norm"].values())

    def test_statistics_of_the_batch(self):
        outputs = predictions(methods.bn_adapt(batch_norm("batch")), self.PARAMS, self.INPUTS)
        for output, batch in zip(outputs, self.INPUTS.astype(np.float64), strict=True):
            golden.close(output, normalized(batch, batch.mean(axis=0), batch.var(axis=0)))

    def test_a_prior_of_sixteen_and_four_instances(self):
        """Source and test statistics in shares of 16/20 and 4/20."""
        outputs = predictions(methods.bn_adapt(batch_norm(16)), self.PARAMS, self.INPUTS)
        for output, batch in zip(outputs, self.INPUTS.astype(np.float64), strict=True):
            mean = 0.8 * self.MEAN + 0.2 * batch.mean(axis=0)
            variance = 0.8 * self.VARIANCE + 0.2 * batch.var(axis=0)
            golden.close(output, normalized(batch, mean, variance))

    def test_one_instance(self):
        """A single vector varies by nothing; alone it has no statistics at all."""
        method = methods.bn_adapt(batch_norm(16), batch=False)
        outputs = predictions(method, self.PARAMS, self.INPUTS[0, :3])
        for output, x in zip(outputs, self.INPUTS[0, :3].astype(np.float64), strict=True):
            mean, variance = (16 * self.MEAN + x) / 17, 16 * self.VARIANCE / 17
            golden.close(output, normalized(x, mean, variance))
        alone = methods.bn_adapt(batch_norm("batch"), batch=False)
        with pytest.raises(ValueError, match=r"needs at least 2 instances, received 1"):
            alone(self.PARAMS, self.INPUTS[0, 0], KEYS[0])

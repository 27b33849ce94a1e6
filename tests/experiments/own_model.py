"""A model, an auxiliary loss and a method of a user's own, named in a config by import path."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ttt_jax as ttt


class Net(nnx.Module):
    """Classes, and a decoder of the features as a head of its own."""

    def __init__(self, num_classes, width=8, *, rngs):
        self.encoder = nnx.Linear(64, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)
        self.decoder = nnx.Linear(width, 64, rngs=rngs)

    def __call__(self, images):
        return self.head(self._features(images))

    def decode(self, images):
        return self.decoder(self._features(images)).reshape(images.shape)

    def _features(self, images):
        return nnx.relu(self.norm(self.encoder(images.reshape(images.shape[0], -1))))


def denoising(decode):
    """Mean squared error of decoded noisy images ``[N, H, W, C]``."""

    def loss(params, images, key):
        noisy = images + 0.3 * jax.random.normal(key, images.shape)
        return jnp.square(decode(params, noisy) - images).mean()

    return loss


def method(classify, decode, *, optimizer=optax.sgd(0.1), select=ttt.select.everything()):  # noqa: B008
    """One private step on :func:`denoising`."""
    loss = denoising(decode)
    adapter = ttt.gradient_adapter(
        lambda params, x, key: loss(params, x[None], key), optimizer, select=select
    )
    return ttt.episodic(adapter, ttt.unbatched(classify), num_steps=1)

"""A dense model with BatchNorm that compiles in a moment, for the model table of the programs."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.tasks import networks
from ttt_jax.models import vit


class Dense(nn.Module):
    num_classes: int
    projection: int = 0

    def setup(self):
        self.encoder = nn.Dense(6)
        self.bn, self.rotation_bn = nn.BatchNorm(), nn.BatchNorm()
        self.fc, self.rotation_fc = nn.Dense(self.num_classes), nn.Dense(4)
        if self.projection:
            self.projection_out = nn.Dense(self.projection)

    def __call__(self, images):
        return self.fc(self.features(images))

    def features(self, images):
        return nn.relu(self.bn(self._encode(images), True))

    def project(self, images):
        return self.projection_out(self.features(images))

    def rotation(self, images):
        return self.rotation_fc(nn.relu(self.rotation_bn(self._encode(images), True)))

    def all_heads(self, images):
        heads = (self(images), self.rotation(images))
        return (*heads, self.project(images)) if self.projection else heads

    def _encode(self, images):
        return self.encoder(images.reshape(images.shape[0], -1))

    @nn.nowrap
    def finish_init(self, variables):
        return variables


class DenseMae(Dense):
    """The encoder also sees images of which patches are black, for digits of 8 x 8 pixels."""

    patch: int = 4

    def setup(self):
        super().setup()
        self.decoder = nn.Dense(64)

    def reconstruct(self, images, keep):
        patches = vit.patchify(images, self.patch)
        visible = jax.nn.one_hot(keep, patches.shape[1]).sum(axis=1)
        codes = nn.relu(self._encode(patches * visible[:, :, None]))
        return self.decoder(codes).reshape(patches.shape)

    def all_heads(self, images):
        keep = jnp.zeros((images.shape[0], 1), jnp.int32)
        return *super().all_heads(images), self.reconstruct(images, keep)


def install(monkeypatch):
    """Makes ``model.name="dense"`` and ``"dense_mae"`` known."""
    monkeypatch.setitem(networks.MODELS, "dense", Dense)
    monkeypatch.setitem(networks.MODELS, "dense_mae", DenseMae)

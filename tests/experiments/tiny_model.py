"""A dense model with BatchNorm that compiles in a moment, for the model table of the programs."""

import flax.linen as nn

from experiments.tasks import networks


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


def install(monkeypatch):
    """Makes ``model.name="dense"`` known."""
    monkeypatch.setitem(networks.MODELS, "dense", Dense)

"""A dense model with BatchNorm that compiles in a moment, for the model table of the programs."""

import flax.linen as nn

from experiments import problem


class Dense(nn.Module):
    num_classes: int

    def setup(self):
        self.encoder = nn.Dense(6)
        self.bn, self.rotation_bn = nn.BatchNorm(), nn.BatchNorm()
        self.fc, self.rotation_fc = nn.Dense(self.num_classes), nn.Dense(4)

    def __call__(self, images):
        return self.fc(nn.relu(self.bn(self._encode(images), True)))

    def rotation(self, images):
        return self.rotation_fc(nn.relu(self.rotation_bn(self._encode(images), True)))

    def all_heads(self, images):
        return self(images), self.rotation(images)

    def _encode(self, images):
        return self.encoder(images.reshape(images.shape[0], -1))

    @nn.nowrap
    def finish_init(self, variables):
        return variables


def install(monkeypatch):
    """Makes ``model.name="dense"`` known."""
    monkeypatch.setitem(problem.MODELS, "dense", Dense)

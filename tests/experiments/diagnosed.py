"""A model that is trained and diagnosed once, for the tests of the diagnostics program."""

import shutil

import ml_collections

from experiments import diagnose, train
from tests.experiments import tiny_config

# Of source statistics against those of the image, as in the demo.
PRIOR = 16
RATES = (0.01, 0.03, 0.3)
OPTIONS = diagnose.Options(
    severities=(1, 5), corruptions=("contrast", "fog"), num_images=3, learning_rates=RATES[::2]
)


def get_config():
    config = tiny_config.get_config()
    config.model = ml_collections.ConfigDict({"name": "dense"})
    config.methods.rotation.learning_rate = (0.03,)
    config.adapt.chunk_size = 6  # three copies of two images at once: the last chunk is padded
    return config


def make(trained, folder):
    """Diagnoses a copy of a work folder whose model is trained; returns it and the record."""
    shutil.copytree(trained, folder)
    return folder, diagnose.run(get_config(), str(folder), OPTIONS)


def train_in(folder):
    """The work folder with the trained model; ``tiny_model`` must be installed."""
    train.run(get_config(), str(folder))
    return folder

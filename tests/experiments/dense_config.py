"""A dense model with a method of each scope, for runs of several processes and sweeps."""

from experiments.tasks import networks
from tests.experiments import tiny_config, tiny_model


def get_config():
    # A process of its own knows the model by nothing else.
    networks.MODELS.setdefault("dense", tiny_model.Dense)
    config = tiny_config.get_config()
    config.model = {"name": "dense"}
    # Batches of one size in every split, streams in pairs: each method is compiled once.
    config.adapt.update({"batch_size": 10, "chunk_size": 10, "parallel_streams": 2})
    config.methods.rotation.update({"num_steps": 1, "learning_rate": (0.01,)})
    # Without source statistics in the mixture, adapting begins at the source prediction.
    del config.methods.rotation.prior, config.methods.rotation_online.prior
    config.methods.tent = {"episodic": True, "predict": "after", "learning_rate": 0.01}
    return config

"""The cut-down demo with a method of each scope, for runs of several processes."""

from tests.experiments import tiny_config


def get_config():
    config = tiny_config.get_config()
    config.methods.rotation.learning_rate = (0.01,)
    config.methods.tent = {"episodic": True, "predict": "after", "learning_rate": 0.01}
    return config

"""The demo, cut down to what a test needs: a two-block model, few images, few methods."""

import pathlib

import jax
import ml_collections

from experiments import pristine, tasks
from experiments.configs import digits
from ttt_jax import checkpoint


def get_config():
    config = digits.get_config()
    config.data.test = "test[:30]"
    config.data.validation = "train[1257:1277]"
    config.model = ml_collections.ConfigDict(
        {"name": "vit", "patch": 4, "width": 8, "depth": 1, "heads": 1}
        | {"decoder_width": 8, "decoder_depth": 1}
    )
    config.train.update({"num_steps": 12, "save_every": 5, "log_every": 4, "batch_size": 16})
    config.adapt.update({"batch_size": 20, "chunk_size": 10})
    for name in set(config.methods) - {"source", "rotation", "rotation_online"}:
        del config.methods[name]
    config.methods.rotation.update({"copies": 2, "num_steps": 2, "learning_rate": (0.01, 0.03)})
    config.methods.rotation_online.update({"copies": 2, "learning_rate": (0.003,)})
    return config


def with_methods(config, **methods):
    """Replaces the methods of a config."""
    config.methods = ml_collections.ConfigDict(methods, convert_dict=True)
    return config


def save_initial(config, folder):
    """Checkpoints of the initial model of every seed, where it need not be a trained one."""
    init = jax.jit(tasks.build(config).init)
    for seed in config.seeds:
        path = pristine.path_of(pathlib.Path(folder), seed)
        checkpoint.save(path, init(jax.random.key(seed)), metadata=pristine.metadata(config))


def get_mae_config():
    """Masked reconstruction in training and in adapting."""
    config = get_config()
    config.train.update({"aux": "mae", "mask_ratio": 0.5, "num_steps": 4})
    mae = {"method": "ttt_mae", "trace": True, "probe": "mae", "mask_ratio": 0.5}
    mae |= {"num_masks": 2, "num_steps": 1, "learning_rate": (0.03, 0.1), "momentum": 0.9}
    return with_methods(config, source={}, mae={**mae, "select": ".*encoder/.*"})


def get_batch_norm_config():
    """The model with BatchNorm of ``tiny_model``, and methods over whole batches."""
    config = get_config()
    config.data.test = "test[:50]"
    config.model = ml_collections.ConfigDict({"name": "dense"})
    return with_methods(
        config,
        source={},
        bn_adapt={},
        tent={"episodic": True, "predict": "after", "learning_rate": 0.05},
        tent_online={"method": "tent", "learning_rate": 0.05, "optimizer": "sgd"},
        pseudo_label={
            "episodic": True,
            "predict": "after",
            "learning_rate": 0.05,
            "optimizer": "sgd",
            "momentum": 0.9,
            "num_steps": 2,
        },
    )

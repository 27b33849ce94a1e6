"""A user's own NNX model, auxiliary loss and method, from a config to rows."""

import json
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import pytest

from experiments import adapt, settings, tasks, train
from experiments.tasks import networks
from tests.experiments import own_model, tiny_config

_HERE = "tests.experiments.own_model"


def get_config():
    config = tiny_config.get_config()
    config.model = ml_collections.ConfigDict({"name": f"{_HERE}:Net", "width": 4})
    config.train.update({"aux": f"{_HERE}:denoising", "num_steps": 3})
    own = {"method": f"{_HERE}:method", "learning_rate": (0.01, 0.03), "select": "norm"}
    return tiny_config.with_methods(config, source={}, own=own)


def test_from_config_to_rows(tmp_path):
    config = get_config()
    train.run(config, str(tmp_path))
    assert adapt.run(config, str(tmp_path), part=adapt.Part(domains=("fog", "saturate"))) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted((row["method"], row["domain"]) for row in rows) == [
        (method, domain) for method in ("own", "source") for domain in ("fog", "saturate")
    ]
    # LayerNorm alone: scale and bias of width 4.
    assert {row["adapted_parameters"] for row in rows if row["method"] == "own"} == {8}
    assert "train/denoising_loss" in (tmp_path / "metrics.jsonl").read_text()


def test_the_public_methods_of_a_model_are_heads():
    config = get_config()
    task = tasks.build(config)
    heads = task.heads()
    assert "decode" in heads and "encoder" not in heads
    params, images = task.init(jax.random.key(0)), jnp.ones((2, 8, 8, 1))
    assert heads["decode"](params, images).shape == images.shape
    # The loss of training is the function's own, of the head that its argument names.
    loss = settings.auxiliary(config, task).loss(params, images, jax.random.key(1))
    wanted = own_model.denoising(task.heads(norm="batch")["decode"])
    assert loss == wanted(params, images, jax.random.key(1))


def test_a_field_that_holds_a_function_is_no_head():
    class Net(nn.Module):
        num_classes: int
        activation: Callable = abs_of

        def features(self, images):
            return images

    network = networks.Network(Net(3), None, (8, 8, 1))
    assert network.heads() == ["features"]


def test_a_head_that_the_model_has_not():
    config = get_config()
    config.train.aux = "tests.experiments.test_own_model:of_another_head"
    with pytest.raises(ValueError, match=r"of_another_head needs 'segment'; .* has .*decode"):
        settings.auxiliary(config, tasks.build(config))


def abs_of(x):
    return jnp.abs(x)


def of_another_head(segment):
    return segment

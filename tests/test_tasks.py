"""Every task of the programs holds the rules of ``audit.check_task``; broken ones are named."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from experiments import tasks
from ttt_jax import metrics
from ttt_jax.task import Examples, Task


@pytest.mark.parametrize("name", ["digits", "documents", "few_shot", "frames"])
def test_tasks_of_the_programs(name):
    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    if name == "digits":
        config.data.update({"test": "test[:20]", "validation": "train[1257:1277]"})
        config.adapt.batch_size = 10
    if name == "documents":
        config.data.update({"chunk": 16, "chunks": 3, "most": 6})
        config.model.update({"width": 16, "depth": 1})
    ttt.audit.check_task(tasks.build(config))


def toy(**changes):
    def batch(seed):
        x = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
        return Examples(np.arange(4), x, np.zeros(4, np.int64), {"kind": np.full(4, "a")})

    made = Task(
        name="toy",
        init=lambda key: {"w": jax.random.normal(key, (3, 2))},
        heads=lambda: {"classify": lambda params, x: x @ params["w"]},
        augment=None,
        loss=lambda params, examples, key: jnp.square(examples.x @ params["w"]).mean(),
        training=lambda seed: [batch(1)],
        streams=lambda role, seed: {"only": [batch(2 if role == "reported" else 3)]},
        metrics={"error": metrics.error()},
        chooses="error",
    )
    return made._replace(**changes), batch


def test_a_sound_task_passes():
    ttt.audit.check_task(toy()[0])


BATCH = toy()[1]
BROKEN = {
    "chooses and ties must name metrics": {"chooses": "loss"},
    "it is empty": {"streams": lambda role, seed: {}},
    "are in both": {"training": lambda seed: [BATCH(2)]},
    "must have a leading axis of 4": {
        "streams": lambda role, seed: {"only": [BATCH(hash(role) % 97)._replace(y=np.zeros(3))]}
    },
    "must be there once": {"training": lambda seed: [BATCH(1)._replace(id=np.zeros(4, np.int64))]},
    "one per instance": {
        "metrics": {"error": metrics.Metric(lambda output, source, e: np.zeros(()), float)}
    },
    "all of it is zero": {"loss": lambda params, examples, key: 0.0 * params["w"].sum()},
    "finite scalar": {"loss": lambda params, examples, key: jnp.nan * params["w"].sum()},
    "keep the shapes": {"augment": lambda x, key: x[:2]},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_rule_is_named(message):
    task, _ = toy(**BROKEN[message])
    with pytest.raises(ttt.audit.AuditError, match=message):
        ttt.audit.check_task(task)

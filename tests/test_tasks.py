"""Every task of the programs holds the rules of ``audit.check_task``; broken ones are named."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from experiments import tasks
from experiments.tasks import series
from ttt_jax import metrics
from ttt_jax.task import Examples, Task


@pytest.mark.parametrize("name", ["digits", "documents", "few_shot", "frames", "series"])
def test_tasks_of_the_programs(name):
    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    if name == "digits":
        config.data.update({"train": "train[:200]", "test": "test[:10]"})
        config.data.validation = "train[1257:1267]"
        config.adapt.batch_size = 5
    if name == "documents":
        config.data.update({"chunk": 16, "chunks": 3, "most": 6, "least": 48})
        config.model.update({"width": 16, "depth": 1, "rank": 2})
        config.train.length = 48
    if name == "few_shot":
        config.data.update({"tasks": 20, "validation": 3, "reported": 5, "views": 2, "rows": 2})
        config.model.update({"width": 16, "depth": 1, "heads": 1, "mlp_width": 16})
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


def series_task(tmp_path, **arrays):
    np.savez(tmp_path / "own.npz", **arrays)
    config = importlib.import_module("experiments.configs.series").get_config()
    config.data.update({"file": str(tmp_path / "own.npz"), "window": 5, "seen": 3, "horizon": 2})
    config.adapt.batch_size = 4
    return tasks.build(config)


def test_windows_of_an_own_series(tmp_path):
    """Every value after the first window is forecast once, and a forecast sees its window alone."""
    task = series_task(tmp_path, reported=np.arange(12.0))
    (batch,) = task.streams("reported", 0)["series"]
    np.testing.assert_array_equal(batch.x, np.arange(5) + np.array([[0], [2], [4]]))
    np.testing.assert_array_equal(batch.y, [[5, 6], [7, 8], [9, 10]])
    with pytest.raises(ValueError, match=r"series named 'validation'; .* has reported"):
        task.streams("validation", 0)
    with pytest.raises(ValueError, match=r"at least .*7; got shape \(6,\)"):
        series_task(tmp_path, reported=np.arange(6.0)).streams("reported", 0)


def test_a_step_on_the_forecast_inside_of_a_window_by_hand(tmp_path):
    task = series_task(tmp_path, reported=np.arange(12.0))
    heads, x = task.heads(), np.array([1.0, 3.0, 2.0, 5.0, 4.0], np.float32)
    params = jax.tree.map(jnp.zeros_like, task.init(jax.random.key(0)))
    predict = series.hindcasts(**heads, optimizer=optax.sgd(0.5))
    output, info = predict(params, x, jax.random.key(0))
    beginning = x[:3] - x[:3].mean()
    gap = x[:3].mean() - x[3:]
    np.testing.assert_allclose(info.loss, [(gap**2).mean()], rtol=1e-6)
    kernel, bias = -0.5 * np.outer(beginning, gap), -0.5 * gap
    due = (x[2:] - x[2:].mean()) @ kernel + bias + x[2:].mean()
    np.testing.assert_allclose(output, due, rtol=1e-5)

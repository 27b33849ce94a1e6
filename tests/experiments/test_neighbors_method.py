"""Rotation on an image and its nearest training images, against NumPy and the library."""

import jax
import numpy as np
import pytest

import ttt_jax as ttt
from experiments import methods, problem
from experiments.methods import outputs, steps
from tests.experiments import tiny_config, tiny_model
from tests.experiments.test_batch_methods import Lab, close
from ttt_jax import data, models

OPTIONS = {"copies": 2, "num_steps": 1, "learning_rate": 0.1, "select": "norm"}


def get_config(**options):
    config = tiny_config.with_methods(
        tiny_config.get_config(),
        source={},
        rotation_neighbors={**OPTIONS, "k": 3, "pool_images": 40, **options},
    )
    config.data.test = "test[:7]"
    config.adapt.update({"batch_size": 7, "chunk_size": 7})
    return config


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(get_config(), tmp_path_factory.mktemp("lab"))


def test_is_a_step_on_the_image_and_its_neighbors(lab):
    """The neighbors by distances in NumPy, given to the library's batch loss as they are."""
    source = problem.load_data(lab.config, "train")
    plan = data.streams.shuffled(source, seed=0)
    pool = np.stack([source[int(index)].image for index in plan.index[:40]])
    raw = models.from_linen(lab.problem.module, "features")
    params, (batch,) = lab.pristine.restore("memory"), lab.batches
    images = np.asarray(batch.image)
    rows, queries = (
        np.asarray(raw(params, (some - 0.5) / 0.5), np.float64) for some in (pool, images)
    )
    rows, queries = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (rows, queries))
    nearest = np.argsort(-queries @ rows.T, axis=1)[:, :3]
    groups = np.concatenate([images[:, None], pool[nearest]], axis=1)

    loss = steps.rotation_loss(lab.problem, OPTIONS, batch=True)
    plain = outputs.plain(lab.problem, OPTIONS)
    predict = ttt.episodic(
        steps.adapter(loss, OPTIONS), lambda params, group: plain(params, group[0]), num_steps=1
    )
    keys = ttt.sample_keys(jax.random.key(0), batch.id)
    expected, _ = jax.jit(ttt.batched(predict))(params, groups, keys)

    outcome = lab.run("rotation_neighbors")
    assert outcome.ok.all() and outcome.logits.shape[1] == 2
    close(outcome.final, expected["logits"])
    assert np.abs(outcome.final - lab.run("source").logits).max() > 1e-4


def test_cost_counts_the_neighbors(lab):
    method = lab.method("rotation_neighbors")
    assert method.cost(method.grid[0]) == (2 * 4 + 2, 2 * 4)


def test_a_model_without_features_is_refused(monkeypatch):
    tiny_model.install(monkeypatch)
    monkeypatch.delattr(tiny_model.Dense, "features", raising=False)
    config = get_config()
    config.model = {"name": "dense"}
    built = problem.build(config, problem.load_data(config, "test"))
    with pytest.raises(ValueError, match="rotation_neighbors needs a model with a method features"):
        methods.build(config, built, built)

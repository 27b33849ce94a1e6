"""``train.aux``: what each task trains, what it is called, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import launch, provenance, settings, train
from experiments.tasks import images as image_task
from tests.experiments import tiny_config
from tests.experiments.diagnosed import get_config
from ttt_jax import checkpoint, views


def moved(before, after):
    """The top-level modules of which any parameter changed."""
    before, after = before["params"], after["params"]
    return {
        name
        for name in before
        if not all(map(np.array_equal, *map(jax.tree.leaves, (before[name], after[name]))))
    }


@pytest.mark.parametrize(
    ("aux", "losses", "parts"),
    [
        ("rotation", {"main", "rotation"}, {"encoder", "bn", "fc", "rotation_bn", "rotation_fc"}),
        ("mae", {"main", "mae"}, {"encoder", "head", "decoder"}),
        ("none", {"main"}, {"encoder", "bn", "fc"}),
    ],
)
def test_a_task_trains_its_head_and_names_its_loss(dense, tmp_path, aux, losses, parts):
    config = tiny_config.get_config() if aux == "mae" else get_config()
    config.train.update({"aux": aux, "num_steps": 3, "weight_decay": 0.0, "log_every": 3})
    train.run(config, str(tmp_path))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    scalars = json.loads(line)
    assert set(scalars) == {"seed", "step"} | {f"train/{name}_loss" for name in losses}
    assert all(scalars[f"train/{name}_loss"] > 0 for name in losses)
    trained = checkpoint.load(tmp_path / "checkpoints" / "seed_0")
    assert trained.metadata["aux"] == aux
    initial = jax.jit(image_task.task(config).init)(jax.random.key(0))
    assert moved(initial, trained.params) == parts


def one_step(config, task):
    """Parameters before and after a training step on eight images, its losses and the images."""
    config.train.batch_size = 8
    before, optimizer = jax.jit(task.init)(jax.random.key(0)), settings.training_optimizer(config)
    step = jax.jit(train.make_step(config, task, optimizer))
    batch = next(task.training(0).steps(0))
    state = optimizer.init(before["params"])
    after, _, losses = step(before, state, batch, jax.random.key(0))
    return before, after, losses, batch


def test_contrastive_training_is_the_library_on_two_views(dense):
    config = tiny_config.get_batch_norm_config()
    config.model.projection = 5
    config.train.update({"aux": "contrastive", "aux_weight": 0.5, "weight_decay": 0.0})
    task = image_task.task(config)
    before, after, losses, batch = one_step(config, task)
    key = jax.random.key(0)
    assert before["params"]["projection_out"]["kernel"].shape == (6, 5)
    assert moved(before, after) == {"encoder", "bn", "fc", "projection_out"}

    @jax.jit
    def projections(images):
        view_key, aux_key = jax.random.split(key)
        crops = jax.vmap(task.augment)(images, jax.random.split(view_key, 8))
        pair_key = jax.random.split(aux_key)[0]
        keys = jnp.concatenate([jax.random.split(k) for k in jax.random.split(pair_key, 8)])
        pairs = jax.vmap(views.image.simclr())(jnp.repeat(crops, 2, axis=0), keys)
        return task.heads(norm="batch")["project"](before, pairs)

    z = np.asarray(projections(batch.x), np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    scores = np.exp(z @ z.T / 0.5)
    expected = [-np.log(scores[i, i ^ 1] / (scores[i].sum() - scores[i, i])) for i in range(len(z))]
    assert float(losses["contrastive"]) == pytest.approx(np.mean(expected), rel=1e-4)


def test_without_a_task_the_statistics_of_its_branch_stay(dense):
    config = tiny_config.get_batch_norm_config()
    config.train.aux = "none"
    _, after, losses, _ = one_step(config, image_task.task(config))
    assert set(losses) == {"main"}
    statistics = after["batch_stats"]
    assert jnp.any(statistics["bn"]["mean"] != 0)
    assert jnp.all(statistics["rotation_bn"]["mean"] == 0)


@pytest.mark.parametrize(
    ("model", "aux", "words"),
    [
        (
            "vit",
            "mea",
            r"train\.aux must be 'rotation', 'mae', 'contrastive', 'none' or .*; got 'mea'",
        ),
        (
            "vit",
            "contrastive",
            r"train\.aux='contrastive' needs 'project'; .*digits has .*Add a head",
        ),
        ("resnet", "mae", r"train\.aux='mae' needs 'reconstruct'; .*digits has"),
    ],
)
def test_an_impossible_task_is_refused_and_leaves_the_folder_free(tmp_path, model, aux, words):
    config = tiny_config.get_config()
    config.train.aux = aux
    if model == "resnet":
        config.model = {"name": "resnet", "depth": 8, "width": 8, "groups": 4}
    with pytest.raises(ValueError, match=words):
        train.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_missing_key_is_its_default_for_the_folder_too(tmp_path):
    config = tiny_config.get_config()
    provenance.claim(tmp_path, config)
    config.train.aux = "rotation"
    config.adapt.sequence = "none"
    provenance.claim(tmp_path, config)
    (tmp_path / "selection.json").write_text("{}")
    config.train.aux = "none"
    with pytest.raises(launch.UserError, match=r"train\.aux was 'rotation', now 'none'"):
        provenance.claim(tmp_path, config)

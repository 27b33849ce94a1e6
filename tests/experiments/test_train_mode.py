"""Rotation in training mode on BatchNorm, against the steps written out by hand."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import traverse_util

import ttt_jax as ttt
from experiments import diagnosis, methods, problem
from experiments.methods import train_mode
from tests.experiments import tiny_config, tiny_model

EPSILON = 1e-5
SETTINGS = {
    "copies": 3,
    "select": ".*(encoder|rotation_.*)/.*",
    "num_steps": 2,
    "learning_rate": 0.1,
    "statistics_momentum": 0.7,
}


def config(**changes):
    small = tiny_config.get_batch_norm_config()
    return tiny_config.with_methods(small, rotation={**SETTINGS, **changes})


def build(config):
    made = problem.build(config, problem.load_data(config, "test"))
    return made, methods.build(config, made, made)["rotation"]


@pytest.fixture
def lab(monkeypatch):
    tiny_model.install(monkeypatch)
    made, method = build(config())
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + rng.uniform(0, 0.2, leaf.shape).astype(np.float32),
        problem.initial(made, 0),
    )
    image = rng.uniform(size=made.image_shape).astype(np.float32)
    return made, method, params, image


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def hidden(params, images):
    flat = jnp.reshape((jnp.asarray(images) - 0.5) / 0.5, (len(images), -1))
    return dense(params["encoder"], flat)


def normalized(layer, x, mean, var):
    return jax.nn.relu((x - mean) / jnp.sqrt(var + EPSILON) * layer["scale"] + layer["bias"])


def rotation_logits(params, images):
    """By the statistics of these images, which come back too."""
    h = hidden(params, images)
    mean, var = h.mean(0), ((h - h.mean(0)) ** 2).mean(0)
    return dense(params["rotation_fc"], normalized(params["rotation_bn"], h, mean, var)), mean, var


@jax.numpy_rank_promotion("allow")
def by_hand(made, variables, image, key, num_steps, learning_rate, momentum):
    params = dict(variables["params"])
    running = jax.tree.map(jnp.asarray, variables["batch_stats"])
    for i in range(num_steps):
        seen = {}

        def loss(params, seen=seen, i=i):
            def apply(params, images):
                logits, seen["mean"], seen["var"] = rotation_logits(params, images)
                return logits

            drawn = ttt.losses.rotation(apply, copies=3, augment=made.view)
            return drawn(params, image, jax.random.fold_in(key, i))

        grads = jax.grad(loss)(params)
        loss(params)
        for name in ("encoder", "rotation_bn", "rotation_fc"):
            params[name] = jax.tree.map(
                lambda p, g: p - learning_rate * g, params[name], grads[name]
            )
        bn = running["rotation_bn"]
        running["rotation_bn"] = {
            k: momentum * bn[k] + (1 - momentum) * seen[k] for k in ("mean", "var")
        }
    return params, running


def test_two_steps_are_those_written_out_by_hand(lab):
    made, method, variables, image = lab
    key = jax.random.key(3)
    output, info = method.build(dict(method.grid[0]))(variables, image, key)
    assert output["logits"].shape == (3, 10) and bool(info.ok)
    apply = made.model().classify
    probe = methods.probes(made)["rotation"]
    for steps in range(3):
        params, running = by_hand(made, variables, image, key, steps, 0.1, 0.7)
        adapted = {"params": params, "batch_stats": running}
        expected = apply(adapted, image[None])[0], probe(adapted, image)
        ttt.audit.require_close(
            (output["logits"][steps], output["aux"][steps]), expected, num_steps=steps
        )


def test_a_step_size_of_zero_moves_the_statistics_alone(lab):
    _, _, variables, image = lab
    method = build(config(learning_rate=0.0))[1]
    output, _ = method.build(dict(method.grid[0]))(variables, image, jax.random.key(3))
    # The classifier's BatchNorm is not on the path of the rotation head.
    np.testing.assert_array_equal(output["logits"][0], output["logits"][2])
    assert abs(float(output["aux"][0] - output["aux"][2])) > 1e-3


def test_statistics_that_keep_everything_leave_the_running_ones(lab):
    _, _, variables, image = lab
    method = build(config(learning_rate=0.0, statistics_momentum=1.0))[1]
    output, _ = method.build(dict(method.grid[0]))(variables, image, jax.random.key(3))
    np.testing.assert_allclose(output["aux"][2], output["aux"][0], rtol=1e-6)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_a_weight_outside_its_range_is_named(monkeypatch, momentum):
    tiny_model.install(monkeypatch)
    with pytest.raises(ValueError, match=rf"weight of the old statistics.*got {momentum}"):
        build(config(statistics_momentum=momentum))


def test_a_model_without_batch_norm_is_named():
    small = tiny_config.get_config()
    plain = tiny_config.with_methods(small, rotation={**SETTINGS, "select": "all"})
    with pytest.raises(ValueError, match=r"methods\.rotation: statistics_momentum needs a model"):
        build(plain)


def test_statistics_on_the_path_of_the_rotation_head_move_the_class():
    """Both heads read the norms of the first two layers; each has those of a last layer alone."""
    small = config(learning_rate=0.0, num_steps=1, select=".*rotation_fc/.*")
    small.model = ml_collections.ConfigDict(
        {"name": "resnet", "depth": 8, "width": 4, "norm": "batch", "branch": 2}
    )
    made, method = build(small)
    variables = problem.initial(made, 0)
    settings = dict(method.grid[0])
    image = np.random.default_rng(0).uniform(size=made.image_shape).astype(np.float32)
    key = jax.random.key(3)

    def adapted(params, image, key):
        adapter = train_mode.rotation_adapter(made, settings)
        state, _ = adapter.step(params, adapter.init(params), image, key)
        output, _ = method.build(settings)(params, image, key)
        return adapter.merge(params, state), output["logits"]

    after, logits = jax.jit(adapted)(variables, image, key)
    jax.tree.map(np.testing.assert_array_equal, after["params"], variables["params"])
    assert np.abs(logits[1] - logits[0]).max() > 1e-3
    means = {
        path: (old, new)
        for (path, old), new in zip(
            traverse_util.flatten_dict(variables["batch_stats"], sep="/").items(),
            traverse_util.flatten_dict(after["batch_stats"], sep="/").values(),
            strict=True,
        )
    }
    stayed = {path.split("/")[0] for path, (old, new) in means.items() if (old == new).all()}
    moved = {path.split("/")[0] for path, (old, new) in means.items() if (old != new).any()}
    assert moved == {"layer1", "layer2", "rotation_layer3", "rotation_bn"} and not moved & stayed
    assert stayed == {"layer3", "bn"}


def test_it_is_not_diagnosed_as_steps_of_the_weights_alone(lab):
    made, method, _, _ = lab
    with pytest.raises(ValueError, match="statistics_momentum moves running statistics"):
        diagnosis.task_of("rotation", made, dict(method.grid[0]))

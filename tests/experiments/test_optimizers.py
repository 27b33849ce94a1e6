"""The optimizers of training, against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import settings, train
from experiments.tasks import images
from tests.experiments import tiny_config
from ttt_jax import audit, checkpoint


def config_of(**options):
    config = tiny_config.get_config()
    config.train.update({"optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 0.5})
    config.train.update({"num_steps": 6, **options})
    return config


def test_adamw_with_warmup_by_hand():
    optim = settings.training_optimizer(config_of(warmup_steps=2))
    params = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0])}
    state = optim.init(params)
    grads = [0.3, -0.1, 0.2]
    # Two steps of climbing, then the first of the four of the cosine.
    rates = [0.0, 0.25, 0.5]
    expected = {"kernel": 2.0, "bias": 2.0}
    first = second = 0.0
    for count, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        updates, state = optim.update(
            jax.tree.map(lambda p, g=grad: p * 0 + g, params), state, params
        )
        params = jax.tree.map(jnp.add, params, updates)
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        step = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.95**count)) + 1e-8)
        expected["kernel"] -= rate * (step + 0.1 * expected["kernel"])
        expected["bias"] -= rate * step
        for name, value in expected.items():
            np.testing.assert_allclose(params[name].ravel(), [value], rtol=1e-5)


def test_interrupted_adamw_goes_on_where_it_was(dense, tmp_path, monkeypatch):
    config = config_of(learning_rate=0.01, warmup_steps=1, save_every=3, aux="none")
    config.model = {"name": "dense"}
    train.run(config, str(tmp_path / "whole"))

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Saves, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, str(tmp_path / "cut"))
    monkeypatch.undo()
    target = tmp_path / "cut" / "checkpoints" / "seed_0"
    target.rename(tmp_path / "removed")
    assert (tmp_path / "cut" / "training" / "seed_0" / "step_3").exists()
    train.run(config, str(tmp_path / "cut"))
    whole, cut = (
        checkpoint.load(tmp_path / name / "checkpoints" / "seed_0").params
        for name in ("whole", "cut")
    )
    audit.require_close(cut, whole, num_steps=config.train.num_steps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adma"}, r"train\.optimizer must be one of \['sgd', 'adamw'\]; got 'adma'"),
        ({"warmup_steps": 6}, r"train\.warmup_steps must lie between 0 and the 6 .*; got 6"),
    ],
)
def test_an_impossible_optimizer_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        config = config_of(**options)
        train.check(config, images.task(config))


@pytest.mark.parametrize("main_select", ["all", "params/fc/.*"])
def test_what_the_main_task_trains(dense, main_select):
    """Without an auxiliary loss, what it does not train stays to the last bit."""
    config = tiny_config.get_config()
    config.model = {"name": "dense"}
    config.train.update({"aux_weight": 0.0, "weight_decay": 0.0, "main_select": main_select})
    task, optim = images.task(config), settings.training_optimizer(config)
    step = train.make_step(config, task, optim)
    before = jax.jit(task.init)(jax.random.key(0))
    batch = next(task.training(0).steps(0))
    state = (before, optim.init(before["params"]))
    after = jax.jit(step)(*state, batch, jax.random.key(0))[0]["params"]
    moved = {
        part: any(
            bool((a != b).any())
            for a, b in zip(
                jax.tree.leaves(after[part]), jax.tree.leaves(before["params"][part]), strict=True
            )
        )
        for part in after
    }
    assert moved == {
        "encoder": main_select == "all",
        "bn": main_select == "all",
        "fc": True,
        "rotation_bn": False,
        "rotation_fc": False,
    }

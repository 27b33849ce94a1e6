"""Training: resuming, several steps per call, the schedule, and what is refused before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import launch, provenance, settings, train
from experiments.tasks import images
from tests.experiments import tiny_config
from tests.experiments.diagnosed import get_config
from ttt_jax import audit, checkpoint
from ttt_jax.task import take

pytestmark = pytest.mark.usefixtures("dense")


class Stop(Exception):
    pass


class StopAtEight:
    def scalars(self, step, values, seed):
        if step == 8:
            raise Stop


def with_task(config):
    return config, images.task(config)


def assert_same_parameters(folder, other):
    both = (checkpoint.load(at / "checkpoints" / "seed_0").params for at in (folder, other))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(a, b)


def test_interrupted_training_resumes_to_the_same_parameters(dense_folder, tmp_path):
    with pytest.raises(Stop):
        train.train(*with_task(get_config()), tmp_path, 0, StopAtEight())
    assert (tmp_path / "training" / "seed_0" / "step_5").is_dir()
    config = get_config()
    config.seeds = (0, 1)
    train.run(config, str(tmp_path))
    assert_same_parameters(dense_folder, tmp_path)
    # The other seed is another model.
    first, second = (checkpoint.load(tmp_path / "checkpoints" / f"seed_{k}") for k in (0, 1))
    assert first.fingerprint != second.fingerprint and second.metadata["seed"] == 1


def test_many_steps_per_call_equal_the_loop(tmp_path):
    config = get_config()
    config.train.steps_per_call = 6
    config.train.save_every = 4
    with pytest.raises(Stop):
        train.train(*with_task(config), tmp_path / "killed", 0, StopAtEight())
    assert (tmp_path / "killed" / "training" / "seed_0" / "step_4").is_dir()
    for name in ("killed", "whole"):
        train.run(config, str(tmp_path / name))
    assert_same_parameters(tmp_path / "whole", tmp_path / "killed")

    task, optimizer = images.task(config), settings.training_optimizer(config)
    run = jax.jit(train.make_step(config, task, optimizer))
    variables = jax.jit(task.init)(jax.random.key(0))
    state = [variables, optimizer.init(variables["params"])]
    images_at = task.training(0).places(0)
    resident = task.training(0).resident()
    for number, index in zip(range(config.train.num_steps), images_at, strict=False):
        key = jax.random.fold_in(jax.random.key(0), number)
        *state, _ = run(*state, take(resident, index), key)
    trained = checkpoint.load(tmp_path / "whole" / "checkpoints" / "seed_0").params
    audit.require_close(
        jax.tree.leaves(trained), jax.tree.leaves(state[0]), num_steps=config.train.num_steps
    )


def test_step_schedule_ends_at_a_hundredth():
    config = tiny_config.get_config()
    config.train.schedule = "step"
    config.train.update({"weight_decay": 0.0, "momentum": 0.0, "learning_rate": 0.5})
    optimizer = settings.training_optimizer(config)
    state, rates = optimizer.init(jnp.ones(())), []
    for _ in range(config.train.num_steps):
        update, state = optimizer.update(jnp.ones(()), state, jnp.ones(()))
        rates.append(-float(update))
    np.testing.assert_allclose(rates, [0.5] * 6 + [0.05] * 4 + [0.005] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule", "stairs", "train.schedule must be one of"),
        ("steps_per_call", 0, r"train\.steps_per_call must be at least 1; got 0"),
        ("log_every", 0, r"train\.log_every must be at least 1; got 0"),
        ("save_every", 0, r"train\.save_every must be at least 1; got 0"),
        ("num_steps", 0, r"train\.num_steps must be at least 1; got 0"),
        ("main_select", "head(", "train.main_select: .* is not one"),
        ("main_select", "params/haed.*", "train.main_select: .* matches none"),
        ("main_select", None, "must be 'all' or a pattern .*; got None"),
    ],
)
def test_impossible_training(tmp_path, key, value, message):
    config = get_config()
    with config.unlocked():
        config.train[key] = value
    with pytest.raises(ValueError, match=message):
        train.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_missing_split_is_refused_before_the_training(tmp_path):
    config = get_config()
    config.data.validation = "validation"
    with pytest.raises(ValueError, match="no split called 'validation'"):
        train.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("per_call", [1, 4])
def test_a_training_that_diverges_ends_and_says_so(tmp_path, per_call):
    config = get_config()
    config.train.learning_rate = 1e30
    config.train.update({"log_every": 8, "save_every": 4})
    with config.unlocked():
        config.train.steps_per_call = per_call
    with pytest.raises(launch.UserError, match=r"diverged: after step 4 .* nan.*learning_rate"):
        train.run(config, str(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("step_*"))
    assert not list((tmp_path / "run").rglob("seed_0/*"))
    # Nothing was made of it: the folder is free for another rate.
    config.train.learning_rate = 0.1
    provenance.claim(tmp_path / "run", config)


def test_what_nothing_would_train(tmp_path):
    config = get_config()
    config.train.update({"aux": "none", "main_select": "params/head.*"})
    with pytest.raises(ValueError, match="leaves the other parameters to an auxiliary task"):
        train.run(config, str(tmp_path / "run"))

"""The option ``views`` of the programs: crops, or AugMix of a crop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from experiments import methods, problem
from experiments.configs import cifar10c_memo
from tests.experiments import tiny_config, tiny_model
from ttt_jax import views as view_lib


def built(monkeypatch, **options):
    """The problem of a dense network on digits, its parameters, an image, and the methods."""
    tiny_model.install(monkeypatch)
    config = tiny_config.with_methods(tiny_config.get_batch_norm_config(), **options)
    test = problem.load_data(config, "test")
    plain = problem.build(config, test)
    image = jnp.asarray(test.take(np.arange(1)).image[0])
    return plain, problem.initial(plain, 0), image, methods.build(config, plain, plain)


def test_memo_and_augmented_take_the_views_that_they_name(monkeypatch):
    step = {"num_views": 4, "num_steps": 1, "learning_rate": 0.1, "select": "all"}
    plain, params, image, made = built(
        monkeypatch,
        memo=step,
        memo_augmix={**step, "views": "augmix"},
        augmented={"num_views": 4, "views": "augmix"},
    )
    classify, key = jax.jit(plain.model().classify), jax.random.key(3)
    mixtures = view_lib.image.chain(plain.view, view_lib.augmix.augmix)
    outputs = {}
    for name, views in (("memo", plain.view), ("memo_augmix", mixtures)):
        method = made[name]
        assert method.cost(method.grid[0]) == (5, 4)
        predict = jax.jit(method.build(method.grid[0]))
        outputs[name], info = predict(params, image, key)
        loss = ttt.losses.marginal_entropy(classify, views, num_views=4)
        value = jax.jit(jax.value_and_grad(loss))
        entropy, grads = value(params, image, jax.random.fold_in(key, 0))
        np.testing.assert_allclose(info.loss, [entropy], rtol=1e-5)
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params["params"], grads["params"])
        adapted = {**params, "params": stepped}
        # The plain image is predicted.
        expected = classify(adapted, image[None])[0]
        np.testing.assert_allclose(outputs[name]["logits"][1], expected, rtol=1e-4, atol=1e-5)
    both = [outputs[name]["logits"] for name in ("memo", "memo_augmix")]
    np.testing.assert_array_equal(both[0][0], both[1][0])
    assert np.abs(both[0][1] - both[1][1]).max() > 1e-5

    method = made["augmented"]
    output, _ = jax.jit(method.build(method.grid[0]))(params, image, key)
    views = jax.jit(jax.vmap(mixtures, (None, 0)))(image, jax.random.split(key, 4)[1:])
    mean = jax.nn.softmax(classify(params, jnp.concatenate([image[None], views]))).mean(axis=0)
    np.testing.assert_allclose(jax.nn.softmax(output["logits"]), mean, rtol=1e-4)


@pytest.mark.parametrize("name", ["memo", "augmented"])
def test_unknown_views_are_refused(name, monkeypatch):
    step = {"num_views": 4, "num_steps": 1, "learning_rate": 0.1, "select": "all"}
    message = f"methods.{name}: views must be 'crops', .* or 'augmix'; got 'mixup'"
    with pytest.raises(ValueError, match=message):
        built(monkeypatch, **{name: {**step, "views": "mixup"}})


def test_the_config_is_what_was_published():
    config = cifar10c_memo.get_config()
    assert config.train.aux == "none" and (config.views.padding, config.views.flip) == (4, True)
    published = {"num_views": 32, "num_steps": 1, "learning_rate": 0.005, "select": "all"}
    assert config.methods.to_dict() == {
        "source": {},
        "augmented": {"num_views": 32},
        "memo": {**published, "views": "crops"},
        "memo_augmix": {**published, "views": "augmix"},
    }

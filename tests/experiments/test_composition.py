"""The online composition against its parts, written out."""

import jax
import jax.numpy as jnp
import numpy as np

import ttt_jax as ttt
from experiments import methods, problem
from tests.experiments import tiny_config


def test_a_step_of_the_online_composition():
    settings = {"copies": 2, "num_views": 3, "num_steps": 1, "view_stride": 5, "select": "all"}
    settings |= {"learning_rate": 0.1, "memo_weight": 0.5}
    config = tiny_config.with_methods(
        tiny_config.get_config(), rotation_memo_augmented_online=settings
    )
    test = problem.load_data(config, "test")
    plain = problem.build(config, test)
    params = problem.initial(plain, 0)
    image, key = jnp.asarray(test.take(np.arange(1)).image[0]), jax.random.key(3)
    method = methods.build(config, plain, plain)["rotation_memo_augmented_online"]
    views = plain.every_view(image)[::5]
    assert method.cost(method.grid[0]) == (5 + len(views), 5)
    stream = method.build(method.grid[0])
    _, (output, info) = jax.jit(stream.step)(params, stream.init(params), image, key)

    model, turn = plain.model(), jax.random.fold_in(key, 0)
    parts = (
        ttt.losses.rotation(model.rotation, copies=2, augment=plain.view),
        ttt.losses.marginal_entropy(model.classify, plain.view, num_views=3),
    )

    def both(params):
        keys = [jax.random.fold_in(turn, place) for place in (0, 1)]
        values = [part(params, image, k) for part, k in zip(parts, keys, strict=True)]
        return values[0] + 0.5 * values[1]

    loss, grads = jax.jit(jax.value_and_grad(both))(params)
    np.testing.assert_allclose(info.loss, [loss], rtol=1e-5)
    adapted = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    mean = jax.nn.softmax(model.classify(adapted, views)).mean(axis=0)
    np.testing.assert_allclose(jax.nn.softmax(output["logits"]), mean, rtol=1e-4, atol=1e-6)
    del settings["num_views"], settings["memo_weight"]
    tiny_config.with_methods(config, rotation_augmented_online=settings)
    alone = methods.build(config, plain, plain)["rotation_augmented_online"]
    assert alone.cost(alone.grid[0]) == (2 + len(views), 2)
    stream = alone.build(alone.grid[0])
    _, (output, _) = jax.jit(stream.step)(params, stream.init(params), image, key)
    grads = jax.jit(jax.grad(parts[0]))(params, image, turn)
    adapted = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    alone_mean = jax.nn.softmax(model.classify(adapted, views)).mean(axis=0)
    np.testing.assert_allclose(jax.nn.softmax(output["logits"]), alone_mean, rtol=1e-4, atol=1e-6)

    pristine = jax.nn.softmax(model.classify(params, views)).mean(axis=0)
    assert np.abs(mean - pristine).max() > 1e-4

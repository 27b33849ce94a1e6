"""Second derivatives forward over reverse are those of reverse over reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.methods import tiny_decoder as tiny
from ttt_jax import methods, models

KEY = jax.random.key(0)
SGD = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3))
READ = ttt.readers.recomputed(tiny.decode, context=8)


def inner(params, x, key):
    """Of weights inside, outside and of none, of a key and of integers."""
    hidden = jnp.tanh(x["inputs"] @ params["in"] + jax.random.normal(key, (3,))[None])
    made = hidden @ params["fast"]
    places = jnp.arange(made.shape[0])
    kept = made[places, x["labels"]]
    return jnp.log(jnp.exp(made).sum(-1)).mean() - kept.mean(), {"rows": made, "places": places}


def instance():
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(4, 3)), "fast": rng.normal(size=(3, 5)), "n": np.int32(3)}
    x = {"inputs": rng.normal(size=(6, 4)), "labels": rng.integers(5, size=6)}
    return jax.tree.map(jnp.asarray, (params, x))


def both(gradient):
    """In reverse, and mixed."""
    return [jax.jit(gradient(mixed)) for mixed in (False, True)]


def close(actual, due, rtol=1e-12):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(due))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("remat", [0, None])
@pytest.mark.parametrize("optimizer", [SGD, optax.adam(0.1)])
def test_mixed_is_reverse_through_steps_of_any_optimizer(optimizer, remat):
    """What a step leaves beside the weights is in the outer loss, too."""
    select = ttt.select.paths("fast")

    def gradient(mixed):
        adapter = ttt.gradient_adapter(
            inner, optimizer, select=select, has_aux=True, mixed=mixed, anchor=0.1
        )

        def loss(params, x, key):
            def step(state, key):
                state, info = adapter.step(params, state, x, key)
                return state, (info.loss, info.aux["rows"])

            keys = jax.random.split(key, 4)
            state, (losses, rows) = ttt.meta.scan(step, adapter.init(params), keys, remat=remat)
            last = jnp.sin(adapter.merge(params, state)["fast"]).sum()
            return losses @ jnp.arange(4.0) + jnp.square(rows[1:]).sum() + last

        def of_floats(params, x, key):
            def by_floats(floats, inputs):
                return loss(floats | {"n": params["n"]}, x | {"inputs": inputs}, key)

            floats = {name: params[name] for name in ("in", "fast")}
            return jax.value_and_grad(by_floats, (0, 1))(floats, x["inputs"])

        return of_floats

    with jax.enable_x64(True):
        params, x = instance()
        due, actual = (run(params, x, KEY) for run in both(gradient))
        assert float(jnp.abs(due[1][0]["in"]).max()) > 1e-2
        close(actual, due)
        # Through the steps of many instances at once.
        xs = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), x)
        keys = jax.random.split(KEY, 2)
        close(*(jax.vmap(run, (None, 0, 0))(params, xs, keys) for run in both(gradient)))


def test_closed_over_values_of_a_mapped_function_are_differentiated():
    """A loss that is made within ``vmap`` and ``grad``, of traced weights and integers."""

    def gradient(mixed):
        def total(scale, index):
            def loss(params, x, key):
                return scale * jnp.sin(params["w"])[index] ** 2

            adapter = ttt.gradient_adapter(
                loss, optax.sgd(0.1), select=ttt.select.paths("w"), mixed=mixed
            )
            params = {"w": jnp.arange(1.0, 4.0)}
            state, _ = ttt.inner_loop(adapter, 2)(params, adapter.init(params), (), KEY)
            return jnp.square(state.fast["w"]).sum()

        return jax.vmap(jax.grad(total))

    with jax.enable_x64(True):
        given = jnp.array([0.5, 2.0]), jnp.array([0, 2])
        due, actual = (gradient(mixed)(*given) for mixed in (False, True))
        close(actual, due)
        shift = 1e-6
        sides = [both(gradient)[1](given[0] + s, given[1]) for s in (shift, -shift)]
        assert due.shape == (2,) and bool((sides[0] != sides[1]).all())


def of_documents(build, **options):
    """Outer loss of a document by parameters, and its gradient."""

    def loss(params, x, key):
        return build(READ, select=tiny.DOWN, **options)(params, x, key)[0].mean()

    return jax.jit(jax.value_and_grad(loss))


METHODS = {
    "end_to_end": functools.partial(of_documents, methods.end_to_end, optimizer=SGD),
    "in_place": functools.partial(of_documents, methods.in_place, max_norm=0.3),
}


@pytest.mark.parametrize("name", METHODS)
def test_gradients_through_a_document_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tiny.PARAMS)
        x = jnp.asarray(tiny.TOKENS[0])
        run = METHODS[name](remat=2, mixed=True)
        value, grads = run(params, x, KEY)
        for options in ({"remat": 0, "mixed": False}, {"remat": None, "mixed": False}):
            close((value, grads), METHODS[name](**options)(params, x, KEY))
        rng = np.random.default_rng(2)
        for _ in range(3):
            direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
            sides = [
                run(jax.tree.map(lambda a, d, s=s: a + s * d, params, direction), x, KEY)[0]
                for s in (1e-6, -1e-6)
            ]
            slope = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(direction)))
            np.testing.assert_allclose((sides[0] - sides[1]) / 2e-6, slope, rtol=1e-6)
        # The steps are part of it: their first-order gradient is another one.
        still = METHODS[name](num_steps=0)(params, x, KEY)[1]
        assert (
            float(jnp.abs(still["params"]["up"]["kernel"] - grads["params"]["up"]["kernel"]).max())
            > 1e-4
        )


def test_a_decoder_is_trained_through_its_cache():
    """Fast weights, keys and values of earlier chunks are all in the gradient."""
    with jax.enable_x64(True):
        module = models.Decoder(
            **{"vocabulary": tiny.VOCABULARY, "width": 8, "depth": 2, "heads": 2, "mlp_width": 12},
            **{"stages": (1, 1), "window": 5, "attention": "xla", "dtype": jnp.float64},
            cache_gradients=True,
        )
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) * (1.0 if leaf.ndim < 2 else 15.0),
            jax.jit(module.init)(KEY, np.zeros((1, 2), np.int32)),
        )
        x = jnp.asarray(tiny.TOKENS[0])

        def gradient(mixed, module=module):
            predict = methods.end_to_end(models.reader(module), remat=2 * mixed, mixed=mixed)
            return jax.value_and_grad(lambda params: predict(params, x, KEY)[0].mean())

        runs = both(gradient)
        (due, slopes), actual = (run(params) for run in runs)
        close(actual, (due, slopes))
        rng = np.random.default_rng(3)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
        sides = [
            runs[0](jax.tree.map(lambda a, d, s=s: a + s * d, params, direction))[0]
            for s in (1e-7, -1e-7)
        ]
        slope = sum(map(np.vdot, jax.tree.leaves(slopes), jax.tree.leaves(direction)))
        np.testing.assert_allclose((sides[0] - sides[1]) / 2e-7, slope, rtol=1e-5)
        # A cache that keeps gradients to itself gives the same scores and another gradient.
        held, other = jax.jit(gradient(True, module.clone(cache_gradients=False)))(params)
        np.testing.assert_allclose(held, due, rtol=1e-12)
        first, second = (g["params"]["layers_0"]["attention"]["value"] for g in (slopes, other))
        assert np.abs(first["kernel"] - second["kernel"]).max() > 1e-2

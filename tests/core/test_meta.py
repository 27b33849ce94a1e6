"""Outer training: gradients through the inner steps, and what is left out of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt

KEY = jax.random.key(0)


def quadratic(params, x, key):
    """Its second derivative in w is the matrix a."""
    w = params["w"]
    return 0.5 * w @ (params["a"] @ w) - x["b"] @ w


def outer(params, x, key):
    return jnp.sum(jnp.sin(params["w"]) * x["c"])


def instance(seed=0):
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(3, 3))
    params = {"w": jnp.asarray(rng.normal(size=3)), "a": jnp.asarray(half @ half.T / 3)}
    x = {"b": jnp.asarray(rng.normal(size=3)), "c": jnp.asarray(rng.normal(size=3))}
    return params, x


def adapter_of(select=None, optimizer=None):
    select = select or ttt.select.paths("w")
    return ttt.gradient_adapter(quadratic, optimizer or optax.sgd(0.1), select=select)


@pytest.mark.parametrize("remat", [None, 0, 1, 2, 3, 7])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_gradients_through_gradient_steps_are_those_of_the_formula(num_steps, remat):
    """w_S = M^S w + ..., M = 1 - 0.1 a: the outer gradient is M^S of that at the end."""
    with jax.enable_x64(True):
        params, x = instance()
        loss = ttt.meta.adapted_loss(adapter_of(), outer, num_steps=num_steps, remat=remat)
        matrix = np.eye(3) - 0.1 * np.asarray(params["a"])
        w = np.asarray(params["w"])
        for _ in range(num_steps):
            w = w - 0.1 * (np.asarray(params["a"]) @ w - np.asarray(x["b"]))
        np.testing.assert_allclose(loss(params, x, KEY), np.sum(np.sin(w) * x["c"]), rtol=1e-12)
        due = np.linalg.matrix_power(matrix, num_steps) @ (np.cos(w) * np.asarray(x["c"]))
        grads = jax.grad(loss)(params, x, KEY)
        np.testing.assert_allclose(grads["w"], due, rtol=1e-10)
        # The curvature is frozen inside and trained outside, through the steps alone.
        shift = 1e-6 * np.eye(3)
        sides = [loss({**params, "a": params["a"] + s * shift}, x, KEY) for s in (1, -1)]
        slope = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(np.trace(grads["a"]), slope, rtol=1e-5)


def test_first_order_is_the_gradient_at_the_adapted_weights():
    with jax.enable_x64(True):
        params, x = instance()
        adapter = adapter_of()
        full = ttt.meta.adapted_loss(adapter, outer, num_steps=4)
        first = ttt.meta.adapted_loss(adapter, outer, num_steps=4, first_order=True)
        assert first(params, x, KEY) == full(params, x, KEY)
        state, _ = ttt.inner_loop(adapter, 4)(params, adapter.init(params), x, KEY)
        due = np.cos(state.fast["w"]) * x["c"]
        grads = jax.grad(first)(params, x, KEY)
        np.testing.assert_allclose(grads["w"], due, rtol=1e-12)
        np.testing.assert_array_equal(grads["a"], 0)
        assert np.abs(jax.grad(full)(params, x, KEY)["w"] - due).max() > 1e-2


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_any_optimizer_is_differentiated_through(optimizer):
    with jax.enable_x64(True):
        params, x = instance()
        loss = ttt.meta.adapted_loss(adapter_of(optimizer=optimizer), outer, num_steps=6)
        grads = jax.grad(loss)(params, x, KEY)["w"]
        for place in range(3):
            shift = 1e-6 * np.eye(3)[place]
            sides = [loss({**params, "w": params["w"] + s * shift}, x, KEY) for s in (1, -1)]
            np.testing.assert_allclose(grads[place], (sides[0] - sides[1]) / 2e-6, rtol=1e-5)


def test_no_step_is_the_loss_itself():
    params, x = instance()
    loss = ttt.meta.adapted_loss(adapter_of(), outer, num_steps=0)
    assert loss(params, x, KEY) == outer(params, x, KEY)


def test_inner_steps_have_the_keys_of_episodic():
    def noisy(params, x, key):
        return jnp.sum(params["w"] * jax.random.normal(key, (3,)))

    adapter = ttt.gradient_adapter(noisy, optax.sgd(0.1), select=ttt.select.paths("w"))
    params, x = instance()
    loss = ttt.meta.adapted_loss(adapter, outer, num_steps=3)
    predict = ttt.episodic(adapter, lambda p, x: outer(p, x, None), num_steps=3)
    np.testing.assert_allclose(loss(params, x, KEY), predict(params, x, KEY)[0], rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 5])
def test_an_instance_that_is_not_finite_is_left_out(chunk_size):
    params = {"w": jnp.arange(3.0), "step": jnp.int32(4)}
    xs = jnp.array([[1.0, 2, 3], [jnp.nan, 0, 0], [3.0, 2, 1], [-1.0, 4, 2], [0.5, 1, jnp.inf]])
    keys = ttt.sample_keys(KEY, range(5))

    def loss(params, x, key):
        return jnp.sum(jnp.square(params["w"] - x))

    call = ttt.meta.value_and_grad(loss, chunk_size=chunk_size, report=True)
    (value, about), grads = jax.jit(call)(params, xs, keys)
    kept = np.asarray(xs)[[0, 2, 3]]
    assert about["ok"].tolist() == [True, False, True, True, False]
    np.testing.assert_allclose(value, np.square(np.arange(3.0) - kept).sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(grads["w"], 2 * (np.arange(3.0) - kept).mean(0), rtol=1e-6)
    assert grads["step"] == 0 and grads["step"].dtype == jnp.int32


def test_a_gradient_that_is_not_finite_is_left_out_though_its_loss_is():
    def loss(params, x, key):
        return jnp.sqrt(params["w"] * x)

    keys = ttt.sample_keys(KEY, range(2))
    call = ttt.meta.value_and_grad(loss)
    value, grads = call({"w": jnp.float32(4.0)}, jnp.array([0.0, 4.0]), keys)
    assert (value, grads["w"]) == (4.0, 0.5)


def test_none_finite_gives_no_step():
    call = ttt.meta.value_and_grad(lambda params, x, key: params["w"] * x)
    keys = ttt.sample_keys(KEY, range(2))
    value, grads = call({"w": jnp.float32(1.0)}, jnp.array([jnp.nan, jnp.inf]), keys)
    assert np.isnan(value) and grads["w"] == 0


def test_outer_training_makes_adapting_help():
    """Sines of other phases: after training, a step on three points lowers the error elsewhere."""

    def net(params, t):
        return jnp.tanh(jnp.outer(t, params["in"]) + params["bias"][None]) @ params["out"]

    def fit(points):
        def loss(params, x, key):
            return jnp.mean(jnp.square(net(params, x[points][0]) - x[points][1]))

        return loss

    adapter = ttt.gradient_adapter(fit("support"), optax.sgd(0.1), select=ttt.select.everything())
    outer_loss = ttt.meta.adapted_loss(adapter, fit("query"), num_steps=1)
    call = jax.jit(ttt.meta.value_and_grad(outer_loss))

    def tasks(rng):
        phase = rng.uniform(0, np.pi, (16, 1))
        t = rng.uniform(-2, 2, (2, 16, 5))
        pairs = [(a.astype(np.float32), np.sin(a + phase).astype(np.float32)) for a in t]
        return dict(zip(("support", "query"), pairs, strict=True))

    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=16), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=16), jnp.float32),
        "out": jnp.asarray(0.1 * rng.normal(size=16), jnp.float32),
    }
    optimizer = optax.adam(0.02)
    state, keys = optimizer.init(params), ttt.sample_keys(KEY, range(16))
    first, _ = call(params, tasks(np.random.default_rng(1)), keys)
    for _ in range(150):
        _, grads = call(params, tasks(rng), keys)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    held_out = tasks(np.random.default_rng(1))
    after, _ = call(params, held_out, keys)
    still, _ = ttt.meta.value_and_grad(fit("query"))(params, held_out, keys)
    assert after < 0.5 * first and after < 0.7 * still


@pytest.mark.parametrize("remat", [None, 0, 1, 3, 20])
def test_a_scan_that_computes_again_is_a_scan(remat):
    def body(carry, x):
        carry = jnp.tanh(carry * 1.1 + x)
        return carry, carry * x

    def total(start, xs, run):
        last, made = run(body, start, xs)
        return last + made.sum()

    xs = jnp.linspace(-1, 1, 7)
    due = jax.value_and_grad(total, (0, 1))(0.3, xs, jax.lax.scan)
    again = jax.value_and_grad(total, (0, 1))(
        0.3, xs, lambda *given: ttt.meta.scan(*given, remat=remat)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, due)


def test_what_the_backward_pass_holds_grows_with_the_root_of_the_steps():
    """Bytes of the compiled program, whose steps each leave 64 kB for their derivative."""

    def body(carry, x):
        wide = jnp.sin(jnp.outer(carry, carry) * x)
        return jnp.tanh(wide @ carry), None

    def bytes_of(count, remat):
        def loss(start):
            return ttt.meta.scan(body, start, jnp.ones(count), remat=remat)[0].sum()

        shape = jax.ShapeDtypeStruct((128,), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(shape).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(64, 0) > 3.5 * bytes_of(16, 0)
    assert bytes_of(64, None) < 1.5 * bytes_of(16, None)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ttt.meta.adapted_loss(quadratic, outer, num_steps=1), "adapter"),
        (lambda: ttt.meta.adapted_loss(adapter_of(), outer, num_steps=-1), "num_steps"),
        (lambda: ttt.meta.value_and_grad(3), "outer_loss"),
        (lambda: ttt.meta.value_and_grad(outer, chunk_size=0), "chunk_size"),
        (
            lambda: ttt.meta.value_and_grad(lambda p, x, k: p["w"])(
                instance()[0], jnp.ones(2), ttt.sample_keys(KEY, range(2))
            ),
            "scalar; got shape",
        ),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize("double", [False, True])
def test_dtypes_are_those_of_the_weights(double):
    """Under strict promotion, with 64 bits and without, and inside ``shard_map``."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.enable_x64(double), jax.numpy_dtype_promotion("strict"):
        params = {"w": jnp.ones(3, jnp.float32), "a": jnp.eye(3, dtype=jnp.float32)}
        xs = {name: jnp.ones((4, 3), jnp.float32) for name in ("b", "c")}
        keys = ttt.sample_keys(KEY, np.arange(4))
        loss = ttt.meta.adapted_loss(adapter_of(), outer, num_steps=3)
        call = ttt.meta.value_and_grad(loss, chunk_size=2)
        value, grads = call(params, xs, keys)
        assert {value.dtype, grads["w"].dtype, grads["a"].dtype} == {jnp.dtype(jnp.float32)}
        rows = jax.sharding.PartitionSpec("data")
        whole = jax.sharding.PartitionSpec()

        def mean(params, xs, keys):
            value, grads = call(jax.lax.pcast(params, "data", to="varying"), xs, keys)
            return jax.lax.pmean((value, grads), "data")

        parts = jax.shard_map(mean, mesh=mesh, in_specs=(whole, rows, rows), out_specs=whole)
        for made, due in zip(
            *map(jax.tree.leaves, (parts(params, xs, keys), (value, grads))), strict=True
        ):
            np.testing.assert_allclose(made, due, rtol=1e-6)

"""Inside a ``jax.shard_map`` of the caller's own every instance adapts a copy of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ttt_jax as ttt
from ttt_jax import diagnostics, losses, resets, select

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 4,
    reason="needs four devices (CPU: --xla_force_host_platform_device_count)",
)
ROWS = jax.random.normal(jax.random.key(9), (8, 4))
KEYS = ttt.sample_keys(jax.random.key(2), np.arange(8))


def model(params, x):
    return jnp.tanh(x @ params["enc"]["w"]) @ params["head"]["w"]


def params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "enc": {"w": jax.random.normal(first, (4, 6))},
        "head": {"w": jax.random.normal(second, (6, 3))},
    }


def everywhere(function, axis_type=AxisType.Auto):
    """``function(params, xs, keys)`` with two instances on each of four devices."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:4])
    specs = {"in_specs": (P(), P("d"), P("d")), "out_specs": P("d")}
    xs, keys = jax.device_put((ROWS, KEYS), NamedSharding(mesh, P("d")))
    with jax.set_mesh(mesh):
        return jax.jit(jax.shard_map(function, mesh=mesh, **specs))(params(), xs, keys)


def agree(function, axis_type=AxisType.Auto):
    want = jax.jit(function)(params(), ROWS, KEYS)
    got = everywhere(function, axis_type)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


ENTROPY = losses.entropy(model)
OPTIONS = {"select": select.everything()}


def memory_loss():
    """Remembers the first weights it met, then those of each step, and a count of nothing."""

    def value(params, memory, x, key):
        gap = jnp.square(params["head"]["w"] - memory["teacher"]).mean()
        return ENTROPY(params, x, key) + gap, {"teacher": params["head"]["w"], "still": jnp.ones(2)}

    def init(params):
        return {"teacher": jnp.zeros((6, 3)), "still": jnp.zeros(2)}

    return ttt.StatefulLoss(init, value, lambda adapted, memory: memory)


def sharp():
    return ttt.sharpness_aware_adapter(ENTROPY, optax.sgd(0.5), rho=0.05, **OPTIONS)


ADAPTERS = {
    "sgd": lambda: ttt.gradient_adapter(ENTROPY, optax.sgd(0.5), **OPTIONS),
    "adam": lambda: ttt.gradient_adapter(ENTROPY, optax.adam(0.1), anchor=0.1, **OPTIONS),
    "memory": lambda: ttt.gradient_adapter(memory_loss(), optax.sgd(0.5), **OPTIONS),
    "sharpness aware": sharp,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_are_not_summed_over_the_devices(name):
    axis_type = AxisType.Explicit if name == "sgd" else AxisType.Auto
    predict = ttt.episodic(ADAPTERS[name](), ttt.unbatched(model), num_steps=2)
    agree(ttt.batched(predict), axis_type)


def test_a_trace_and_chunks():
    predict = ttt.episodic(ADAPTERS["sgd"](), ttt.unbatched(model), num_steps=2, trace=True)
    agree(ttt.batched(predict, chunk_size=1))


@pytest.mark.parametrize("reset", [resets.never(), resets.every(2)], ids=["never", "every"])
def test_a_document_of_chunks(reset):
    stream = ttt.online(ADAPTERS["adam"](), ttt.unbatched(model), num_steps=2, reset=reset)

    def documents(params, xs, keys):
        shifted = jnp.stack([xs, xs + 1, xs - 1], axis=1)
        return ttt.batched(ttt.unroll(stream))(params, shifted, keys)

    agree(documents)


def test_a_stream_on_every_device():
    """Its start, which all devices share, is cast by who scans it."""
    stream = ttt.online(ADAPTERS["adam"](), ttt.unbatched(model), reset=resets.never())

    def scanned(cast, params, xs, keys):
        def step(carry, pair):
            return stream.step(params, carry, *pair)

        return jax.lax.scan(step, cast(stream.init(params)), (xs, keys))[1][0]

    def own(carry):
        return jax.lax.pcast(carry, "d", to="varying")

    def alone(carry):
        return carry

    parts = [scanned(alone, params(), ROWS[i : i + 2], KEYS[i : i + 2]) for i in (0, 2, 4, 6)]
    got = everywhere(functools.partial(scanned, own))
    np.testing.assert_allclose(got, jnp.concatenate(parts), rtol=1e-4, atol=1e-5)


def test_statistics():
    variables = {"params": params(), "batch_stats": {"m": jnp.zeros(4)}}
    holes = jax.tree.map(lambda leaf: None, params())
    adapter = ttt.statistics_adapter(
        lambda variables, x: {"params": holes, "batch_stats": {"m": x}}, momentum=0.5
    )

    def apply(variables, x):
        return x - variables["batch_stats"]["m"]

    predict = ttt.episodic(adapter, apply, num_steps=3)
    agree(lambda params, xs, keys: ttt.batched(predict)(variables, xs, keys))


def test_the_fisher_diagonal():
    fisher = losses.fisher_diagonal(model, **OPTIONS)
    agree(lambda params, xs, keys: jax.vmap(fisher, (None, 0))(params, xs[:, None]))


def main_loss(params, x, label, key):
    return -jax.nn.log_softmax(model(params, x[None])[0])[label]


@pytest.mark.parametrize("ask", ["gradient_alignment", "secant_smoothness"])
def test_diagnostics(ask):
    measure = getattr(diagnostics, ask)(main_loss, ENTROPY, **OPTIONS)
    agree(lambda params, xs, keys: jax.vmap(measure, (None, 0, None, 0))(params, xs, 1, keys))


def test_step_sizes():
    def make(rate):
        return ttt.gradient_adapter(ENTROPY, optax.sgd(rate), **OPTIONS)

    predict = diagnostics.step_size_map(
        make, ttt.unbatched(model), learning_rates=[0.1, 1.0], num_steps=2
    )
    agree(ttt.batched(predict))


def test_a_loss_that_averages_over_the_devices_has_one_gradient():
    def pooled(params, xs, key, average=lambda value: value):
        return average(losses.entropy(model, batch=True)(params, xs, key))

    def adapted(average, params, xs, keys):
        loss = functools.partial(pooled, average=average)
        adapter = ttt.gradient_adapter(loss, optax.sgd(0.5), **OPTIONS)
        key = jax.random.key(0)
        return ttt.episodic(adapter, model, num_steps=2)(params, xs, key)[0]

    want = adapted(lambda value: value, params(), ROWS, KEYS)
    got = everywhere(functools.partial(adapted, lambda value: jax.lax.pmean(value, "d")))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

"""Instances spread over the devices of a mesh: the same values, and nothing is gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ttt_jax as ttt
from ttt_jax import losses, select

from . import models
from .compiling import quickly

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 4,
    reason="needs four devices (CPU: --xla_force_host_platform_device_count)",
)
DENSE = models.make_params()


def mesh_of(*shape, names=("data",)):
    count = int(np.prod(shape))
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[:count]
    )


def convolve(params, images):
    """A convolution and a head: ``[N, 6, 6, 1] -> [N, 4]``."""
    for kernel in params["kernels"]:
        images = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        images = jnp.tanh(images)
    return images.mean(axis=(1, 2)) @ params["head"]


def conv_params():
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 1, 3), (3, 3, 3, 5)]
    return {
        "kernels": [jnp.asarray(rng.normal(size=s), jnp.float32) / 3 for s in shapes],
        "head": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
    }


def rotation_ttt(apply, num_steps=2, rate=0.1, chosen=None, **options):
    adapter = ttt.gradient_adapter(
        losses.rotation(apply), optax.sgd(rate), select=chosen or select.everything()
    )
    return ttt.episodic(adapter, ttt.unbatched(apply), num_steps=num_steps, **options)


def dense_ttt(num_steps=2, rate=0.1, **options):
    return rotation_ttt(models.turn, num_steps, rate, select.norm_affine(), **options)


def inputs(count):
    """The first ones of those for a larger count."""
    return models.make_images(count), ttt.sample_keys(jax.random.key(0), jnp.arange(count))


@functools.cache
def compiled_convolutions(devices):
    mesh = mesh_of(devices) if devices > 1 else None
    program = jax.jit(ttt.batched(rotation_ttt(convolve), mesh=mesh))
    return program.lower(conv_params(), *inputs(8)).compile()


@functools.cache
def eight_alone(model):
    """``(outputs, info)`` of eight instances on one device, the outputs after 0, 1 and 2 steps."""
    if model == "dense":
        return quickly(ttt.batched(dense_ttt(trace=True)), DENSE, *inputs(8))
    (outputs, info) = compiled_convolutions(1)(conv_params(), *inputs(8))
    return outputs[:, None], info


def alone(count, model="dense"):
    """After all steps."""
    outputs, info = eight_alone(model)
    return jax.tree.map(lambda leaf: leaf[:count], (outputs[:, -1], info))


# The convolutions below are eight at once, and six one by one: here these two are in the full run.
@pytest.mark.parametrize(
    ("count", "chunk_size"),
    [
        (3, None),
        (7, 2),
        pytest.param(7, 1, marks=pytest.mark.full),
        pytest.param(8, None, marks=pytest.mark.full),
    ],
)
def test_values_equal_those_of_one_device(count, chunk_size):
    """For any number of instances; padding and chunks make no difference."""
    many = ttt.batched(dense_ttt(), mesh=mesh_of(4), chunk_size=chunk_size)
    spread = quickly(many, DENSE, *inputs(count))
    assert bool(spread[1].updated.all())
    assert spread[0].shape == (count, 4)
    ttt.audit.require_close(spread, alone(count), num_steps=2)


def test_axes_of_explicit_type_equal_one_device():
    """What ``jax.make_mesh`` makes when it is not told otherwise."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    xs, keys = models.make_images(7), ttt.sample_keys(jax.random.key(0), jnp.arange(7))
    predict = dense_ttt()
    expected = jax.jit(ttt.batched(predict))(DENSE, xs, keys)
    run = ttt.batched(predict, mesh=mesh)
    ttt.audit.require_close(jax.jit(run)(DENSE, xs, keys), expected, num_steps=2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="needs axes of automatic type"):
        run(DENSE, xs, keys)


def test_convolutions_stay_on_their_device():
    """No gather, no reduction, and the groups divided by the number of devices."""
    texts = {devices: compiled_convolutions(devices).as_text() for devices in (1, 4)}
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective", texts[4])

    def most_groups(text):
        return max(map(int, re.findall(r"feature_group_count=(\d+)", text)))

    # The widest grouped convolution has the instances times its own input channels.
    assert most_groups(texts[1]) % 8 == 0
    assert most_groups(texts[4]) * 4 == most_groups(texts[1])
    spread = compiled_convolutions(4)(conv_params(), *inputs(8))
    ttt.audit.require_close(spread, alone(8, "convolutions"), num_steps=2)


def test_uneven_convolutions_equal_one_device():
    program = ttt.batched(rotation_ttt(convolve), mesh=mesh_of(4), chunk_size=1)
    spread = quickly(program, conv_params(), *inputs(6))
    ttt.audit.require_close(spread, alone(6, "convolutions"), num_steps=2)


def test_a_shard_map_of_the_callers_own_equals_one_device():
    """With its replication checks on, jax sums gradients for shared weights over the mesh."""
    mapped = jax.vmap(dense_ttt(num_steps=1), in_axes=(None, 0, 0))
    obvious = jax.shard_map(
        mapped, mesh=mesh_of(4), in_specs=(P(), P("data"), P("data")), out_specs=P("data")
    )
    spread, _ = quickly(obvious, DENSE, *inputs(8))
    path, _ = eight_alone("dense")
    ttt.audit.require_close(spread, path[:, 1], num_steps=1)


def test_second_axis_stays_automatic():
    """Parameters sharded over another axis of the mesh stay so; only that axis is reduced."""
    mesh = mesh_of(2, 2, names=("data", "model"))
    predict = rotation_ttt(convolve)
    params = conv_params()
    sharded = jax.device_put(params, NamedSharding(mesh, P()))
    sharded["head"] = jax.device_put(params["head"], NamedSharding(mesh, P(None, "model")))
    spread = quickly(ttt.batched(predict, mesh=mesh), sharded, *inputs(5))
    ttt.audit.require_close(spread, alone(5, "convolutions"), num_steps=2)


def test_another_axis_name():
    batched = ttt.batched(dense_ttt(), mesh=mesh_of(2, names=("batch",)), axis="batch")
    ttt.audit.require_close(quickly(batched, DENSE, *inputs(3)), alone(3), num_steps=2)


def test_model_function_may_scan_from_zeros():
    """A recurrent model starts its carry from a constant, which differs from device to device."""

    def recurrent(params, images):
        def read(carry, row):
            return jnp.tanh(carry + row @ params["in"]), None

        rows = jnp.moveaxis(images[..., 0], 1, 0)
        carry, _ = jax.lax.scan(read, jnp.zeros((images.shape[0], 5)), rows)
        return carry @ params["out"]

    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
        "out": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
    }
    predict = rotation_ttt(recurrent, num_steps=1)
    one = quickly(ttt.batched(predict), params, *inputs(5))
    spread = quickly(ttt.batched(predict, mesh=mesh_of(4)), params, *inputs(5))
    assert bool(spread[1].updated.all())
    ttt.audit.require_close(spread, one, num_steps=1)


def test_integer_and_key_leaves():
    def keyed(params, images):
        noise = jax.random.normal(params["key"], (4,)) * params["count"]
        return images.reshape(images.shape[0], -1) @ params["kernel"] + noise[None]

    kernel = DENSE["params"]["decoder"]["kernel"].reshape(-1, 4)[: models.SIDE**2]
    params = {"kernel": kernel, "key": jax.random.key(5), "count": jnp.asarray(3)}
    predict = rotation_ttt(keyed, num_steps=1)
    one = quickly(ttt.batched(predict), params, *inputs(5))
    spread = quickly(ttt.batched(predict, mesh=mesh_of(4)), params, *inputs(5))
    ttt.audit.require_close(spread, one, num_steps=2)


def test_hyper_parameters_may_be_traced():
    def run(rate, *args):
        return ttt.batched(dense_ttt(rate=rate), mesh=mesh_of(4))(*args)

    ttt.audit.require_close(quickly(run, 0.1, DENSE, *inputs(5)), alone(5), num_steps=2)


def test_outside_of_jit():
    predict = ttt.source(lambda params, x: params * x[0, 0])
    xs, keys = inputs(5)
    outputs, _ = ttt.batched(predict, mesh=mesh_of(4))(2.0, xs, keys)
    np.testing.assert_array_equal(outputs, 2 * np.asarray(xs)[:, 0, 0])


class TestErrors:
    PREDICT = staticmethod(ttt.source(lambda params, x: x))

    def test_unknown_axis(self):
        with pytest.raises(ValueError, match=r"(?s)axis of the mesh.*'samples'.*'data'"):
            ttt.batched(self.PREDICT, mesh=mesh_of(4), axis="samples")

    def test_several_axes_need_jit(self):
        mesh = mesh_of(2, 2, names=("data", "model"))
        with pytest.raises(ValueError, match=r"(?s)under jax\.jit.*'data', 'model'.*jax\.jit\(b"):
            ttt.batched(self.PREDICT, mesh=mesh)({}, *inputs(4))

"""A decoder split over devices while each instance has its own low-rank factors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ttt_jax as ttt
from ttt_jax import budget, checkpoint, select

from .compiling import quickly

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 4,
    reason="needs four devices (CPU: --xla_force_host_platform_device_count)",
)
# No two parameters, nor a share of one, have the same shape.
LAYERS, WIDTH, HEADS, VOCABULARY, RANK, TOKENS = 4, 64, 4, 144, 2, 6
INSTANCES = 5
# Columns of what feeds heads and hidden units, rows of what reads them: one sum over the devices
# per half of a block (Shoeybi et al., 2019, "Megatron-LM").
SHARDING = {
    "embed": P("model", None),
    "query": P(None, None, "model"),
    "key": P(None, None, "model"),
    "value": P(None, None, "model"),
    "out": P(None, "model", None),
    "up": P(None, None, "model"),
    "down": P(None, "model", None),
}


def decoder_params():
    """Layers are stacked on a first axis; low-rank factors sit beside the query's kernel."""
    rng = np.random.default_rng(0)
    shapes = {
        **{name: (LAYERS, WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
        "up": (LAYERS, WIDTH, 5 * WIDTH),
        "down": (LAYERS, 5 * WIDTH, WIDTH),
        "query_lora_a": (LAYERS, WIDTH, RANK),
        "query_lora_b": (LAYERS, RANK, WIDTH),
    }

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    return {
        "embed": draw((VOCABULARY, WIDTH)),
        "blocks": {name: draw(shape) for name, shape in shapes.items()},
    }


def decode(params, tokens):
    """Causal: ``tokens[N, T] -> logits[N, T, V]``."""

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, WIDTH // HEADS)

    def block(x, layer):
        y = normed(x)
        query = heads(y @ layer["query"] + (y @ layer["query_lora_a"]) @ layer["query_lora_b"])
        key, value = heads(y @ layer["key"]), heads(y @ layer["value"])
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + mixed.reshape(x.shape) @ layer["out"]
        return x + jax.nn.gelu(normed(x) @ layer["up"]) @ layer["down"], None

    x, _ = jax.lax.scan(block, params["embed"][tokens], params["blocks"])
    return normed(x) @ params["embed"].T


def next_token(params, tokens, key):
    del key
    logits = jax.nn.log_softmax(decode(params, tokens[None])[0, :-1])
    return -jnp.take_along_axis(logits, tokens[1:, None], axis=1).mean()


ADAPTER = ttt.gradient_adapter(next_token, optax.adam(1e-2), select=select.lora())
PREDICT = ttt.episodic(ADAPTER, ttt.unbatched(decode), num_steps=3)


def mesh_of(data, model):
    axis_types = (AxisType.Auto,) * 2
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=axis_types, devices=devices)


def shardings(mesh, params):
    """Factors are replicated: each instance has its own, where the instance is."""

    def one(path, leaf):
        del leaf
        return NamedSharding(mesh, SHARDING.get(path[-1].key, P()))

    return jax.tree_util.tree_map_with_path(one, params)


def inputs():
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (INSTANCES, TOKENS)), jnp.int32)
    return tokens, ttt.sample_keys(jax.random.key(0), np.arange(INSTANCES))


@pytest.fixture(scope="module")
def alone():
    """On one device: after the steps, and before them."""

    def both(params, tokens, keys):
        return ttt.batched(PREDICT)(params, tokens, keys), decode(params, tokens)

    return quickly(both, decoder_params(), *inputs())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "decoder"
    checkpoint.save(path, decoder_params())
    return path


@functools.cache
def compiled(shape):
    mesh, params = mesh_of(*shape), decoder_params()
    placed = jax.device_put(params, shardings(mesh, params))
    run = ttt.batched(PREDICT, mesh=mesh, chunk_size=1)
    return jax.jit(run).lower(placed, *inputs()).compile()


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_a_split_decoder_equals_one_device(alone, saved, shape):
    """From a checkpoint, which goes straight to where its parts belong."""
    placement = shardings(mesh_of(*shape), decoder_params())
    placed = checkpoint.load(saved, sharding=placement).params
    shard = placed["blocks"]["up"].addressable_shards[0].data
    assert shard.shape == (LAYERS, WIDTH, 5 * WIDTH // shape[1])
    logits, info = compiled(shape)(placed, *inputs())
    assert bool(info.updated.all())
    (expected, one), before = alone
    ttt.audit.require_close(info.loss, one.loss, num_steps=3)
    ttt.audit.require_close(logits, expected, num_steps=3)
    assert np.abs(logits - before).max() > 0.1


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_no_device_holds_the_decoder(shape):
    """A device needs its share and little more: parameters are not gathered, only activations."""
    program, params = compiled(shape), decoder_params()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    owned = 4 * budget.copy_bytes(ADAPTER, params)  # parameters, moments, gradient
    assert budget.used(program) < whole / shape[1] + owned + whole / 4
    for name in ("query", "up", "down", "embed"):
        leaf = params.get(name, params["blocks"].get(name))
        for part in (leaf.shape, leaf.shape[1:]):
            if len(part) > 1:
                dimensions = ",".join(map(str, part))
                assert not re.search(rf"f32\[(\d+,)?{dimensions}\]", program.as_text()), name

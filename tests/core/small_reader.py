"""A reader of one attention layer with a low-rank key, in a few lines: it compiles at once."""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.models import cache
from ttt_jax.readers import Reader

VOCABULARY, WIDTH, RANK = 16, 8, 2


def draw_params(seed=0, rank=RANK):
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "query": (WIDTH, WIDTH),
        "value": (WIDTH, WIDTH),
        "key": (WIDTH, WIDTH),
        "key_lora_a": (WIDTH, rank),
    }
    drawn = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    return {"params": drawn | {"key_lora_b": jnp.zeros((rank, WIDTH))}}


def init(batch, tokens, chunk):
    empty = jnp.zeros((batch, tokens, WIDTH))
    return empty, empty, jnp.full((batch, tokens), cache.EMPTY, jnp.int32)


def read(params, memory, inputs):
    p, positions = params["params"], inputs["positions"]
    slots = cache.slots_of(positions, 0, memory[2].shape[1])
    x = p["embedding"][inputs["tokens"]]
    # As with any cache, what was remembered is no part of the gradient.
    keys, values, places = (
        cache.write(jax.lax.stop_gradient(held), slots, rows)
        for held, rows in zip(
            memory,
            (x @ p["key"] + x @ p["key_lora_a"] @ p["key_lora_b"], x @ p["value"], positions),
            strict=True,
        )
    )
    seen = (places[:, None] >= 0) & (places[:, None] <= positions[:, :, None])
    scores = jnp.where(seen, x @ p["query"] @ keys.swapaxes(1, 2), -1e30)
    mixed = x + jax.nn.softmax(scores) @ values
    return mixed @ p["embedding"].T, (keys, values, places)


READER = Reader(init, read)


def model(params, tokens):
    """``tokens[N, T] -> logits[N, T, V]`` without a memory."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    memory = init(*tokens.shape, tokens.shape[1])
    return read(params, memory, {"tokens": tokens, "positions": positions})[0]

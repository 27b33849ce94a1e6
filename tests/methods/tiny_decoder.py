"""Two small models of tokens and some documents, for the methods over text.

``decode`` is a plain function that is quick to trace: embeddings, a causal mean over what a token
sees, one gated layer. ``MODULE`` is a Decoder of a few hundred weights, whose reader has a cache.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import models, readers, select

VOCABULARY, CHUNKS, LENGTH, WIDTH = 13, 4, 6, 8
RNG = np.random.default_rng(1)
TOKENS = RNG.integers(VOCABULARY, size=(3, CHUNKS, LENGTH)).astype(np.int32)
DOCUMENTS = {"tokens": TOKENS, "mask": np.ones(TOKENS.shape, np.float32)}
DOWN = select.paths(".*down/kernel")


def _matrix(rows, columns):
    return jnp.asarray(RNG.normal(size=(rows, columns)) / np.sqrt(rows / 3), jnp.float32)


PARAMS = {
    "params": {
        "embedding": _matrix(VOCABULARY, WIDTH),
        "mix": {"kernel": _matrix(WIDTH, WIDTH)},
        "up": {"kernel": _matrix(WIDTH, WIDTH)},
        "down": {"kernel": _matrix(WIDTH, WIDTH)},
        "head": _matrix(WIDTH, VOCABULARY),
    }
}


def decode(params, inputs):
    """``[N, T] -> [N, T, V]``; a token sees those at positions from 0 to its own."""
    return decode_with_hidden(params, inputs)[0]


def decode_with_hidden(params, inputs):
    """The logits, and the inputs of the matrix ``down``."""
    params = params["params"]
    tokens = inputs["tokens"] if isinstance(inputs, dict) else inputs
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    if isinstance(inputs, dict):
        places = inputs["positions"]
    x = params["embedding"][tokens]
    seen = (places[:, None] <= places[:, :, None]) & (places[:, None] >= 0)
    seen = seen.astype(jnp.float32)
    weights = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1.0)
    mixed = jnp.einsum("nts,nsd->ntd", weights, jnp.where((places >= 0)[..., None], x, 0.0))
    x = x + mixed @ params["mix"]["kernel"]
    hidden = jax.nn.silu(x @ params["up"]["kernel"])
    x = x + hidden @ params["down"]["kernel"]
    return jnp.tanh(x) @ params["head"], hidden


MODULE = models.Decoder(vocabulary=VOCABULARY, width=WIDTH, depth=2, heads=2, mlp_width=12)
MODULE_PARAMS = jax.tree.map(
    # Weights that are large enough for every token to have its own mind.
    lambda leaf: leaf * (1.0 if leaf.ndim < 2 else 20.0),
    jax.jit(MODULE.init)(jax.random.key(0), np.zeros((1, 4), np.int32)),
)
# Reader by name, and its parameters.
READERS = {
    "cached": (models.reader(MODULE), MODULE_PARAMS),
    "recomputed": (readers.recomputed(decode, context=CHUNKS * LENGTH), PARAMS),
    "isolated": (readers.isolated(decode), PARAMS),
}
PLAIN = READERS["recomputed"][0]


def document(index):
    return {name: leaf[index] for name, leaf in DOCUMENTS.items()}


def nats_of(logits, tokens):
    """Nats of each token under ``logits[..., V]`` for it, in float64."""
    logits = np.asarray(logits, np.float64)
    largest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    return total - np.take_along_axis(logits, np.asarray(tokens)[..., None], -1)[..., 0]

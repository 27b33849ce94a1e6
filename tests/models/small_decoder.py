"""A small decoder with low-rank leaves, all of its parameters drawn, and what it reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import models, select

VOCABULARY = 24
NET = models.Decoder(
    vocabulary=VOCABULARY, width=16, depth=3, heads=2, kv_heads=1, mlp_width=24, attention="xla"
)
RANK, ALPHA = 2, 8.0
TARGETS = (".*/query", ".*/down")


@functools.cache
def base():
    """The decoder's variables, large enough that the most probable token stands out."""
    params = jax.jit(NET.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 10 * leaf, params)


@functools.cache
def with_factors(rank=RANK, alpha=ALPHA, paths=TARGETS):
    """The decoder with low-rank leaves, and its variables; what they add is zero at first."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return models.low_rank(
        NET, base(), jax.random.key(1), tokens, rank=rank, alpha=alpha, paths=paths
    )


def drawn_adapters(params, count, scale=0.3):
    """So many adapters side by side, each leaf drawn: ``[count, ...]``, None for the base."""
    fast = select.lora().split(params)[0]
    leaves, treedef = jax.tree.flatten(fast)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(scale * rng.normal(size=(count, *a.shape)), a.dtype) for a in leaves]
    return jax.tree.unflatten(treedef, drawn)


def row_of(tree, place):
    return jax.tree.map(lambda leaf: leaf[place], tree)


def draw_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape).astype(np.int32)

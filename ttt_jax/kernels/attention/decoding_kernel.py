"""Attention of one new token per sequence to the slots that it sees, for a GPU.

A program per sequence and head folds tiles of the cache: every slot of a tile keeps a softmax of
its own, and they are joined once at the end, so that nothing is summed over slots on the way. No
matrix units: with one query the reading of the cache is all that costs. Written in Pallas for its
Triton backend.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Slots of a tile, and warps of a program.
TILE, WARPS = 64, 4
# Of a slot that is not seen: finite, as a difference of infinities is no number.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)


def _kernel(*refs: Any, scale: float) -> None:
    layer_ref, begin_ref, end_ref, query_ref, key_ref, value_ref, keys_ref, values_ref, out_ref = (
        refs
    )
    query = query_ref[...].astype(jnp.float32) * (scale * _LOG2_E)
    layer, begin, end = layer_ref[...], begin_ref[...], end_ref[...]

    def tile(ref: Any, index: Any, inside: jax.Array) -> jax.Array:
        place = ref.at[layer, pl.ds(index * TILE, TILE)]
        mask = jnp.broadcast_to(inside[:, None], (TILE, ref.shape[-1]))
        return plgpu.load(place, mask=mask, other=0.0).astype(jnp.float32)

    def body(index: Any, carry: Any) -> Any:
        mixed, total, most = carry
        slots = index * TILE + jnp.arange(TILE)
        inside = (slots >= begin) & (slots < end)
        scores = (tile(keys_ref, index, inside) * query[None]).sum(1)
        scores = jnp.where(inside, scores, _LOWEST)
        highest = jnp.maximum(most, scores)
        weights = jnp.where(inside, jnp.exp2(scores - highest), 0.0)
        shrunk = jnp.exp2(most - highest)
        mixed = mixed * shrunk[:, None] + weights[:, None] * tile(values_ref, index, inside)
        return mixed, total * shrunk + weights, highest

    start = (
        jnp.zeros((TILE, query.shape[0]), jnp.float32),
        jnp.zeros(TILE, jnp.float32),
        jnp.full(TILE, _LOWEST, jnp.float32),
    )
    tiles = jnp.where(end > begin, (end + (TILE - 1)) // TILE, 0)
    mixed, total, most = jax.lax.fori_loop(begin // TILE, tiles, body, start)
    itself = (query * key_ref[...].astype(jnp.float32)).sum()
    highest = jnp.maximum(most.max(), itself)
    shares, own = jnp.exp2(most - highest), jnp.exp2(itself - highest)
    value = value_ref[...].astype(jnp.float32)
    mixed = (mixed * shares[:, None]).sum(0) + own * value
    out_ref[...] = (mixed / ((total * shares).sum() + own)).astype(out_ref.dtype)


def attend(
    scale: float, token: Any, cache: Any, layer: jax.Array, begin: jax.Array, end: jax.Array
) -> jax.Array:
    """:func:`ttt_jax.kernels.attention.decoding.attend_token`; interpreted away from a GPU."""
    batch, heads, size = token[0].shape
    layers, _, slots = cache[0].shape[:3]
    number = pl.BlockSpec((None,), lambda n, h: (n,))
    row = pl.BlockSpec((None, None, size), lambda n, h: (n, h, 0))
    # Of every layer: which one is a number on the device.
    held = pl.BlockSpec((layers, None, slots, None, size), lambda n, h: (0, n, 0, h, 0))
    call = pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid=(batch, heads),
        in_specs=[
            pl.BlockSpec((None,), lambda n, h: (0,)),
            *[number] * 2,
            *[row] * 3,
            *[held] * 2,
        ],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(token[0].shape, token[0].dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        interpret=jax.default_backend() != "gpu",
        name="decoding_attention",
    )
    numbers = (jnp.reshape(layer, 1), begin, end)
    result: jax.Array = call(*(each.astype(jnp.int32) for each in numbers), *token, *cache)
    return result

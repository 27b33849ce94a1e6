"""Attention to a cache and to the chunk itself in one kernel, forward and backward, for a GPU.

The form of FlashAttention 2 (Dao, 2023) with three differences. Which keys a query sees is worked
out from positions on chip. The keys come in two arrays, and gradients are summed for the chunk's
own alone. And lists of the blocks in which some query sees some key, made once per call, say what
is read: slots of the cache that are empty, older than the window or of the chunk itself cost
nothing.

Written in Pallas for its Triton backend. Arrays are ``[N, T, H, D]``; scores are in powers of two.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ttt_jax.kernels import shared_outputs
from ttt_jax.kernels.attention.cached import Reach
from ttt_jax.kernels.attention.cached_blocks import Tiles, block_pairs, blocks_of, fitting, last_of

# Finite, as of a row whose keys are all unseen.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)


FORWARD = Tiles(queries=64, keys=64, warps=4, stages=4)
BACKWARD_QUERY = Tiles(queries=64, keys=64, warps=4, stages=2)
BACKWARD_KEY = Tiles(queries=64, keys=64, warps=4, stages=2)


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _rows(ref: Any, index: Any, count: int, other: int | None = None) -> jax.Array:
    """``count`` rows of a block; those beyond the end are ``other``, None where none is."""
    place = ref.at[pl.ds(index * count, count)]
    if other is None or ref.shape[0] % count == 0:
        return plgpu.load(place)
    inside = index * count + jnp.arange(count) < ref.shape[0]
    inside = inside.reshape(-1, *[1] * (len(ref.shape) - 1))
    return plgpu.load(place, mask=jnp.broadcast_to(inside, (count, *ref.shape[1:])), other=other)


def _bounds(columns: jax.Array, sinks: Any) -> tuple[jax.Array, jax.Array]:
    """Positions of keys to be at most a query's, and later than its window's begin."""
    never = jnp.iinfo(jnp.int32).max
    return jnp.where(columns < 0, never, columns), jnp.where(columns < sinks, never, columns)


class _Reach:
    """Which keys of a block the queries of another see, in two comparisons per pair."""

    def __init__(self, rows: jax.Array, limits: Any):
        self._rows, self._begin, self._sinks = rows, rows - limits[0], limits[1]

    def __call__(self, columns: jax.Array) -> jax.Array:
        newest, oldest = _bounds(columns, self._sinks)
        return (newest[None] <= self._rows[:, None]) & (oldest[None] > self._begin[:, None])


def _over_blocks(refs: Any, tiles: Tiles, reach: _Reach, body: Any, carry: Any) -> Any:
    """Folds ``body(carry, key, value, seen)`` over the blocks that are read."""
    key, value, held_key, held_value, positions, held_positions, order, whole, held, own = refs
    count = tiles.keys

    def seen_wholly(place: Any, carry: Any) -> Any:
        index = order[place]
        return body(carry, _rows(held_key, index, count), _rows(held_value, index, count), None)

    def seen_in_part(place: Any, carry: Any) -> Any:
        index = order[place]
        block = (_rows(ref, index, count, 0) for ref in (held_key, held_value))
        return body(carry, *block, reach(_rows(held_positions, index, count, -1)))

    def of_chunk(index: Any, carry: Any) -> Any:
        block = (_rows(ref, index, count) for ref in (key, value))
        return body(carry, *block, reach(_rows(positions, index, count)))

    carry = jax.lax.fori_loop(0, whole[...], seen_wholly, carry)
    carry = jax.lax.fori_loop(whole[...], held[...], seen_in_part, carry)
    return jax.lax.fori_loop(0, own[...], of_chunk, carry)


def _forward_kernel(
    query_ref: Any,
    rows_ref: Any,
    limits_ref: Any,
    *others: Any,
    scale: float,
    tiles: Tiles,
) -> None:
    *refs, out_ref, log_sum_ref = others
    query = query_ref[...]

    def body(carry: Any, key: Any, value: Any, seen: Any) -> Any:
        mixed, total, most = carry
        scores = _product(query, key, (1, 1))
        if seen is not None:
            scores = jnp.where(seen, scores, _LOWEST)
        highest = jnp.maximum(most, scores.max(1))
        # A row that has seen nothing has weights of zero, not a difference of two huge numbers.
        shift = jnp.where(highest > _LOWEST, highest * powers, 0.0)
        weights = jnp.exp2(scores * powers - shift[:, None])
        shrunk = jnp.exp2((most - highest) * powers)
        mixed = mixed * shrunk[:, None] + _product(weights.astype(value.dtype), value, (1, 0))
        return mixed, total * shrunk + weights.sum(1), highest

    count, size = query.shape
    powers = scale * _LOG2_E
    zeros = jnp.zeros((count, size), jnp.float32)
    start = zeros, jnp.zeros(count, jnp.float32), jnp.full(count, _LOWEST, jnp.float32)
    reach = _Reach(rows_ref[...], limits_ref)
    mixed, total, most = _over_blocks(refs, tiles, reach, body, start)
    # A row of padding sees nothing.
    total = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (mixed / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = most * powers + jnp.log2(total)


def _query_kernel(
    query_ref: Any,
    rows_ref: Any,
    limits_ref: Any,
    dout_ref: Any,
    log_sum_ref: Any,
    mean_ref: Any,
    *others: Any,
    scale: float,
    tiles: Tiles,
) -> None:
    *refs, dquery_ref = others
    query, dout = query_ref[...], dout_ref[...]
    log_sum, mean = log_sum_ref[...], mean_ref[...]

    def body(dquery: Any, key: Any, value: Any, seen: Any) -> Any:
        scores = _product(query, key, (1, 1)) * (scale * _LOG2_E)
        weights = jnp.exp2(scores - log_sum[:, None])
        if seen is not None:
            weights = jnp.where(seen, weights, 0.0)
        dscores = weights * (_product(dout, value, (1, 1)) - mean[:, None])
        return dquery + _product(dscores.astype(key.dtype), key, (1, 0))

    reach = _Reach(rows_ref[...], limits_ref)
    dquery = _over_blocks(refs, tiles, reach, body, jnp.zeros(query.shape, jnp.float32))
    dquery_ref[...] = (dquery * scale).astype(dquery_ref.dtype)


def _key_kernel(*refs: Any, scale: float, tiles: Tiles) -> None:
    """Gradients of a block of the chunk's keys, summed over the heads that read it."""
    query_ref, rows_ref, limits_ref, dout_ref, log_sum_ref, mean_ref, *others = refs
    key_ref, value_ref, columns_ref, first_ref, last_ref, dkey_ref, dvalue_ref = others
    key, value = key_ref[...], value_ref[...]
    window = limits_ref[0]
    newest, oldest = (each[:, None] for each in _bounds(columns_ref[...], limits_ref[1]))
    carry = (jnp.zeros(key.shape, jnp.float32),) * 2
    for head in range(query_ref.shape[1]):

        def body(index: Any, carry: Any, head: int = head) -> Any:
            dkey, dvalue = carry
            head = jnp.int32(head)
            place = pl.ds(index * tiles.queries, tiles.queries)
            query = plgpu.load(query_ref.at[place, head])
            dout = plgpu.load(dout_ref.at[place, head])
            log_sum = plgpu.load(log_sum_ref.at[head, place])
            mean = plgpu.load(mean_ref.at[head, place])
            rows = plgpu.load(rows_ref.at[place])
            seen = (newest <= rows[None]) & (oldest > (rows - window)[None])
            scores = _product(key, query, (1, 1)) * (scale * _LOG2_E)
            weights = jnp.where(seen, jnp.exp2(scores - log_sum[None]), 0.0)
            dvalue = dvalue + _product(weights.astype(dout.dtype), dout, (1, 0))
            dscores = weights * (_product(value, dout, (1, 1)) - mean[None])
            return dkey + _product(dscores.astype(query.dtype), query, (1, 0)), dvalue

        carry = jax.lax.fori_loop(first_ref[...], last_ref[...], body, carry)
    dkey, dvalue = carry
    dkey_ref[...] = (dkey * scale).astype(dkey_ref.dtype)
    dvalue_ref[...] = dvalue.astype(dvalue_ref.dtype)


def _call(kernel: Any, name: str, tiles: Tiles, **arguments: Any) -> Any:
    """Runs a kernel; interpreted away from a GPU."""
    return pl.pallas_call(
        kernel,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=jax.default_backend() != "gpu",
        name=name,
        **arguments,
    )


class _Specs:
    """Block specifications of a program per sequence n, head h and block b of rows."""

    def __init__(self, group: int, rows: int):
        self._group, self._rows = group, rows

    def head(self, size: int) -> pl.BlockSpec:
        """Rows of a head of the queries."""
        return pl.BlockSpec((None, self._rows, None, size), lambda n, h, b: (n, b, h, 0))

    def sums(self) -> pl.BlockSpec:
        """A number per row, ``[N, H, T]``."""
        return pl.BlockSpec((None, None, self._rows), lambda n, h, b: (n, h, b))

    def positions(self) -> pl.BlockSpec:
        """Positions of the rows, ``[N, T]``."""
        return pl.BlockSpec((None, self._rows), lambda n, h, b: (n, b))

    def all_keys(self, count: int, size: int) -> pl.BlockSpec:
        """All keys of the head that is read."""
        return pl.BlockSpec((None, count, None, size), lambda n, h, b: (n, 0, h // self._group, 0))

    def keys(self, refs: Any) -> list[pl.BlockSpec]:
        """Of the keys, values, positions and blocks that :func:`_over_blocks` takes."""
        key, _, held_key, _, _, _, order, *counts = refs
        size = key.shape[-1]
        everything = [
            self.all_keys(array.shape[1], size) for array in (key, key, held_key, held_key)
        ]
        places = [
            pl.BlockSpec((None, count), lambda n, h, b: (n, 0))
            for count in (key.shape[1], held_key.shape[1])
        ]
        block = pl.BlockSpec((None, None), lambda n, h, b: (n, b))
        blocks = pl.BlockSpec((None, None, order.shape[-1]), lambda n, h, b: (n, b, 0))
        return [*everything, *places, blocks, *[block] * len(counts)]


LIMITS = pl.BlockSpec((2,), lambda n, h, b: (0,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    scale: float,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    held_key: jax.Array,
    held_value: jax.Array,
    reach: Reach,
) -> jax.Array:
    """:func:`ttt_jax.kernels.attention.cached.attend_cached`, over a multiple of 16 tokens.

    Differentiable once, in reverse mode, in query, key and value.
    """
    return _forward(scale, query, key, value, held_key, held_value, reach)[0]


def _limits(reach: Reach) -> jax.Array:
    return jnp.stack([jnp.asarray(reach.window, jnp.int32), jnp.asarray(reach.sinks, jnp.int32)])


def _forward(scale: float, *operands: Any) -> tuple[jax.Array, Any]:
    query, key, value, held_key, held_value, reach = operands
    batch, tokens, heads, size = query.shape
    tiles = fitting(FORWARD, tokens)
    specs = _Specs(heads // key.shape[2], tiles.queries)
    refs = (key, value, held_key, held_value, reach.queries, reach.held, *blocks_of(reach, tiles))
    out, log_sum = _call(
        functools.partial(_forward_kernel, scale=scale, tiles=tiles),
        "cached_attention_forward",
        tiles,
        grid=(batch, heads, tokens // tiles.queries),
        in_specs=[specs.head(size), specs.positions(), LIMITS, *specs.keys(refs)],
        out_specs=[specs.head(size), specs.sums()],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, value.dtype),
            jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        ],
    )(query, reach.queries, _limits(reach), *refs)
    return out, (*operands, out, log_sum)


def _backward(scale: float, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    query, key, value, held_key, held_value, reach, out, log_sum = saved
    dout = dout.astype(value.dtype)
    mean = jnp.einsum("nthd,nthd->nht", dout, out, preferred_element_type=jnp.float32)
    shared = (query, reach.queries, _limits(reach), dout, log_sum, mean)
    dquery = _query_gradient(scale, shared, (key, value, held_key, held_value), reach)
    dkey, dvalue = _key_gradients(scale, shared, key, value, reach)
    return dquery, dkey, dvalue, None, None, None


def _query_gradient(scale: float, shared: Any, keys: Any, reach: Reach) -> jax.Array:
    query = shared[0]
    batch, tokens, heads, size = query.shape
    tiles = fitting(BACKWARD_QUERY, tokens)
    specs = _Specs(heads // keys[0].shape[2], tiles.queries)
    refs = (*keys, reach.queries, reach.held, *blocks_of(reach, tiles))
    return _call(
        functools.partial(_query_kernel, scale=scale, tiles=tiles),
        "cached_attention_query_gradient",
        tiles,
        grid=(batch, heads, tokens // tiles.queries),
        in_specs=[
            specs.head(size),
            specs.positions(),
            LIMITS,
            specs.head(size),
            specs.sums(),
            specs.sums(),
            *specs.keys(refs),
        ],
        out_specs=specs.head(size),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    )(*shared, *refs)


def _key_gradients(
    scale: float, shared: Any, key: jax.Array, value: jax.Array, reach: Reach
) -> tuple[jax.Array, jax.Array]:
    batch, tokens, heads, size = shared[0].shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    tiles = fitting(BACKWARD_KEY, tokens)
    pairs = block_pairs(reach, reach.queries, tiles.queries, tiles.keys)[0].swapaxes(1, 2)
    last = last_of(pairs)
    first = jnp.where(last > 0, jnp.argmax(pairs, axis=-1), 0).astype(jnp.int32)
    specs = _Specs(1, tiles.keys)
    heads_spec = pl.BlockSpec((None, tokens, group, size), lambda n, h, b: (n, 0, h, 0))
    sums = pl.BlockSpec((None, group, tokens), lambda n, h, b: (n, h, 0))
    rows = pl.BlockSpec((None, tokens), lambda n, h, b: (n, 0))
    block = pl.BlockSpec((None, None), lambda n, h, b: (n, b))
    return _call(
        functools.partial(_key_kernel, scale=scale, tiles=tiles),
        "cached_attention_key_gradients",
        tiles,
        grid=(batch, kv_heads, tokens // tiles.keys),
        in_specs=[
            heads_spec,
            rows,
            LIMITS,
            heads_spec,
            sums,
            sums,
            specs.head(size),
            specs.head(size),
            specs.positions(),
            block,
            block,
        ],
        out_specs=[specs.head(size)] * 2,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (key, value)],
    )(*shared, key, value, reach.queries, first, last)


attend.defvjp(_forward, _backward, **shared_outputs.DECLARED)

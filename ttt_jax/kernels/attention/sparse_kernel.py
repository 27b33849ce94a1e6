"""Attention to a cache and to the tokens themselves in one kernel, for a GPU, with its derivative.

The form of FlashAttention 2 (Dao, 2023) with three differences. Which keys a query sees is worked
out on chip from two numbers of each (:class:`~ttt_jax.kernels.attention.sight.Sight`). The keys
come in two arrays, and gradients are summed for the tokens' own alone. And lists of the blocks in
which a query sees a key, made once per call, say what is read: slots of a cache that are empty or
older than the window, and other sequences of a packed row, cost nothing.

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
from ttt_jax.kernels.attention.sight import Sight, Tiles, block_pairs, blocks_of, fitting, range_of

# Finite, as of a row whose keys are all unseen.
_LOWEST = -1e30
_NEVER = jnp.iinfo(jnp.int32).max
_LOG2_E = math.log2(math.e)


FORWARD = Tiles(queries=64, keys=64, warps=4, stages=4)
BACKWARD_QUERY = Tiles(queries=64, keys=64, warps=4, stages=2)
# With heads of 64, rows of 2,048 tokens and sequences of 340: three stages 6.5 ms, two 6.8, of
# eight layers forward and backward.
BACKWARD_KEY = Tiles(queries=64, keys=64, warps=4, stages=3)


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


def _seen(rows: Any, keys: Any) -> jax.Array:
    """Bool ``[rows, columns]``."""
    (upper, lower), (newest, oldest) = rows, keys
    return (newest[None] <= upper[:, None]) & (oldest[None] > lower[:, None])


def _over_blocks(refs: Any, tiles: Tiles, rows: Any, body: Any, carry: Any) -> Any:
    """Folds ``body(carry, key, value, seen)`` over the blocks that are read."""
    key, value, newest, oldest, held_key, held_value, held_newest, held_oldest, *blocks = refs
    order, whole, held, begin, end = blocks
    count = tiles.keys

    def seen_wholly(place: Any, carry: Any) -> Any:
        index = order[place]
        return body(carry, _rows(held_key, index, count), _rows(held_value, index, count), None)

    def seen_in_part(place: Any, carry: Any) -> Any:
        index = order[place]
        block = (_rows(ref, index, count, 0) for ref in (held_key, held_value))
        bounds = _rows(held_newest, index, count, _NEVER), _rows(held_oldest, index, count, 0)
        return body(carry, *block, _seen(rows, bounds))

    def of_tokens(index: Any, carry: Any) -> Any:
        block = (_rows(ref, index, count) for ref in (key, value))
        bounds = _rows(newest, index, count), _rows(oldest, index, count)
        return body(carry, *block, _seen(rows, bounds))

    carry = jax.lax.fori_loop(0, whole[...], seen_wholly, carry)
    carry = jax.lax.fori_loop(whole[...], held[...], seen_in_part, carry)
    return jax.lax.fori_loop(begin[...], end[...], of_tokens, carry)


def _forward_kernel(
    query_ref: Any,
    upper_ref: Any,
    lower_ref: Any,
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
    rows = upper_ref[...], lower_ref[...]
    mixed, total, most = _over_blocks(refs, tiles, rows, body, start)
    # A row of padding sees nothing.
    total = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (mixed / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = most * powers + jnp.log2(total)


def _query_kernel(
    query_ref: Any,
    upper_ref: Any,
    lower_ref: Any,
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

    rows = upper_ref[...], lower_ref[...]
    dquery = _over_blocks(refs, tiles, rows, body, jnp.zeros(query.shape, jnp.float32))
    dquery_ref[...] = (dquery * scale).astype(dquery_ref.dtype)


def _key_kernel(*refs: Any, scale: float, tiles: Tiles) -> None:
    """Gradients of a block of the tokens' keys, summed over the heads that read it."""
    query_ref, upper_ref, lower_ref, dout_ref, log_sum_ref, mean_ref, *others = refs
    key_ref, value_ref, newest_ref, oldest_ref, begin_ref, end_ref, dkey_ref, dvalue_ref = others
    key, value = key_ref[...], value_ref[...]
    newest, oldest = newest_ref[...], oldest_ref[...]
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
            upper, lower = plgpu.load(upper_ref.at[place]), plgpu.load(lower_ref.at[place])
            seen = (newest[:, None] <= upper[None]) & (oldest[:, None] > lower[None])
            scores = _product(key, query, (1, 1)) * (scale * _LOG2_E)
            weights = jnp.where(seen, jnp.exp2(scores - log_sum[None]), 0.0)
            dvalue = dvalue + _product(weights.astype(dout.dtype), dout, (1, 0))
            dscores = weights * (_product(value, dout, (1, 1)) - mean[None])
            return dkey + _product(dscores.astype(query.dtype), query, (1, 0)), dvalue

        carry = jax.lax.fori_loop(begin_ref[...], end_ref[...], body, carry)
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

    def bounds(self) -> pl.BlockSpec:
        """A number per row, ``[N, T]``."""
        return pl.BlockSpec((None, self._rows), lambda n, h, b: (n, b))

    def all_keys(self, count: int, size: int) -> pl.BlockSpec:
        """All keys of the head that is read."""
        return pl.BlockSpec((None, count, None, size), lambda n, h, b: (n, 0, h // self._group, 0))

    def keys(self, refs: Any) -> list[pl.BlockSpec]:
        """Of the keys, values, bounds and blocks that :func:`_over_blocks` takes."""
        key, held_key, order, counts = refs[0], refs[4], refs[8], refs[9:]
        specs = []
        for array in (key, held_key):
            count = array.shape[1]
            bounds = pl.BlockSpec((None, count), lambda n, h, b: (n, 0))
            specs += [self.all_keys(count, key.shape[-1])] * 2 + [bounds] * 2
        block = pl.BlockSpec((None, None), lambda n, h, b: (n, b))
        blocks = pl.BlockSpec((None, None, order.shape[-1]), lambda n, h, b: (n, b, 0))
        return [*specs, blocks, *[block] * len(counts)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    scale: float,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    held_key: jax.Array,
    held_value: jax.Array,
    sight: Sight,
) -> jax.Array:
    """Returns ``softmax(scale query [held key, key]^T, where seen) [held value, value]``.

    Differentiable once, in reverse mode, in query, key and value. A query that sees nothing gets 0.

    Args:
      scale: of the scores; a Python number.
      query: ``[N, T, H, D]``, T a multiple of 16.
      key: ``[N, T, K, D]`` of the same tokens; K divides H.
      value: as ``key``.
      held_key: ``[N, S, K, D]``.
      held_value: as ``held_key``.
      sight: which keys are seen.
    """
    return _forward(scale, query, key, value, held_key, held_value, sight)[0]


def _refs(keys: Any, sight: Sight, tiles: Tiles) -> tuple[Any, ...]:
    key, value, held_key, held_value = keys
    own, held = (key, value, *sight.own), (held_key, held_value, *sight.held)
    return (*own, *held, *blocks_of(sight, tiles))


def _forward(scale: float, *operands: Any) -> tuple[jax.Array, Any]:
    query, *keys, sight = operands
    batch, tokens, heads, size = query.shape
    tiles = fitting(FORWARD, tokens)
    specs = _Specs(heads // keys[0].shape[2], tiles.queries)
    refs = _refs(keys, sight, tiles)
    out, log_sum = _call(
        functools.partial(_forward_kernel, scale=scale, tiles=tiles),
        "cached_attention_forward",
        tiles,
        grid=(batch, heads, tokens // tiles.queries),
        in_specs=[specs.head(size), specs.bounds(), specs.bounds(), *specs.keys(refs)],
        out_specs=[specs.head(size), specs.sums()],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, keys[1].dtype),
            jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        ],
    )(query, *sight.rows, *refs)
    return out, (*operands, out, log_sum)


def _backward(scale: float, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    query, key, value, held_key, held_value, sight, out, log_sum = saved
    dout = dout.astype(value.dtype)
    mean = jnp.einsum("nthd,nthd->nht", dout, out, preferred_element_type=jnp.float32)
    shared = (query, *sight.rows, dout, log_sum, mean)
    dquery = _query_gradient(scale, shared, (key, value, held_key, held_value), sight)
    dkey, dvalue = _key_gradients(scale, shared, key, value, sight)
    return dquery, dkey, dvalue, None, None, None


def _query_gradient(scale: float, shared: Any, keys: Any, sight: Sight) -> jax.Array:
    query = shared[0]
    batch, tokens, heads, size = query.shape
    tiles = fitting(BACKWARD_QUERY, tokens)
    specs = _Specs(heads // keys[0].shape[2], tiles.queries)
    refs = _refs(keys, sight, tiles)
    return _call(
        functools.partial(_query_kernel, scale=scale, tiles=tiles),
        "cached_attention_query_gradient",
        tiles,
        grid=(batch, heads, tokens // tiles.queries),
        in_specs=[
            specs.head(size),
            specs.bounds(),
            specs.bounds(),
            specs.head(size),
            specs.sums(),
            specs.sums(),
            *specs.keys(refs),
        ],
        out_specs=specs.head(size),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    )(*shared, *refs)


def _key_gradients(
    scale: float, shared: Any, key: jax.Array, value: jax.Array, sight: Sight
) -> tuple[jax.Array, jax.Array]:
    batch, tokens, heads, size = shared[0].shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    tiles = fitting(BACKWARD_KEY, tokens)
    pairs, _ = block_pairs(sight.rows, sight.own, tiles)
    begin, end = range_of(pairs.swapaxes(1, 2))
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
            rows,
            heads_spec,
            sums,
            sums,
            specs.head(size),
            specs.head(size),
            specs.bounds(),
            specs.bounds(),
            block,
            block,
        ],
        out_specs=[specs.head(size)] * 2,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (key, value)],
    )(*shared, key, value, *sight.own, begin, end)


attend.defvjp(_forward, _backward, **shared_outputs.DECLARED)

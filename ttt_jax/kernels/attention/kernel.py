"""Attention over few tokens in one kernel, forward and backward, for a GPU.

An encoder that sees a quarter of the patches has a few dozen tokens per image: all scores of a head
fit on chip, so queries, keys and values are read once and only results are written. Longer
sequences go to cuDNN's flash attention, which works in tiles of 64 tokens or more and makes several
passes.

Written in Pallas for its Triton backend. Arrays are ``[N, T, H, D]``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ttt_jax.kernels import shared_outputs
from ttt_jax.kernels.attention.limits import HEAD_SIZES, MOST_TOKENS, fits

_SMALLEST_TILE = 16


def _tile(tokens: int) -> int:
    return max(_SMALLEST_TILE, 1 << (tokens - 1).bit_length())


def _index(tokens: int, features: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and column of a tile's entries, and where there is a token."""
    shape = (_tile(tokens), features)
    rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return rows, jax.lax.broadcasted_iota(jnp.int32, shape, 1), rows < tokens


def _load(ref: Any) -> jax.Array:
    """``[tile, D]``, zeros where there is no token."""
    rows, columns, inside = _index(*ref.shape)
    return plgpu.load(ref.at[jnp.where(inside, rows, 0), columns], mask=inside, other=0)


def _store(ref: Any, tile: jax.Array) -> None:
    rows, columns, inside = _index(*ref.shape)
    plgpu.store(ref.at[rows, columns], tile.astype(ref.dtype), mask=inside)


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _weights(query: jax.Array, key: jax.Array, tokens: int) -> jax.Array:
    """Softmax over the keys, float32; rows of no query are weights too, of no consequence."""
    scores = _product(query, key, (1, 1)) / math.sqrt(query.shape[1])
    columns = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(columns < tokens, scores, -jnp.inf)
    raised = jnp.exp(scores - jnp.max(scores, axis=1)[:, None])
    return raised / jnp.sum(raised, axis=1)[:, None]


def _forward_kernel(query_ref: Any, key_ref: Any, value_ref: Any, out_ref: Any) -> None:
    value = _load(value_ref)
    weights = _weights(_load(query_ref), _load(key_ref), query_ref.shape[0])
    _store(out_ref, _product(weights.astype(value.dtype), value, (1, 0)))


def _backward_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    dout_ref: Any,
    dquery_ref: Any,
    dkey_ref: Any,
    dvalue_ref: Any,
) -> None:
    query, key, value, dout = map(_load, (query_ref, key_ref, value_ref, dout_ref))
    weights = _weights(query, key, query_ref.shape[0])
    _store(dvalue_ref, _product(weights.astype(dout.dtype), dout, (0, 0)))
    dweights = _product(dout, value, (1, 1))
    mean = jnp.sum(dweights * weights, axis=1)
    dscores = weights * (dweights - mean[:, None]) / math.sqrt(query.shape[1])
    dscores = dscores.astype(query.dtype)
    _store(dquery_ref, _product(dscores, key, (1, 0)))
    _store(dkey_ref, _product(dscores, query, (0, 0)))


def _call(kernel: Any, name: str, outputs: int, arrays: tuple[jax.Array, ...]) -> Any:
    """Runs a kernel with one program per sequence and head; interpreted away from a GPU."""
    count, tokens, heads, features = arrays[0].shape
    head = pl.BlockSpec((None, tokens, None, features), lambda n, h: (n, 0, h, 0))
    return pl.pallas_call(
        kernel,
        grid=(count, heads),
        in_specs=[head] * len(arrays),
        out_specs=[head] * outputs,
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays[:outputs]],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=jax.default_backend() != "gpu",
        name=name,
    )(*arrays)


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Returns ``softmax(query key^T / sqrt(D)) value`` for every sequence and head.

    Products are taken in the dtype of the arguments and summed in float32; the softmax is float32.
    The derivative computes the weights again. Differentiable once, in reverse mode.

    Args:
      query: ``[N, T, H, D]`` that :func:`fits`.
      key: as ``query``.
      value: as ``query``.

    Returns:
      ``[N, T, H, D]``, of the dtype of ``value``.

    Raises:
      ValueError: shapes that differ or do not fit.
    """
    _check(query, key, value)
    return _call(_forward_kernel, "attention_forward", 1, (query, key, value))[0]


def _check(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    shapes = {a.shape for a in (query, key, value)}
    if len(shapes) > 1 or query.ndim != 4 or not fits(query.shape[1], query.shape[3]):
        raise ValueError(
            f"attend takes three arrays [N, T, H, D] with T <= {MOST_TOKENS} and D among "
            f"{HEAD_SIZES}, received {query.shape}, {key.shape} and {value.shape}: use "
            "attention.attend, which takes any."
        )


def _attend_forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[Any, Any]:
    return attend(query, key, value), (query, key, value)


def _attend_backward(saved: Any, dout: jax.Array) -> tuple[jax.Array, ...]:
    arrays = (*saved, dout.astype(saved[2].dtype))
    return tuple(_call(_backward_kernel, "attention_backward", 3, arrays))


attend.defvjp(_attend_forward, _attend_backward, **shared_outputs.DECLARED)

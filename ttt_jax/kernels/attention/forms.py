"""Attention of every token to all: in products of XLA, or in fused kernels on a GPU."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments
from ttt_jax.kernels.attention.limits import fits

FORMS = ("xla", "fused")
"""The forms of :func:`attend`."""

# cuDNN's rule.
_HEAD_SIZE_MULTIPLE = 8


def form_of(attention: str, dtype: Any) -> str:
    """Returns the form that :func:`attend` takes on this machine.

    Args:
      attention: ``"xla"``, or ``"fused"`` where that can be.
      dtype: the compute dtype.

    Returns:
      ``"fused"`` on NVIDIA GPUs with a 16-bit dtype, if that is asked for; ``"xla"``.
    """
    _arguments.choice("attention", attention, FORMS)
    _arguments.dtype("dtype", dtype)
    nvidia = jax.default_backend() == "gpu" and jax.devices()[0].platform != "rocm"
    fused = attention == "fused" and nvidia and jnp.dtype(dtype).itemsize == 2
    return "fused" if fused else "xla"


def attend(query: jax.Array, key: jax.Array, value: jax.Array, form: str) -> jax.Array:
    """Returns ``softmax(query key^T / sqrt(D)) value``, softmax in float32, products in the dtype.

    Args:
      query: ``[N, T, H, D]``.
      key: ``[N, T, H, D]``.
      value: ``[N, T, H, D]``.
      form: ``"xla"``, or ``"fused"``: one kernel for few tokens
        (:mod:`ttt_jax.kernels.attention.kernel`), cuDNN's flash attention for more, and as
        ``"xla"`` for a D that neither takes.

    Returns:
      ``[N, T, H, D]``.
    """
    query, key, value = _checked(query, key, value)
    _arguments.choice("form", form, FORMS)
    tokens, _, size = query.shape[1:]
    if form == "fused" and fits(tokens, size) and _kernel() is not None:
        return _kernel().attend(query, key, value)
    if form == "fused" and size % _HEAD_SIZE_MULTIPLE == 0:
        return flash(query, key, value, "cudnn")
    return products(query, key, value)


def _checked(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    names = ("query", "key", "value")
    return tuple(_arguments.array(n, a, 4) for n, a in zip(names, arrays, strict=True))


@functools.cache
def _kernel() -> Any:
    """The module of the kernel; None on a jax whose Pallas has no Triton backend."""
    try:
        from ttt_jax.kernels.attention import kernel
    except ImportError:
        return None
    return kernel


@functools.cache
def sparse_kernel() -> Any:
    """The module of the kernel over blocks that are seen; None as for the other kernel."""
    try:
        from ttt_jax.kernels.attention import sparse_kernel as module
    except ImportError:
        return None
    return module


@functools.cache
def decoding_kernel() -> Any:
    """The module of the kernel of one token per sequence; None as for the others."""
    try:
        from ttt_jax.kernels.attention import decoding_kernel as module
    except ImportError:
        return None
    return module


def products(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """:func:`attend` in two products of the arguments' dtype, forward and backward.

    flax's own function leaves the weights in float32, and with them the product with the values;
    jax.nn's does so with the gradients of query and key.
    """
    query, key, value = _checked(query, key, value)
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key).astype(jnp.float32)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, value)


def flash(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: Literal["cudnn", "xla"]
) -> jax.Array:
    """:func:`attend` by :func:`jax.nn.dot_product_attention`, over an even number of tokens.

    jax refuses gradients of cuDNN's form for an odd number (0.11): one more token is appended,
    which no query sees.
    """
    query, key, value = _checked(query, key, value)
    _arguments.choice("implementation", implementation, ("cudnn", "xla"))
    count = query.shape[1]
    if count % 2 == 0:
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    # jax's rule for vmap expects lengths that are mapped as the query is: these depend on it.
    lengths = jnp.where(jnp.isnan(query[:, 0, 0, 0]), jnp.int32(count), jnp.int32(count))
    query, key, value = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return mixed[:, :count]

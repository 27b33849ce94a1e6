"""What stands around the fast weights of a TTT layer: positions, rotation, convolution, cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.layers import _pairs, _windows, decode, ttt
from ttt_jax.layers._forms import Rows, TTTCache, choose
from ttt_jax.layers._kernel import Start
from ttt_jax.layers._net import Norm, Weights

BACKBONES = ("transformer", "mamba")


class LayerCache(NamedTuple):
    """What :class:`TTTLinear` or :class:`TTTMLP` keeps between calls, of every sequence.

    Attributes:
      memory: a :class:`~ttt_jax.layers.TTTCache` whose leaves have leading axes ``[N, H]``.
      taps: the last inputs of the convolutions, ``[N, 3, H * D]``; None without convolutions.
    """

    memory: TTTCache
    taps: jax.Array | None


class Heads(NamedTuple):
    """What the fast weights of a layer are given.

    Attributes:
      q: ``[N, T, H, D]``.
      k: ``[N, T, H, D]``.
      v: ``[N, T, H, D]``.
      gate: ``[N, T, H]``.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array


def runs(mask: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """``[N, T]``: numbers that change where a sequence or its padding begins; None for neither."""
    if segments is None and mask is None:
        return None
    if segments is None:
        return jnp.asarray(mask).astype(jnp.int32)
    if mask is None:
        return jnp.asarray(segments)
    # Counted, as twice a number of a narrow dtype may be another segment's.
    marks = jnp.stack([jnp.asarray(segments), jnp.asarray(mask).astype(segments.dtype)])
    changed = (marks[:, :, 1:] != marks[:, :, :-1]).any(0)
    return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def beginnings(marks: jax.Array | None, begun: jax.Array, tokens: int) -> jax.Array:
    """Int32 ``[N, T]``, of every sequence; see :func:`_windows.beginnings`."""
    if marks is None:
        return jax.vmap(lambda count: _windows.beginnings(None, count, tokens))(begun)
    return jax.vmap(lambda row, count: _windows.beginnings(row, count, tokens))(marks, begun)


def scales(tau: jax.Array) -> jax.Array:
    """``max(1 / t + tau[t], 0)`` for the positions ``t`` from 1 of a chunk."""
    inverse = 1 / jnp.arange(1, tau.shape[0] + 1, dtype=tau.dtype)
    return jnp.maximum(inverse + tau, 0)


def turned(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary embeddings of neighboring pairs (Su et al., 2021), in float32 at least.

    Args:
      x: ``[N, T, H, D]``.
      positions: int ``[N, T]``.
      base: of the geometric series of frequencies.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    size = x.shape[-1]
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=wide) / size)
    angle = (positions[..., None].astype(wide) * frequencies[None, None])[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return _pairs.turned(x.astype(wide), cos, sin, neighbors=True).astype(x.dtype)


def convolved(
    x: jax.Array, taps: jax.Array, run: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    """A causal convolution of each channel that does not look into an earlier segment.

    Args:
      x: ``[N, T, c]``.
      taps: ``[N, K - 1, c]``, what came before.
      run: ``[N, T]``, of :func:`beginnings`.
      kernel: ``[K, c]``; the last entry is of the token itself.
      bias: ``[c]``.
    """
    tokens, width = x.shape[1], kernel.shape[0]
    before = jnp.concatenate([taps.astype(x.dtype), x], 1)
    since = jnp.arange(tokens, dtype=jnp.int32)[None] - run
    total = jnp.broadcast_to(bias[None, None], x.shape)
    for age in range(width):
        # Before a first segment are the taps; before any other, another segment.
        seen = (age <= since) | (run <= 0)
        start = width - 1 - age
        rows = before[:, start : start + tokens]
        total = total + jnp.where(seen[..., None], rows, 0) * kernel[None, None, start]
    return total


def later_taps(x: jax.Array, taps: jax.Array, lengths: jax.Array) -> jax.Array:
    """The taps after the first ``lengths [N]`` of the tokens."""
    before = jnp.concatenate([taps.astype(x.dtype), x], 1)
    count = taps.shape[1]
    return jax.vmap(lambda rows, at: jax.lax.dynamic_slice_in_dim(rows, at, count))(before, lengths)


def empty(weights: Weights, batch: int, taps: jax.Array | None) -> LayerCache:
    """The cache of ``batch`` sequences that have no tokens; weights have a leading axis [H]."""
    heads = jax.vmap(decode.ttt_cache)(weights)
    memory = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (batch, *leaf.shape)), heads)
    return LayerCache(memory, taps)


def whole(
    rows: Heads, scale: jax.Array, shared: tuple[Weights, Norm], marks: jax.Array | None, **how: Any
) -> jax.Array:
    """The outputs ``[N, T, H, D]`` of sequences from their first token on."""
    weights, norm = shared
    function = ttt.ttt_linear if len(weights) == 2 else ttt.ttt_mlp

    def head(q: Any, k: Any, v: Any, gate: Any, state: Any, norm: Any, segments: Any) -> jax.Array:
        return function(
            q, k, v, gate, scale, state, norm, chunk_size=scale.shape[0], segments=segments, **how
        )[0]

    heads = jax.vmap(head, in_axes=(1, 1, 1, 1, 0, 0, None), out_axes=1)
    batch = jax.vmap(heads, in_axes=(0, 0, 0, 0, None, None, None if marks is None else 0))
    return batch(*rows, weights, norm, marks)


def further(
    rows: Heads,
    scale: jax.Array,
    norm: Norm,
    memory: TTTCache,
    lengths: jax.Array | None,
    *,
    form: str,
    remat: int,
) -> tuple[jax.Array, TTTCache]:
    """The outputs ``[N, T, H, D]`` from a cache on, and the cache after the real tokens.

    ``lengths [N]`` are how many those are; None for all.
    """
    tokens = rows.q.shape[1]
    form = "dual" if form == "primal" else form

    def head(q: Any, k: Any, v: Any, gate: Any, held: TTTCache, norm: Norm, length: Any) -> Any:
        if tokens > 1:
            start = Start(held, length)
            return decode.prefilled(Rows(q, k, v, gate), scale, start, norm, form=form, remat=remat)
        out, new = decode.ttt_decode(q[0], k[0], v[0], gate[0], scale, held, norm)
        real = jnp.bool_(True) if length is None else length > 0
        return out[None], choose(real, new, held)

    heads = jax.vmap(head, in_axes=(1, 1, 1, 1, 0, 0, None), out_axes=(1, 0))
    own = None if lengths is None else 0
    batch = jax.vmap(heads, in_axes=(0, 0, 0, 0, 0, None, own))
    return batch(*rows, memory, norm, lengths)

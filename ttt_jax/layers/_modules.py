"""What the Linen and the NNX modules of the TTT layers share: sizes, checks and the whole call."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _arguments
from ttt_jax.layers import _backbones, _net
from ttt_jax.layers._backbones import Heads, LayerCache

CONV_WIDTH = 4
"""Tokens that a convolution sees, as published."""

_Dense = Callable[[jax.Array], jax.Array]


class Sizes(NamedTuple):
    """Attributes of a module; see :class:`ttt_jax.layers.TTTLinear`.

    Attributes:
      width: of the tokens.
      heads: H.
      size: D, of a head.
      convolves: whether the backbone is Mamba's.
      chunk_size: tokens that are learned from one set of weights.
      base_rate: of the step sizes.
      rope_base: of the rotary frequencies.
      form: of more tokens than one.
      remat: chunks between two kept states.
      hidden: how many times D the hidden layer of the fast weights is; 0 for none.
      dtype: the compute dtype.
    """

    width: int
    heads: int
    size: int
    convolves: bool
    chunk_size: int
    base_rate: float
    rope_base: float
    form: str
    remat: int
    hidden: int
    dtype: Any

    @property
    def inner(self) -> int:
        """The width of all heads."""
        return self.heads * self.size


class Parts(NamedTuple):
    """Functions and parameters of a module.

    Attributes:
      query: ``[N, T, width] -> [N, T, H * D]``; of queries and keys in the Mamba backbone.
      key: the same; None there.
      value: the same.
      rate: ``[N, T, width] -> [N, T, H]``.
      gate: ``[N, T, width] -> [N, T, H * D]`` in the Mamba backbone, else None.
      norm: of all heads together.
      out: ``[N, T, H * D] -> [N, T, width]``.
      convolutions: kernels ``[4, H * D]`` and biases ``[H * D]`` of queries and of keys.
      tau: ``[chunk_size]``.
      weights: the initial fast weights, each ``[H, ...]``.
      layer_norm: gamma and beta, each ``[H, D]``.
    """

    query: _Dense
    key: _Dense | None
    value: _Dense
    rate: _Dense
    gate: _Dense | None
    norm: _Dense
    out: _Dense
    convolutions: tuple[tuple[jax.Array, jax.Array], ...]
    tau: jax.Array
    weights: _net.Weights
    layer_norm: _net.Norm


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Of the fast weights, by their names in the parameters, in the order of the state."""
    heads, size, hidden = sizes.heads, sizes.size, sizes.hidden * sizes.size
    if not hidden:
        return {"weight": (heads, size, size), "bias": (heads, size)}
    return {
        **{"weight_1": (heads, size, hidden), "bias_1": (heads, hidden)},
        **{"weight_2": (heads, hidden, size), "bias_2": (heads, size)},
    }


def checked_sizes(owner: Any, hidden: int) -> Sizes:
    """The sizes of a module, from its attributes.

    Raises:
      ValueError: sizes that do not fit, or an attribute out of range.
    """
    count, number = _arguments.count(), _arguments.number(0, above=True)
    rules = {
        **dict.fromkeys(("width", "heads", "chunk_size"), count),
        **dict.fromkeys(("base_rate", "rope_base"), number),
        "remat": _arguments.count(0),
    }
    if owner.head_size is not None:
        rules["head_size"] = count
    for name, rule in rules.items():
        rule(type(owner).__name__, name, getattr(owner, name))
    if owner.backbone not in _backbones.BACKBONES:
        raise ValueError(f"backbone must be one of {_backbones.BACKBONES}; got {owner.backbone!r}.")
    if owner.head_size is None and owner.width % owner.heads:
        raise ValueError(
            f"width must be a multiple of heads, or head_size given; got width={owner.width} and "
            f"heads={owner.heads}."
        )
    size = owner.width // owner.heads if owner.head_size is None else owner.head_size
    if size % 2:
        raise ValueError(
            f"head_size must be even, as rotary positions turn pairs; got {size}: choose another "
            "head_size or number of heads."
        )
    return Sizes(
        width=owner.width,
        heads=owner.heads,
        size=size,
        convolves=owner.backbone == "mamba",
        chunk_size=owner.chunk_size,
        base_rate=owner.base_rate,
        rope_base=owner.rope_base,
        form=owner.form,
        remat=owner.remat,
        hidden=hidden,
        dtype=owner.dtype,
    )


def empty_cache(sizes: Sizes, parts: Parts, batch: int) -> LayerCache:
    """The cache of ``batch`` sequences without tokens."""
    return _backbones.empty(parts.weights, batch, _no_taps(sizes, batch))


def call(
    sizes: Sizes,
    parts: Parts,
    x: jax.Array,
    *,
    mask: jax.Array | None,
    segments: jax.Array | None,
    cache: LayerCache | None,
) -> Any:
    """The call of a module; see :meth:`ttt_jax.layers.TTTLinear.__call__`."""
    _check(sizes, x, mask, segments, cache)
    if cache is not None:
        _check_cache(parts, x.shape[0], mask, cache)
    batch, tokens, _ = x.shape
    x = x.astype(sizes.dtype)
    if mask is not None:
        # Whatever stands in padding: a nan times 0 is a nan.
        x = jnp.where(jnp.asarray(mask)[..., None], x, 0)
    if cache is None:
        marks = _backbones.runs(mask, segments)
        begun, taps = jnp.zeros(batch, jnp.int32), _no_taps(sizes, batch)
    else:
        marks, begun, taps = None, cache.memory.position[:, 0], cache.taps
    run = _backbones.beginnings(marks, begun, tokens)
    rows, plain = _rows(sizes, parts, x, run, taps)
    scale = _backbones.scales(parts.tau)
    how: dict[str, Any] = {"form": sizes.form, "remat": sizes.remat}
    if cache is None:
        shared = parts.weights, parts.layer_norm
        return _mixed(parts, x, _backbones.whole(rows, scale, shared, marks, **how))
    lengths = None if mask is None else jnp.asarray(mask).sum(-1, dtype=jnp.int32)
    out, memory = _backbones.further(rows, scale, parts.layer_norm, cache.memory, lengths, **how)
    if taps is not None:
        read = jnp.full(batch, tokens, jnp.int32) if lengths is None else lengths
        taps = _backbones.later_taps(plain, taps, read).astype(taps.dtype)
    return _mixed(parts, x, out), LayerCache(memory, taps)


def _no_taps(sizes: Sizes, batch: int) -> jax.Array | None:
    if not sizes.convolves:
        return None
    return jnp.zeros((batch, CONV_WIDTH - 1, sizes.inner), sizes.dtype)


def _rows(
    sizes: Sizes, parts: Parts, x: jax.Array, run: jax.Array, taps: jax.Array | None
) -> tuple[Heads, jax.Array]:
    """What the fast weights are given, and what the convolutions are given."""
    plain = parts.query(x)
    if parts.key is not None:
        query, key = plain, parts.key(x)
    else:
        before = cast(jax.Array, taps)
        query, key = (
            _backbones.convolved(plain, before, run, *(leaf.astype(sizes.dtype) for leaf in pair))
            for pair in parts.convolutions
        )
    query, key, value = (
        part.reshape(*x.shape[:2], sizes.heads, sizes.size) for part in (query, key, parts.value(x))
    )
    position = (jnp.arange(x.shape[1], dtype=jnp.int32)[None] - run) % sizes.chunk_size
    query, key = (_backbones.turned(part, position, sizes.rope_base) for part in (query, key))
    gate = sizes.base_rate / sizes.size * jax.nn.sigmoid(parts.rate(x))
    return Heads(query, key, value, gate), plain


def _mixed(parts: Parts, x: jax.Array, out: jax.Array) -> jax.Array:
    mixed = parts.norm(out.reshape(*x.shape[:2], -1))
    if parts.gate is not None:
        mixed = _net.gelu(parts.gate(x)) * mixed
    return parts.out(mixed)


def _check(sizes: Sizes, x: Any, mask: Any, segments: Any, cache: Any) -> None:
    if x.ndim != 3 or x.shape[-1] != sizes.width or not x.size:
        raise ValueError(
            f"A TTT layer takes x [N, T, width], N and T at least 1 and width {sizes.width}; got "
            f"shape {x.shape}."
        )
    for word, rows in (("mask", mask), ("segments", segments)):
        if rows is not None and rows.shape != x.shape[:2]:
            raise ValueError(
                f"A TTT layer takes {word} of shape {x.shape[:2]}, one for each token of x; got "
                f"{rows.shape}."
            )
    if segments is not None and cache is not None:
        raise ValueError(
            "A TTT layer takes segments or a cache, got both: read packed sequences in one call."
        )


def _check_cache(parts: Parts, batch: int, mask: Any, cache: LayerCache) -> None:
    due = [(batch, *leaf.shape) for leaf in parts.weights]
    got = [jnp.shape(leaf) for leaf in cache.memory.weights]
    if due != got:
        raise ValueError(
            f"A TTT layer takes a cache of its own, weights of shapes {due}; got {got}: make it "
            "with empty_cache of this layer and the batch of x."
        )
    known = mask is not None and not isinstance(mask, jax.core.Tracer)
    if known and (np.diff(np.asarray(mask, np.int8), axis=-1) > 0).any():
        raise ValueError(
            "A TTT layer takes padding after the tokens beside a cache; got a mask with padding "
            "before a token. Move the padding to the end, or read without a cache."
        )

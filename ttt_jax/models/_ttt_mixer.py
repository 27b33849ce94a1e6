"""Layers of :class:`ttt_jax.models.Decoder` whose state learns, in the place of attention."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers import LayerCache, _backbones
from ttt_jax.layers._modules import CONV_WIDTH
from ttt_jax.layers.linen import TTTMLP, TTTLinear
from ttt_jax.models.cache import States

MIXERS: dict[str, Any] = {"attention": None, "ttt_linear": TTTLinear, "ttt_mlp": TTTMLP}
"""What mixes tokens, by name; None for attention."""


# Of the block around the layer.
_AROUND = ("mixer", "pre_convolution")


class Learner(NamedTuple):
    """Settings of a TTT layer in a decoder; see :class:`ttt_jax.layers.TTTLinear`.

    ``pre_convolution`` is whether a :class:`PreConvolution` stands before it.
    """

    mixer: str
    width: int
    heads: int
    head_size: int
    backbone: str
    chunk_size: int
    rope_base: float
    form: str
    pre_convolution: bool
    dtype: Any

    def module(self, **more: Any) -> nn.Module:
        """The layer."""
        kind = MIXERS[self.mixer]
        own = {name: value for name, value in self._asdict().items() if name not in _AROUND}
        made: nn.Module = kind(**own, **more)
        return made

    def empty(self, depth: int, batch: int) -> States:
        """States of sequences without tokens: zeros, whatever the parameters."""
        module = self.module(parent=None)

        def cache() -> Any:
            return module.init_with_output(jax.random.key(0), batch, method="empty_cache")[0]

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros((depth, *leaf.shape), leaf.dtype), jax.eval_shape(cache)
        )
        taps = None
        if self.pre_convolution:
            taps = jnp.zeros((depth, batch, CONV_WIDTH - 1, self.width), self.dtype)
        return States(zeros, jnp.zeros(batch, jnp.int32), taps)


class Order(NamedTuple):
    """Tokens of a call with those that are no padding in front, as a state reads them.

    Attributes:
      there: int32 ``[N, T]``, which token comes at each place; None where there is no padding.
      back: int32 ``[N, T]``, its inverse.
      real: bool ``[N, T]``, of each place; None as for ``there``.
    """

    there: jax.Array | None
    back: jax.Array | None
    real: jax.Array | None


class Reading(NamedTuple):
    """What all TTT layers of a call are given.

    Attributes:
      segments: int ``[N, T]``, or None.
      real: bool ``[N, T]``, True up to the padding; None where there is none.
      fresh: bool ``[N]``, whether a sequence has read nothing yet; of no meaning without a cache.
    """

    segments: jax.Array | None
    real: jax.Array | None
    fresh: jax.Array


def order_of(positions: jax.Array | None) -> Order:
    """The order of tokens at positions ``[N, T]``, of which negative ones are padding."""
    if positions is None:
        return Order(None, None, None)
    there = jnp.argsort(positions < 0, axis=1, stable=True)
    real = jnp.take_along_axis(positions >= 0, there, 1)
    return Order(there, jnp.argsort(there, axis=1), real)


def ordered(x: Any, places: jax.Array | None) -> Any:
    """``[N, T, ...]`` at places ``[N, T]``; as it is where either is None."""
    if x is None or places is None:
        return x
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), 1)


def mix(learner: Learner, x: jax.Array, held: LayerCache | None, reading: Reading) -> Any:
    """The TTT layer ``ttt`` of the module that calls; a cache of zeros is its initial weights.

    Returns:
      ``[N, T, width]``, and the cache after the tokens, or None without one.
    """
    layer: Any = learner.module(name="ttt")
    if held is None:
        # Padding comes last, where nothing reads what it taught.
        return layer(x, segments=reading.segments), None
    start, fresh = layer.empty_cache(x.shape[0]), reading.fresh

    def begun(first: jax.Array, leaf: jax.Array) -> jax.Array:
        return jnp.where(fresh.reshape(-1, *(1,) * (leaf.ndim - 1)), first, leaf)

    return layer(x, mask=reading.real, cache=jax.tree.map(begun, start, held))


class PreConvolution(nn.Module):
    """The convolution before a TTT layer: causal, of each channel, four tokens wide."""

    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, taps: jax.Array | None, reading: Reading
    ) -> tuple[jax.Array, jax.Array | None]:
        """Convolves tokens in the order in which a state reads them.

        Args:
          x: ``[N, T, width]``, normalized.
          taps: ``[N, 3, width]``, what came before, of no meaning for a fresh sequence; None
            without a cache.
          reading: of the call.

        Returns:
          ``[N, T, width]``, and the taps after the tokens; None without a cache.
        """
        batch, tokens, width = x.shape
        normal, zeros = nn.initializers.normal(CONV_WIDTH**-0.5), nn.initializers.zeros
        kernel = self.param("kernel", normal, (CONV_WIDTH, width), jnp.float32)
        bias = self.param("bias", zeros, (width,), jnp.float32)
        start = jnp.zeros((batch, CONV_WIDTH - 1, width), x.dtype)
        if taps is not None:
            start = jnp.where(reading.fresh[:, None, None], start, taps)
        run = _backbones.beginnings(reading.segments, jnp.zeros(batch, jnp.int32), tokens)
        out = _backbones.convolved(
            x, start, run, kernel.astype(self.dtype), bias.astype(self.dtype)
        )
        if taps is None:
            return out, None
        lengths = jnp.full(batch, tokens, jnp.int32)
        if reading.real is not None:
            lengths = reading.real.sum(-1, dtype=jnp.int32)
        return out, _backbones.later_taps(x, start, lengths).astype(taps.dtype)

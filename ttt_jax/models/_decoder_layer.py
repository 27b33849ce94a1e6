"""One layer of :class:`ttt_jax.models.Decoder`, and what all layers of a call share."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.kernels.attention.cached import Reach, attend_cached
from ttt_jax.kernels.attention.masked import attend_masked
from ttt_jax.models import rotary
from ttt_jax.models._ttt_mixer import Learner, PreConvolution, Reading, mix

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": nn.silu, "gelu": nn.gelu}
"""Gates of the MLP: SwiGLU, and GeGLU in its tanh form."""


class Sizes(NamedTuple):
    """Sizes and switches of a layer; see :class:`ttt_jax.models.Decoder`.

    ``window`` is that of causal attention without a mask; ``learner`` is None for attention.
    """

    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    epsilon: float
    interleaved: bool
    activation: str
    biases: bool
    query_key_norm: bool
    post_norms: bool
    form: str
    cache_gradients: bool
    window: int | None
    learner: Learner | None
    dtype: Any


class View(NamedTuple):
    """What the tokens of a call see in a kind of layer, and how far they turn.

    Attributes:
      mask: bool ``[N, T, T]`` without a cache; None beside one, and for causal attention, be it of
        a window.
      own: cosine and sine of the angles of the call's tokens, each ``[N, T, D / 2]``.
      held: of the tokens in the cache, ``[N, S, D / 2]``; None without one.
      window: int32 scalar, how many tokens, itself among them, a token sees beside a cache.
      sinks: int32 scalar, how many first tokens it sees for ever.
    """

    mask: jax.Array | None
    own: tuple[jax.Array, jax.Array]
    held: tuple[jax.Array, jax.Array] | None
    window: jax.Array
    sinks: jax.Array


class Shared(NamedTuple):
    """What all layers of a call are given.

    Attributes:
      everywhere: the view of a global layer.
      nearby: the view of a local layer; None in a decoder without.
      positions: int32 ``[N, T]``, of the call's tokens.
      held: int32 ``[N, S]``, of the tokens in the cache, negative for those of the call; None
        without a cache.
    """

    everywhere: View
    nearby: View | None
    positions: jax.Array
    held: jax.Array | None


class Linear(nn.Module):
    """A linear map of the last axis; leaves ``kernel`` ``[inputs, features]`` and ``bias``."""

    features: int
    bias: bool = False
    dtype: Any = jnp.float32
    initializer: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., inputs] -> [..., features]``."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.initializer, shape, jnp.float32)
        # The kernel goes in as it is, but for its dtype: qwix finds it so. Rows, because a weight
        # gradient sums over one axis without a transposed copy.
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        out = jax.lax.dot_general(rows, kernel.astype(self.dtype), (((1,), (0,)), ((), ())))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            out = out + bias.astype(self.dtype)[None]
        # Factors that qwix adds may have widened it.
        return out.astype(self.dtype).reshape(*x.shape[:-1], self.features)


class DecoderLayer(nn.Module):
    """Attention or a TTT layer, with a cache, then a gated MLP, each added to its input.

    Before a TTT layer there may be a convolution, which is added, too.
    """

    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: jax.Array, held: Any, local: jax.Array, shared: Shared | Reading
    ) -> tuple[jax.Array, Any]:
        """One layer.

        Args:
          x: ``[N, T, width]``.
          held: keys and values of the cache, each ``[N, S, K, D]``, or the state of the TTT layer
            and the taps of the convolution before it (None without one), or None.
          local: bool scalar, whether this layer sees nearby tokens alone.
          shared: of the call; a :class:`Reading` for a TTT layer.

        Returns:
          ``[N, T, width]``, and the tokens' own keys (before rotation) and values
          ``[N, T, K, D]``, or the state and the taps after them, or None without a cache.
        """
        sizes = self.sizes
        if isinstance(shared, Reading):
            learner = cast(Learner, sizes.learner)
            state, taps = (None, None) if held is None else held
            if learner.pre_convolution:
                first = PreConvolution(sizes.dtype, name="pre_conv")
                convolved, taps = first(self._norm("pre_conv_norm")(x), taps, shared)
                x = x + convolved
            mixed, state = mix(learner, self._norm("ttt_norm")(x), state, shared)
            rows = None if held is None else (state, taps)
        else:
            mixed, rows = Attention(sizes, name="attention")(
                self._norm("attention_norm")(x), held, local, shared
            )
        x = x + (self._norm("post_attention_norm")(mixed) if sizes.post_norms else mixed)
        made = GatedMLP(sizes, name="mlp")(self._norm("mlp_norm")(x))
        return x + (self._norm("post_mlp_norm")(made) if sizes.post_norms else made), rows

    def _norm(self, name: str) -> nn.RMSNorm:
        return nn.RMSNorm(self.sizes.epsilon, dtype=self.sizes.dtype, name=name)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: jax.Array, held: Any, local: jax.Array, shared: Shared
    ) -> tuple[jax.Array, Any]:
        """See :class:`DecoderLayer`."""
        sizes = self.sizes
        batch, tokens, width = x.shape

        def heads(name: str, count: int) -> jax.Array:
            made = Linear(count * sizes.head_size, sizes.biases, sizes.dtype, name=name)(x)
            return made.reshape(batch, tokens, count, sizes.head_size)

        query = heads("query", sizes.heads)
        key, value = heads("key", sizes.kv_heads), heads("value", sizes.kv_heads)
        if sizes.query_key_norm:
            query = nn.RMSNorm(sizes.epsilon, dtype=sizes.dtype, name="query_norm")(query)
            key = nn.RMSNorm(sizes.epsilon, dtype=sizes.dtype, name="key_norm")(key)
        view = _chosen(local, shared)
        rows = None if held is None else (key, value)
        query, key = (
            rotary.rotate(x, view.own, interleaved=sizes.interleaved) for x in (query, key)
        )
        if held is None or shared.held is None or view.held is None:
            window = sizes.window if view.mask is None else None
            mixed = attend_masked(query, key, value, view.mask, form=sizes.form, window=window)
        else:
            held_key, held_value = (leaf.astype(query.dtype) for leaf in held)
            held_key = rotary.rotate(held_key, view.held, interleaved=sizes.interleaved)
            reach = Reach(shared.positions, shared.held, view.window, view.sinks)
            mixed = attend_cached(
                query,
                key,
                value,
                (held_key, held_value),
                reach,
                form=sizes.form,
                held_gradients=sizes.cache_gradients,
            )
        out = Linear(width, dtype=sizes.dtype, name="out")
        return out(mixed.reshape(batch, tokens, -1)), rows


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` (Shazeer, 2020)."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[N, T, width] -> [N, T, width]``."""
        width, dtype = self.sizes.mlp_width, self.sizes.dtype
        gate = Linear(width, dtype=dtype, name="gate")(x)
        up = Linear(width, dtype=dtype, name="up")(x)
        activation = ACTIVATIONS[self.sizes.activation]
        hidden = activation(gate) * up
        # Kept where it is asked for (models.hidden_reader), and else no operation.
        self.sow("intermediates", "hidden", hidden)
        return Linear(x.shape[-1], dtype=dtype, name="down")(hidden)


def _chosen(local: jax.Array, shared: Shared) -> View:
    if shared.nearby is None:
        return shared.everywhere
    return jax.tree.map(
        lambda near, everywhere: jnp.where(local, near, everywhere),
        shared.nearby,
        shared.everywhere,
    )

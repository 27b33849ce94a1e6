"""TTT-Linear and TTT-MLP as Flax Linen modules, with the projections around the fast weights."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax import _arguments
from ttt_jax.layers import _backbones, _net
from ttt_jax.layers._backbones import LayerCache

__all__ = ["TTTMLP", "TTTLinear"]

_CONV_WIDTH = 4
_NORMAL = nn.initializers.normal(0.02)


def _dense(features: int, dtype: Any, bias: bool = False) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=_NORMAL)


class _Layer(nn.Module):
    """What both layers are but for the shapes of their fast weights."""

    width: int
    heads: int
    head_size: int | None = None
    backbone: str = "transformer"
    chunk_size: int = 16
    base_rate: float = 1.0
    rope_base: float = 1e4
    form: str = "auto"
    remat: int = 4
    dtype: Any = jnp.float32

    # How many times the size of a head the hidden layer of its fast weights is; 0 for none.
    _HIDDEN: ClassVar[int]

    def __post_init__(self) -> None:
        count, number = _arguments.count(), _arguments.number(0, above=True)
        _arguments.check_fields(
            self,
            **dict.fromkeys(("width", "heads", "chunk_size"), count),
            **dict.fromkeys(("base_rate", "rope_base"), number),
            remat=_arguments.count(0),
        )
        if self.backbone not in _backbones.BACKBONES:
            raise ValueError(
                f"backbone must be one of {_backbones.BACKBONES}; got {self.backbone!r}."
            )
        if self.head_size is None and self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, or head_size given; got width={self.width} "
                f"and heads={self.heads}."
            )
        if self._size < 2 or self._size % 2:
            raise ValueError(
                "head_size must be even, as rotary positions turn pairs; got "
                f"{self._size}: choose another head_size or number of heads."
            )
        super().__post_init__()

    @property
    def _size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def _convolves(self) -> bool:
        return self.backbone == "mamba"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the fast weights of one head, in their order."""
        size, hidden = self._size, self._HIDDEN * self._size
        if not hidden:
            return {"weight": (size, size), "bias": (size,)}
        return {
            **{"weight_1": (size, hidden), "bias_1": (hidden,)},
            **{"weight_2": (hidden, size), "bias_2": (size,)},
        }

    def setup(self) -> None:
        """Makes projections, fast weights and norms."""
        inner = self.heads * self._size
        if self._convolves:
            self.query_key = _dense(inner, self.dtype)
            taps = nn.initializers.normal(_CONV_WIDTH**-0.5)
            self.convolutions = {
                name: (
                    self.param(f"{name}_conv", taps, (_CONV_WIDTH, inner)),
                    self.param(f"{name}_conv_bias", nn.initializers.zeros, (inner,)),
                )
                for name in ("query", "key")
            }
            self.gate = _dense(inner, self.dtype)
        else:
            self.query = _dense(inner, self.dtype)
            self.key = _dense(inner, self.dtype)
        self.value = _dense(inner, self.dtype)
        self.rate = _dense(self.heads, jnp.promote_types(self.dtype, jnp.float32), bias=True)
        self.tau = self.param("position", nn.initializers.zeros, (self.chunk_size,))
        weights = []
        for name, shape in self._shapes().items():
            start = _NORMAL if len(shape) == 2 else nn.initializers.zeros
            weights.append(self.param(name, start, (self.heads, *shape)))
        self.weights = tuple(weights)
        self.gamma, self.beta = (
            self.param(name, start, (self.heads, self._size))
            for name, start in (("gamma", nn.initializers.ones), ("beta", nn.initializers.zeros))
        )
        self.norm = nn.LayerNorm(epsilon=_net.EPSILON, dtype=self.dtype)
        self.out = _dense(self.width, self.dtype)

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> Any:
        """Mixes tokens.

        Args:
          x: ``[N, T, width]``, any T of at least 1.
          mask: bool ``[N, T]``, False for padding, whose outputs have no meaning. It stands before
            or after a sequence; beside a cache, after it. A sequence that goes on after padding
            begins anew.
          segments: int ``[N, T]``, packed sequences; a new one begins where the number changes.
            Not beside a cache.
          cache: of :meth:`empty_cache`, or of the call before; None for whole sequences.

        Returns:
          ``[N, T, width]``; with a cache, the pair of that and the cache after the tokens.

        Raises:
          ValueError: shapes that do not fit, or segments beside a cache.
        """
        self._check(x, mask, segments, cache)
        batch, tokens, _ = x.shape
        x = x.astype(self.dtype)
        if cache is None:
            marks = _backbones.runs(mask, segments)
            begun, taps = jnp.zeros(batch, jnp.int32), self._no_taps(batch)
        else:
            marks, begun, taps = None, cache.memory.position[:, 0], cache.taps
        run = _backbones.beginnings(marks, begun, tokens)
        position = (jnp.arange(tokens, dtype=jnp.int32)[None] - run) % self.chunk_size
        rows, plain = self._rows(x, position, run, taps)
        scale, norm = _backbones.scales(self.tau), (self.gamma, self.beta)
        if cache is None:
            how = {"form": self.form, "remat": self.remat}
            return self._mixed(x, _backbones.whole(rows, scale, (self.weights, norm), marks, **how))
        lengths = jnp.full(batch, tokens, jnp.int32)
        if mask is not None:
            lengths = mask.sum(-1, dtype=jnp.int32)
        out, memory = _backbones.further(rows, scale, norm, cache.memory, lengths)
        if taps is not None:
            taps = _backbones.later_taps(plain, taps, lengths).astype(taps.dtype)
        return self._mixed(x, out), LayerCache(memory, taps)

    def empty_cache(self, batch: int) -> LayerCache:
        """The cache of N sequences without tokens; needs the parameters, as ``__call__`` does.

        ``module.apply(params, batch, method="empty_cache")``. It does not grow.
        """
        return _backbones.empty(self.weights, batch, self._no_taps(batch))

    def _no_taps(self, batch: int) -> jax.Array | None:
        if not self._convolves:
            return None
        return jnp.zeros((batch, _CONV_WIDTH - 1, self.heads * self._size), self.dtype)

    def _rows(
        self, x: jax.Array, position: jax.Array, run: jax.Array, taps: jax.Array | None
    ) -> tuple[_backbones.Heads, jax.Array]:
        """What the fast weights are given, and what the convolutions were."""
        if taps is None:
            query, key = self.query(x), self.key(x)
            plain = query
        else:
            plain = self.query_key(x)
            query, key = (
                _backbones.convolved(
                    plain, taps, run, kernel.astype(self.dtype), bias.astype(self.dtype)
                )
                for kernel, bias in self.convolutions.values()
            )
        query, key, value = (
            part.reshape(*x.shape[:2], self.heads, self._size)
            for part in (query, key, self.value(x))
        )
        query, key = (_backbones.turned(part, position, self.rope_base) for part in (query, key))
        gate = self.base_rate / self._size * jax.nn.sigmoid(self.rate(x))
        return _backbones.Heads(query, key, value, gate), plain

    def _mixed(self, x: jax.Array, out: jax.Array) -> jax.Array:
        mixed = self.norm(out.reshape(*x.shape[:2], -1))
        if self._convolves:
            mixed = _net.gelu(self.gate(x)) * mixed
        return self.out(mixed)

    def _check(self, x: Any, mask: Any, segments: Any, cache: Any) -> None:
        name = type(self).__name__
        if x.ndim != 3 or x.shape[-1] != self.width or not x.shape[1]:
            raise ValueError(
                f"{name} takes x [N, T, width] with T of at least 1 and width {self.width}; got "
                f"shape {x.shape}."
            )
        for word, rows in (("mask", mask), ("segments", segments)):
            if rows is not None and rows.shape != x.shape[:2]:
                raise ValueError(
                    f"{name} takes {word} of shape {x.shape[:2]}, one for each token of x; got "
                    f"{rows.shape}."
                )
        if segments is not None and cache is not None:
            raise ValueError(
                f"{name} takes segments or a cache, got both: read packed sequences in one call."
            )


class TTTLinear(_Layer):
    """A layer in the place of attention: each head holds a linear map that learns its tokens.

    ``out(norm(heads))`` over :func:`~ttt_jax.layers.ttt_linear` of each head, whose initial
    weights, LayerNorm, step sizes and position factors are parameters. Rotary positions count
    inside a chunk. Two backbones:

    * ``"transformer"``: projections for queries, keys and values.
    * ``"mamba"``: queries and keys share a projection, and each has a causal convolution of width
      4 of its own; the output is multiplied by ``gelu(gate(x))``.

    It takes sequences of any length, padding, packed segments, and a cache of fixed size.

    **Published:** 12 heads at a width of 768 (125M parameters), the other defaults; normal
    initialization with 0.02; AdamW with a learning rate of 3e-3.

    **Fails** where exact recall of far tokens is asked: the state has ``heads * head_size ** 2``
    numbers.

    **Cost:** that of :func:`~ttt_jax.layers.ttt_linear` and of 4 (5 with the Mamba backbone)
    projections of ``width * heads * head_size``.

    **Differs** from the authors' code in what :func:`~ttt_jax.layers.ttt_linear` does; the norms,
    convolutions and feed-forward layers around it are the network's own.

    Attributes:
      width: of the tokens.
      heads: H.
      head_size: D, even; None for ``width / heads``.
      backbone: ``"transformer"`` or ``"mamba"``.
      chunk_size: tokens that are learned from one set of weights.
      base_rate: of the step size ``base_rate / D * sigmoid(rate(x))``.
      rope_base: of the geometric series of the rotary frequencies.
      form: of the whole sequences, see :func:`~ttt_jax.layers.ttt_linear`.
      remat: chunks between two kept states, see :func:`~ttt_jax.layers.ttt_linear`.
      dtype: the compute dtype; parameters and fast weights are float32.

    Raises:
      ValueError: when built: sizes that do not fit, or an attribute out of range.

    References:
      Sun et al., `Learning to (Learn at Test Time) <https://arxiv.org/abs/2407.04620>`_, 2024,
      section 2.7 and Appendix C.
    """

    _HIDDEN = 0


class TTTMLP(_Layer):
    """:class:`TTTLinear` over :func:`~ttt_jax.layers.ttt_mlp`, with a hidden width of ``4 D``.

    **Published:** ``base_rate=0.1``, warmed up from 0.01 in a tenth of the training.

    **Fails** as the function does, and trains less stably than TTT-Linear.

    **Cost:** 8 times the state and the inner products of TTT-Linear.

    **Differs** as TTT-Linear does.

    Attributes:
      width: of the tokens.
      heads: H.
      head_size: D, even; None for ``width / heads``.
      backbone: ``"transformer"`` or ``"mamba"``.
      chunk_size: tokens that are learned from one set of weights.
      base_rate: of the step size ``base_rate / D * sigmoid(rate(x))``.
      rope_base: of the geometric series of the rotary frequencies.
      form: of the whole sequences, see :func:`~ttt_jax.layers.ttt_linear`.
      remat: chunks between two kept states, see :func:`~ttt_jax.layers.ttt_linear`.
      dtype: the compute dtype; parameters and fast weights are float32.

    Raises:
      ValueError: when built: sizes that do not fit, or an attribute out of range.

    References:
      Sun et al., `Learning to (Learn at Test Time) <https://arxiv.org/abs/2407.04620>`_, 2024.
    """

    _HIDDEN = 4

    base_rate: float = 0.1

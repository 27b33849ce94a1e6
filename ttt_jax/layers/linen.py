"""TTT-Linear and TTT-MLP as Flax Linen modules, with the projections around the fast weights."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers import _modules, _net
from ttt_jax.layers._backbones import LayerCache

__all__ = ["TTTMLP", "TTTLinear"]

_NORMAL, _ZEROS, _ONES = nn.initializers.normal(0.02), nn.initializers.zeros, nn.initializers.ones


def _dense(features: int, dtype: Any, bias: bool = False) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=_NORMAL)


class _Layer(nn.Module):
    """What both layers are but for the depth of their fast weights."""

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

    _HIDDEN: ClassVar[int]

    def __post_init__(self) -> None:
        self._sizes()
        super().__post_init__()

    def _sizes(self) -> _modules.Sizes:
        return _modules.checked_sizes(self, self._HIDDEN)

    def setup(self) -> None:
        """Makes projections, fast weights and norms."""
        sizes = self._sizes()
        inner, dtype = sizes.inner, self.dtype
        if sizes.convolves:
            self.query_key, self.gate = _dense(inner, dtype), _dense(inner, dtype)
            taps = nn.initializers.normal(_modules.CONV_WIDTH**-0.5)
            self.convolutions = tuple(
                (
                    self.param(f"{name}_conv", taps, (_modules.CONV_WIDTH, inner)),
                    self.param(f"{name}_conv_bias", _ZEROS, (inner,)),
                )
                for name in ("query", "key")
            )
        else:
            self.query, self.key = _dense(inner, dtype), _dense(inner, dtype)
        self.value, self.out = _dense(inner, dtype), _dense(self.width, dtype)
        self.rate = _dense(self.heads, jnp.promote_types(dtype, jnp.float32), bias=True)
        self.norm = nn.LayerNorm(epsilon=_net.EPSILON, dtype=dtype)
        self.tau = self.param("position", _ZEROS, (self.chunk_size,))
        self.weights = tuple(
            self.param(name, _NORMAL if len(shape) == 3 else _ZEROS, shape)
            for name, shape in _modules.shapes(sizes).items()
        )
        shape = (self.heads, sizes.size)
        self.layer_norm = self.param("gamma", _ONES, shape), self.param("beta", _ZEROS, shape)

    def _parts(self) -> _modules.Parts:
        convolves = self._sizes().convolves
        return _modules.Parts(
            query=self.query_key if convolves else self.query,
            key=None if convolves else self.key,
            value=self.value,
            rate=self.rate,
            gate=self.gate if convolves else None,
            norm=self.norm,
            out=self.out,
            convolutions=self.convolutions if convolves else (),
            tau=self.tau,
            weights=self.weights,
            layer_norm=self.layer_norm,
        )

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
        return _modules.call(
            self._sizes(), self._parts(), x, mask=mask, segments=segments, cache=cache
        )

    def empty_cache(self, batch: int) -> LayerCache:
        """The cache of N sequences without tokens; needs the parameters, as ``__call__`` does.

        ``module.apply(params, batch, method="empty_cache")``. It does not grow.
        """
        return _modules.empty_cache(self._sizes(), self._parts(), batch)


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

    **Cost:** that of :func:`~ttt_jax.layers.ttt_linear` and of 4
    projections of ``width * heads * head_size``.

    **Differs** from the authors' code in what :func:`~ttt_jax.layers.ttt_linear` does; the norms,
    convolutions and feed-forward layers around it are the network's own.

    Attributes:
      width: of the tokens.
      heads: how many; H.
      head_size: D, even; None for ``width / heads``.
      backbone: ``"transformer"`` or ``"mamba"``.
      chunk_size: tokens that are learned from one set of weights.
      base_rate: of the step size ``base_rate / D * sigmoid(rate(x))``.
      rope_base: of the geometric series of the rotary frequencies.
      form: see :func:`~ttt_jax.layers.ttt_linear`, and with a cache
        :func:`~ttt_jax.layers.ttt_prefill`, where ``"primal"`` is ``"dual"``.
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
      heads: how many; H.
      head_size: D, even; None for ``width / heads``.
      backbone: ``"transformer"`` or ``"mamba"``.
      chunk_size: tokens that are learned from one set of weights.
      base_rate: of the step size ``base_rate / D * sigmoid(rate(x))``.
      rope_base: of the geometric series of the rotary frequencies.
      form: see :func:`~ttt_jax.layers.ttt_linear`, and with a cache
        :func:`~ttt_jax.layers.ttt_prefill`, where ``"primal"`` is ``"dual"``.
      remat: chunks between two kept states, see :func:`~ttt_jax.layers.ttt_linear`.
      dtype: the compute dtype; parameters and fast weights are float32.

    Raises:
      ValueError: when built: sizes that do not fit, or an attribute out of range.

    References:
      Sun et al., `Learning to (Learn at Test Time) <https://arxiv.org/abs/2407.04620>`_, 2024.
    """

    _HIDDEN = 4

    base_rate: float = 0.1

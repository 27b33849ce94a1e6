"""TTT-Linear and TTT-MLP as Flax NNX modules, with the parameters of those of Linen."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_jax.layers import _modules, _net
from ttt_jax.layers._backbones import LayerCache

__all__ = ["TTTMLP", "TTTLinear"]

_NORMAL = nnx.initializers.normal(0.02)


class _Layer(nnx.Module):
    """What both layers are but for the depth of their fast weights."""

    _HIDDEN: ClassVar[int]
    _BASE_RATE: ClassVar[float]

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_size: int | None = None,
        backbone: str = "transformer",
        chunk_size: int = 16,
        base_rate: float | None = None,
        rope_base: float = 1e4,
        form: str = "auto",
        remat: int = 4,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.width, self.heads, self.head_size = width, heads, head_size
        self.backbone, self.chunk_size = backbone, chunk_size
        self.base_rate = self._BASE_RATE if base_rate is None else base_rate
        self.rope_base, self.form, self.remat, self.dtype = rope_base, form, remat, dtype
        self._make(self._sizes(), rngs)

    def _sizes(self) -> _modules.Sizes:
        return _modules.checked_sizes(self, self._HIDDEN)

    def _make(self, sizes: _modules.Sizes, rngs: nnx.Rngs) -> None:
        def dense(features: int, inputs: int = self.width, **more: Any) -> nnx.Linear:
            more = {"use_bias": False, "dtype": sizes.dtype, **more}
            return nnx.Linear(inputs, features, kernel_init=_NORMAL, rngs=rngs, **more)

        def drawn(shape: tuple[int, ...], spread: float) -> nnx.Param:
            return nnx.Param(spread * jax.random.normal(rngs.params(), shape))

        inner = sizes.inner
        if sizes.convolves:
            self.query_key, self.gate = dense(inner), dense(inner)
            for name in ("query", "key"):
                taps = drawn((_modules.CONV_WIDTH, inner), _modules.CONV_WIDTH**-0.5)
                setattr(self, f"{name}_conv", taps)
                setattr(self, f"{name}_conv_bias", nnx.Param(jnp.zeros(inner)))
        else:
            self.query, self.key = dense(inner), dense(inner)
        self.value, self.out = dense(inner), dense(self.width, inner)
        wide = jnp.promote_types(sizes.dtype, jnp.float32)
        self.rate = dense(self.heads, use_bias=True, dtype=wide)
        self.norm = nnx.LayerNorm(inner, epsilon=_net.EPSILON, dtype=sizes.dtype, rngs=rngs)
        self.position = nnx.Param(jnp.zeros(sizes.chunk_size))
        for name, shape in _modules.shapes(sizes).items():
            weights = drawn(shape, 0.02) if len(shape) == 3 else nnx.Param(jnp.zeros(shape))
            setattr(self, name, weights)
        self.gamma = nnx.Param(jnp.ones((self.heads, sizes.size)))
        self.beta = nnx.Param(jnp.zeros((self.heads, sizes.size)))

    def _parts(self, sizes: _modules.Sizes) -> _modules.Parts:
        names = ("query", "key") if sizes.convolves else ()
        return _modules.Parts(
            query=self.query_key if sizes.convolves else self.query,
            key=None if sizes.convolves else self.key,
            value=self.value,
            rate=self.rate,
            gate=self.gate if sizes.convolves else None,
            norm=self.norm,
            out=self.out,
            convolutions=tuple(
                (getattr(self, f"{name}_conv")[...], getattr(self, f"{name}_conv_bias")[...])
                for name in names
            ),
            tau=self.position[...],
            weights=tuple(getattr(self, name)[...] for name in _modules.shapes(sizes)),
            layer_norm=(self.gamma[...], self.beta[...]),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> Any:
        """Mixes tokens; see :meth:`ttt_jax.layers.TTTLinear.__call__`."""
        sizes = self._sizes()
        return _modules.call(
            sizes, self._parts(sizes), x, mask=mask, segments=segments, cache=cache
        )

    def empty_cache(self, batch: int) -> LayerCache:
        """The cache of N sequences without tokens; it does not grow."""
        sizes = self._sizes()
        return _modules.empty_cache(sizes, self._parts(sizes), batch)


class TTTLinear(_Layer):
    """:class:`ttt_jax.layers.TTTLinear` in NNX; its parameters have the same names and shapes.

    Args:
      width: of the tokens.
      heads: how many; H.
      head_size: D, even; None for ``width / heads``.
      backbone: ``"transformer"`` or ``"mamba"``.
      chunk_size: tokens that are learned from one set of weights.
      base_rate: of the step size ``base_rate / D * sigmoid(rate(x))``; None for the published 1.0.
      rope_base: of the geometric series of the rotary frequencies.
      form: see :func:`ttt_jax.layers.ttt_linear`, and with a cache
        :func:`ttt_jax.layers.ttt_prefill`, where ``"primal"`` is ``"dual"``.
      remat: chunks between two kept states.
      dtype: the compute dtype.
      rngs: whose stream ``params`` the initial weights are drawn from.

    Raises:
      ValueError: sizes that do not fit, or one out of range.
    """

    _HIDDEN = 0
    _BASE_RATE = 1.0


class TTTMLP(_Layer):
    """:class:`ttt_jax.layers.TTTMLP` in NNX; its parameters have the same names and shapes.

    It takes the arguments of :class:`TTTLinear`; the published ``base_rate`` is 0.1.

    Raises:
      ValueError: sizes that do not fit, or one out of range.
    """

    _HIDDEN = 4
    _BASE_RATE = 0.1

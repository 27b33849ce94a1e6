"""A decoder of pairs of colored grids, one table entry per task, trained on many tasks at once."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.data.grid_sequences import CLASSES, MOST_CELLS, VOCABULARY
from ttt_jax.kernels.attention import form_of
from ttt_jax.kernels.attention.decoding import attend_token
from ttt_jax.kernels.attention.spans import attend_spans
from ttt_jax.models import _grid_checks
from ttt_jax.models._decoder_layer import Linear
from ttt_jax.models.rotary import rotate

_SYMMETRIES = 8
# A row or column past the last cell: the newline, the end.
_PLACES = MOST_CELLS + 2
_PARTS = 3
_SCORE_SCALE = 1.5


class GridCache(NamedTuple):
    """Rotated keys, and values, of the tokens that were read.

    Attributes:
      keys: ``[L, N, S, H, D]``.
      values: ``[L, N, S, H, D]``.
    """

    keys: jax.Array
    values: jax.Array


class _Step(NamedTuple):
    """What all layers of a call share.

    Attributes:
      angles: cosine and sine, each ``[N, T, D / 2]``.
      first: int32 ``[N, T]``; see :func:`ttt_jax.kernels.attention.spans.attend_spans`.
      last: int32 ``[N, T]``.
      cache: of the tokens before, and where the one token of a row goes in it, int32 ``[N]``; None
        without a cache.
    """

    angles: tuple[jax.Array, jax.Array]
    first: jax.Array
    last: jax.Array
    cache: tuple[GridCache, jax.Array] | None


class GridDecoder(nn.Module):
    """A pre-norm transformer over :mod:`ttt_jax.data.grid_sequences`, a vector per task and view.

    No other pair is in the context: what a task does is learned, in a vector that is added to every
    token of its sequences (of the task, of the view's symmetry, and of the two together). Rotary
    positions are of row, column and part at once, so "copy the input's cell at my place" is
    attention at offset zero. Legend and input see each other in both directions. RMS norms have no
    gain, queries and keys are normalized, what a layer adds begins at zero, and every layer mixes
    in the embedding.

    Attributes:
      tasks: how many tasks the tables hold.
      width: of the residual stream.
      depth: L, number of layers.
      heads: H; divides ``width``, and ``width / heads`` is a multiple of 16.
      mlp_width: of the gated MLP.
      attention: ``"fused"`` where that can be, or ``"xla"``.
      remat: whether a layer's activations are computed again in the backward pass.
      unroll: layers per step of the scan over layers; as many as layers for no loop.
      dtype: the compute dtype; parameters and logits are float32.

    Raises:
      ValueError: when built: an attribute out of range.
    """

    tasks: int
    width: int = 768
    depth: int = 8
    heads: int = 12
    mlp_width: int = 2048
    attention: str = "fused"
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _grid_checks.check(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Mapping[str, Any], cache: GridCache | None = None, *, keep: bool = False
    ) -> Any:
        """Logits of what every token predicts.

        Args:
          inputs: ``token``, ``row``, ``column`` and ``part``, integers ``[N, T]``; ``segment``
            ``[N, T]``, the place of a token's sequence in its row, -1 for none; ``task`` and
            ``view`` ``[N, M]``; ``first`` and ``last`` ``[N, T]``, what each token sees. As in
            :class:`ttt_jax.data.grid_sequences.Packed`. With a cache T = 1, ``slot`` ``[N]`` says
            where each token goes, and ``last`` is at most that.
          cache: of the tokens before.
          keep: whether the keys and values of the tokens are returned as a cache.

        Returns:
          float32 ``[N, T, CLASSES]``; with a cache, or with ``keep``, the pair of them and the
          cache.
        """
        given = {name: jnp.asarray(leaf).astype(jnp.int32) for name, leaf in inputs.items()}
        x = self._embed(given)
        shared = _Step(
            _angles(self.width // self.heads, given),
            given["first"],
            given["last"],
            None if cache is None else (cache, given["slot"]),
        )
        layer = nn.remat(_GridLayer, prevent_cse=False) if self.remat else _GridLayer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=min(self.unroll, self.depth),
        )(
            self.heads,
            self.mlp_width,
            form_of(self.attention, self.dtype),
            self.dtype,
            name="layers",
        )
        out, rows = layers(x, jnp.arange(self.depth), x, shared)
        head = self.param("head", nn.initializers.normal(0.01), (self.width, CLASSES), jnp.float32)
        logits = jax.lax.dot_general(
            _normalized(out),
            head.astype(self.dtype),
            (((2,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        if cache is None:
            return (logits, GridCache(*rows)) if keep else logits
        place = jnp.arange(out.shape[0])
        return logits, GridCache(
            *(
                whole.at[:, place, given["slot"]].set(new[:, :, 0])
                for whole, new in zip(cache, rows, strict=True)
            )
        )

    def _embed(self, given: Mapping[str, jax.Array]) -> jax.Array:
        """``[N, T, width]``, by products with one-hot rows: their gradient is no scatter."""
        table = nn.initializers.normal(0.5)
        places = VOCABULARY + 2 * _PARTS * _PLACES
        tokens = self.param("token", table, (places, self.width), jnp.float32)
        of_row = VOCABULARY + given["part"] * _PLACES + given["row"]
        of_column = of_row + (_PARTS * _PLACES + given["column"] - given["row"])
        hot = sum(
            jax.nn.one_hot(index, places, dtype=self.dtype)
            for index in (given["token"], of_row, of_column)
        )
        task = self.param("task", table, (self.tasks, self.width), jnp.float32)
        view = self.param("view", table, (_SYMMETRIES, self.width), jnp.float32)
        pair = self.param(
            "task_view", nn.initializers.zeros_init(), (self.tasks, _SYMMETRIES, self.width)
        )
        vector = task[given["task"]] + view[given["view"]] + pair[given["task"], given["view"]]
        own = jax.nn.one_hot(given["segment"], vector.shape[1], dtype=self.dtype)
        added = jnp.einsum("ntm,nmd->ntd", own, vector.astype(self.dtype))
        return _normalized(hot @ tokens.astype(self.dtype) + added)


class _GridLayer(nn.Module):
    """Attention and a gated MLP, each added to a mixture of its input and the embedding."""

    heads: int
    mlp_width: int
    form: str
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array, embedding: jax.Array, shared: _Step
    ) -> tuple[jax.Array, Any]:
        width = x.shape[-1]
        mix = self.param("mix", _first_of_two, (2,), jnp.float32).astype(self.dtype)
        gain = self.param("gain", nn.initializers.ones_init(), (self.heads,), jnp.float32)
        x = mix[0] * x + mix[1] * embedding
        y = _normalized(x)

        def heads(name: str) -> jax.Array:
            made = self._linear(name, width)(y)
            return made.reshape(*x.shape[:2], self.heads, -1)

        query, key, value = map(heads, ("query", "key", "value"))
        query = (
            rotate(_normalized(query), shared.angles) * gain.astype(self.dtype)[None, None, :, None]
        )
        key = rotate(_normalized(key), shared.angles)
        mixed, rows = self._attend(query, key, value, layer, shared)
        x = x + self._linear("out", width, zeros=True)(mixed.reshape(x.shape))
        y = _normalized(x)
        hidden = nn.silu(self._linear("gate", self.mlp_width)(y)) * self._linear(
            "up", self.mlp_width
        )(y)
        return x + self._linear("down", width, zeros=True)(hidden), rows

    def _linear(self, name: str, features: int, zeros: bool = False) -> Linear:
        spread = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        initializer = nn.initializers.zeros_init() if zeros else spread
        return Linear(features, dtype=self.dtype, initializer=initializer, name=name)

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, layer: jax.Array, shared: _Step
    ) -> tuple[jax.Array, Any]:
        scale, rows = _SCORE_SCALE * query.shape[-1] ** -0.5, (key, value)
        if shared.cache is None:
            mixed = attend_spans(
                query, key, value, shared.first, shared.last, form=self.form, scale=scale
            )
            return mixed, rows
        # The token itself is no part of the cache yet: a cache that every layer returned would be
        # copied as a whole with every token.
        cache, slot = shared.cache
        token = query[:, 0], key[:, 0], value[:, 0]
        held = cache.keys, cache.values
        span = shared.first[:, 0], jnp.minimum(shared.last[:, 0] + 1, slot)
        mixed = attend_token(token, held, layer, *span, form=self.form, scale=scale)
        return mixed[:, None], rows


def _first_of_two(key: Any, shape: Any, dtype: Any) -> jax.Array:
    return jnp.array([1.0, 0.0], dtype)


def _normalized(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-6)).astype(x.dtype)


def _angles(size: int, given: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Of row, column and part: 7, 7 and 2 of 16 pairs, with wavelengths of 3 to 300 cells."""
    half = size // 2
    share = 7 * half // 16
    cells = jnp.geomspace(2.0, 0.02, share)
    parts = jnp.geomspace(2.0, 0.25, half - 2 * share)
    angle = jnp.concatenate(
        [
            jnp.multiply.outer(given[name].astype(jnp.float32), frequencies)
            for name, frequencies in (("row", cells), ("column", cells), ("part", parts))
        ],
        -1,
    )
    return jnp.cos(angle), jnp.sin(angle)

"""A decoder of tokens in the forms of Llama, Qwen2 and Gemma 3, or of layers that learn."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.kernels.attention import form_of
from ttt_jax.kernels.attention.cached import sees
from ttt_jax.models import _decoder_checks, _logits, cache as caches, rotary
from ttt_jax.models._decoder_layer import DecoderLayer, Shared, Sizes, View
from ttt_jax.models._ttt_mixer import Learner, Reading, order_of, ordered
from ttt_jax.models.cache import Cache, States

# A window wider than any text.
_EVERYTHING = 1 << 30


class Decoder(nn.Module):
    """A pre-norm transformer over tokens: RMSNorm, rotary positions, grouped queries, gated MLP.

    The defaults are Llama's form. Qwen2's has ``biases``. Gemma 3's has ``local_window``,
    ``query_key_norm``, ``post_norms``, ``scaled_embedding`` and ``activation="gelu"``. Layers are
    scanned: every leaf of ``layers`` has a leading axis over the layers. With ``stages=(22, 8)``
    the leaves of ``layers_0`` and ``layers_1`` have 22 and 8, so that a selection can name the last
    ones.

    With ``mixer="ttt_linear"`` or ``"ttt_mlp"`` a layer that learns while it reads
    (:class:`ttt_jax.layers.TTTLinear`) stands in the place of attention in every layer. Its state
    does not grow: the cache has one size for any number of tokens. It reads tokens in the order of
    a call, and of positions that are given it takes the sign alone, for padding; a chunk that is
    read again is learned again. Attributes of attention are then left out.

    Attributes:
      vocabulary: V.
      width: of the residual stream.
      depth: L, number of layers.
      heads: H, of queries; divides ``width`` where ``head_size`` is None.
      kv_heads: K, of keys and values; divides H; None for H.
      head_size: D; None for ``width / heads``.
      mlp_width: of the gated MLP; None for four times ``width``.
      epsilon: of every RMSNorm.
      rope_base: of the rotary frequencies.
      interleaved: the layout of the rotary pairs, see :func:`ttt_jax.models.rotary.rotate`.
      activation: ``"silu"`` or ``"gelu"``.
      biases: whether queries, keys and values have biases.
      query_key_norm: whether queries and keys are normalized, per head.
      post_norms: whether what attention and MLP add is normalized.
      scaled_embedding: whether embeddings are multiplied by ``sqrt(width)``.
      tied: whether the embedding is the head, too.
      local_window: how many tokens, itself among them, a token sees in a local layer; None where
        all layers are global.
      global_every: with ``local_window``, every so many layers one is global: the last of them.
      local_rope_base: of local layers.
      window: how many tokens, itself among them, a token sees in global layers; None for all.
      sinks: how many first tokens are seen beside the window, for ever (Xiao et al., 2023).
      context: tokens at most in training: later positions are moved so that the last token of a
        call has ``context - 1`` and the sinks keep their own.
      stages: how many layers each scan has; None for one scan of all.
      attention: ``"fused"`` where that can be, or ``"xla"``.
      remat: whether a layer's activations are computed again in the backward pass.
      cache_gradients: whether gradients go through what a cache holds, to the tokens that were read
        before: for training over the chunks of a document.
      unroll: how many layers a step of a scan has; as many as the layers, and there is no loop:
        the fastest program, as no activation is copied for the backward pass, and the slowest to
        compile.
      dtype: the compute dtype; parameters are float32.
      logits_dtype: of the logits, whose products are summed in float32 whatever it is. Beside a
        large vocabulary they are most of a call's memory, and bfloat16 halves what is written and
        read; a logit of 16 is then rounded to the next of 1/16.
      mixer: ``"attention"``, ``"ttt_linear"`` or ``"ttt_mlp"``.
      backbone: of a TTT layer, ``"transformer"`` or ``"mamba"``.
      chunk_size: of a TTT layer, tokens that are learned from one set of weights.
      form: of a TTT layer, see :func:`ttt_jax.layers.ttt_linear`.
      pre_convolution: of a TTT layer, whether ``x + conv(RMSNorm(x))`` comes before it: a causal
        convolution of each channel over the residual stream, width 4.

    Logits have a rule of their own for reverse mode alone: ``jax.jvp`` is refused by JAX. Second
    derivatives, forward or reverse over reverse, need ``attention="xla"``, and of TTT layers
    ``form="dual"``.

    Raises:
      ValueError: when built: sizes that do not fit, or an attribute out of range.

    References:
      Touvron et al., `Llama 2 <https://arxiv.org/abs/2307.09288>`_, 2023; Qwen Team, `Qwen2
      <https://arxiv.org/abs/2407.10671>`_, 2024; Gemma Team, `Gemma 3
      <https://arxiv.org/abs/2503.19786>`_, 2025; Xiao et al., `Attention sinks
      <https://arxiv.org/abs/2309.17453>`_, 2023; Sun et al., `Learning to (Learn at Test Time)
      <https://arxiv.org/abs/2407.04620>`_, 2024.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    mlp_width: int | None = None
    epsilon: float = 1e-5
    rope_base: float = 1e4
    interleaved: bool = False
    activation: str = "silu"
    biases: bool = False
    query_key_norm: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    tied: bool = True
    local_window: int | None = None
    global_every: int = 6
    local_rope_base: float = 1e4
    window: int | None = None
    sinks: int = 0
    context: int = 8192
    stages: tuple[int, ...] | None = None
    attention: str = "fused"
    remat: bool = False
    cache_gradients: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32
    logits_dtype: Any = jnp.float32
    mixer: str = "attention"
    backbone: str = "transformer"
    chunk_size: int = 16
    form: str = "auto"
    pre_convolution: bool = False

    def __post_init__(self) -> None:
        _decoder_checks.check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Any, cache: Any = None, *, write: bool = True) -> Any:
        """Logits of the next token after each.

        Args:
          inputs: token ids ``[N, T]``, or a mapping with ``tokens`` and, where wanted,
            ``segments`` ``[N, T]`` (packed sequences: a token sees its own segment alone, and
            positions begin anew with each; not beside a cache) and ``positions`` ``[N, T]``
            (int32; a negative one is padding, which nothing sees). Without positions they follow
            those of the cache, and a segment is a run: a number that comes again is another one.
          cache: of :func:`empty_cache`; None for tokens that begin a sequence.
          write: whether the tokens are put into the cache.

        Returns:
          ``[N, T, V]`` of ``logits_dtype``; with a cache, the pair of them and the cache with the
          tokens, or without ``write`` the :class:`~ttt_jax.models.cache.Rows` that are to be put
          into it; of TTT layers, the :class:`~ttt_jax.models.cache.States` after the tokens either
          way.

        Raises:
          ValueError: tokens without two axes or of no integers, or segments beside a cache.
        """
        tokens, positions, segments = _parts(inputs, cache)
        given = isinstance(inputs, Mapping) and "positions" in inputs
        embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (self.vocabulary, self.width), jnp.float32
        )
        x = embedding.astype(self.dtype)[tokens]
        if self.scaled_embedding:
            x = x * jnp.asarray(self.width**0.5, self.dtype)
        if self.mixer != "attention":
            return self._learned(x, embedding, (positions, segments, cache), given)
        shared, slots = self._shared(
            positions, segments, cache, causal=cache is None and segments is None and not given
        )
        held = None if cache is None else (cache.keys, cache.values)
        x, made = self._stack(x, held, shared)
        logits = self._head(x, embedding)
        if cache is None or slots is None:
            return logits
        keys, values = made
        new = caches.Rows(keys, values, positions, slots)
        return logits, caches.put(cache, new) if write else new

    def _learned(
        self, x: jax.Array, embedding: jax.Array, parts: tuple[Any, Any, Any], given: bool
    ) -> Any:
        """The rest of a call where layers learn, from embeddings on."""
        positions, segments, cache = parts
        order = order_of(positions if given and x.shape[1] > 1 else None)
        real = positions >= 0 if given and x.shape[1] == 1 else order.real
        length = jnp.zeros(len(x), jnp.int32) if cache is None else cache.length
        reading = Reading(ordered(segments, order.there), real, length == 0)
        held = None if cache is None else (cache.layers, cache.taps)
        x, made = self._stack(ordered(x, order.there), held, reading)
        logits = self._head(ordered(x, order.back), embedding)
        if cache is None:
            return logits
        layers, taps = made
        return logits, States(layers, jnp.maximum(length, positions.max(-1) + 1), taps)

    def _stack(self, x: jax.Array, held: Any, shared: Shared | Reading) -> tuple[jax.Array, Any]:
        """All layers, and what they made for the cache."""
        made = []
        first = 0
        for stage, count in enumerate(self.stages or (self.depth,)):
            name = "layers" if self.stages is None else f"layers_{stage}"
            part = slice(first, first + count)
            x, rows = self._scan(count)(self._sizes(), name=name)(
                x,
                jax.tree.map(lambda leaf, part=part: leaf[part], held),
                self._is_local(jnp.arange(first, first + count)),
                shared,
            )
            made.append(rows)
            first += count
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)
        return x, joined if self.cache_gradients else jax.lax.stop_gradient(joined)

    def _head(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """Logits of the last layer's outputs."""
        x = nn.RMSNorm(self.epsilon, dtype=self.dtype, name="norm")(x)
        head = embedding
        if not self.tied:
            shape = (self.vocabulary, self.width)
            head = self.param("head", nn.initializers.normal(0.02), shape, jnp.float32)
        return _logits.of(x, head.astype(self.dtype), jnp.dtype(self.logits_dtype))

    def empty_cache(self, batch: int, tokens: int, chunk: int = 1) -> Any:
        """A cache without tokens, of the compute dtype; needs no parameters.

        With attention a :class:`~ttt_jax.models.cache.Cache`, with TTT layers
        :class:`~ttt_jax.models.cache.States`, whatever ``tokens`` and ``chunk`` are: fast weights
        of float32, inputs of convolutions of the compute dtype.

        Args:
          batch: N, sequences.
          tokens: how many a sequence has, at most: the cache is no larger than it must be.
          chunk: how many tokens a call reads, at most.
        """
        if self.mixer != "attention":
            return self.learner.empty(self.depth, batch)
        slots = tokens
        if self.window is not None:
            slots = min(tokens, self.sinks + self.window - 1 + chunk)
        # cuDNN takes even numbers alone.
        slots = max(slots + slots % 2, self.sinks + chunk)
        shape = (self.depth, batch, slots, self._kv_heads, self._head_size)
        empty = jnp.zeros(shape, self.dtype)
        return Cache(empty, empty, jnp.full((batch, slots), caches.EMPTY, jnp.int32))

    @property
    def learner(self) -> Learner:
        """Settings of the layers that learn."""
        return Learner(
            mixer=self.mixer,
            width=self.width,
            heads=self.heads,
            head_size=self._head_size,
            backbone=self.backbone,
            chunk_size=self.chunk_size,
            rope_base=self.rope_base,
            form=self.form,
            pre_convolution=self.pre_convolution,
            dtype=self.dtype,
        )

    @property
    def _plain_window(self) -> int | None:
        """The window where nothing is seen beside it, so that no mask is needed."""
        return None if self.sinks or self.local_window else self.window

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _head_size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    def _sizes(self) -> Sizes:
        return Sizes(
            heads=self.heads,
            kv_heads=self._kv_heads,
            head_size=self._head_size,
            mlp_width=4 * self.width if self.mlp_width is None else self.mlp_width,
            epsilon=self.epsilon,
            interleaved=self.interleaved,
            activation=self.activation,
            biases=self.biases,
            query_key_norm=self.query_key_norm,
            post_norms=self.post_norms,
            form=form_of(self.attention, self.dtype),
            cache_gradients=self.cache_gradients,
            window=self._plain_window,
            learner=None if self.mixer == "attention" else self.learner,
            dtype=self.dtype,
        )

    def _scan(self, count: int) -> Any:
        layer = nn.remat(DecoderLayer, prevent_cse=False) if self.remat else DecoderLayer
        return nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=count,
            unroll=min(self.unroll, count),
        )

    def _is_local(self, layers: jax.Array) -> jax.Array:
        return (layers + 1) % self.global_every != 0 if self.local_window else layers < 0

    def _shared(
        self,
        positions: jax.Array,
        segments: jax.Array | None,
        cache: Cache | None,
        *,
        causal: bool,
    ) -> tuple[Shared, jax.Array | None]:
        """What layers share, and the slots of the tokens in the cache."""
        slots, held = None, None
        if cache is not None:
            slots = caches.slots_of(positions, self.sinks, cache.slots)
            held = caches.write(cache.positions, slots, jnp.full_like(positions, caches.EMPTY))
        shift = jnp.maximum(positions.max(-1, keepdims=True) + 1 - self.context, 0)

        def view(window: int | None, sinks: int, base: float, causal: bool) -> View:
            own, turned = (
                rotary.angles(
                    jnp.where(where < self.sinks, where, where - shift), self._head_size, base
                )
                for where in (positions, positions if held is None else held)
            )
            width = jnp.int32(_EVERYTHING if window is None else window)
            mask = None
            plain = window is None or window == self._plain_window
            if held is None and not (causal and plain):
                mask = sees(positions[:, :, None], positions[:, None], width, sinks)
                if segments is not None:
                    mask &= segments[:, :, None] == segments[:, None]
                    mask &= jnp.tril(jnp.ones((1, *mask.shape[1:]), bool))
            return View(mask, own, None if held is None else turned, width, jnp.int32(sinks))

        nearby = None
        if self.local_window is not None:
            near = min(self.local_window, self.window or self.local_window)
            nearby = view(near, 0, self.local_rope_base, causal)
        # A layer chooses between the two, so both have a mask.
        everywhere = view(self.window, self.sinks, self.rope_base, causal and nearby is None)
        return Shared(everywhere, nearby, positions, held), slots


def _parts(
    inputs: Any, cache: Cache | States | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Tokens, positions, and segments or None."""
    given = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    tokens, segments = jnp.asarray(given["tokens"]), given.get("segments")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            "A Decoder takes token ids [N, T] of an integer dtype; got shape "
            f"{tokens.shape} and dtype {tokens.dtype}: add the batch's axis, or use ttt.unbatched."
        )
    if segments is not None and cache is not None:
        raise ValueError(
            "A Decoder takes segments or a cache, got both: read packed sequences in one call."
        )
    positions = given.get("positions")
    if positions is None:
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        if segments is not None:
            begins = jnp.concatenate(
                [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1
            )
            index = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
            segments = jnp.cumsum(begins, axis=1)
        elif cache is not None:
            index = index + cache.length[:, None]
        positions = index
    return tokens, positions, segments

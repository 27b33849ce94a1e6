"""Continuing a document that was learned from, and the adapter that it leaves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _varying, generation, inner, readers, select
from ttt_jax.base import Info, Key, Params, Predictor, PyTree, Selection, Stream
from ttt_jax.generation import Generated, Sampler
from ttt_jax.methods.document_ttt import chunks_of, document_of, learning_stream
from ttt_jax.readers import Reader

CACHES = ("recomputed", "kept", "empty")
"""What :func:`continue_document` remembers of the document."""


@_arguments.checked(read=readers.rule, bos=_arguments.count(0))
def document_adapter(
    read: Reader,
    *,
    optimizer: optax.GradientTransformation = optax.adam(3e-3, b1=0.9, b2=0.95, eps=1e-10),
    select: Selection = select.lora(),
    num_steps: int = 1,
    bos: int | None = None,
) -> Predictor:
    """A predictor whose output is the adapter that a document leaves.

    It makes the updates of :func:`document_ttt` and returns the selected leaves after the last one,
    ``None`` in place of the others: what :func:`ttt_jax.adapted`, a
    :class:`ttt_jax.serving.Request` and :func:`ttt_jax.checkpoint.save_adapter` take. Under
    :func:`~ttt_jax.batched` thousands of documents leave theirs, stacked along the first axis.

    **Fails** where the document is short: the first thousand tokens teach least.

    **Cost:** a forward and a backward pass per chunk and step.

    Args:
      read: reads a chunk with what is remembered.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: updates per chunk, static.
      bos: the token before the first; None for a model without.

    Returns:
      A :class:`~ttt_jax.Predictor` over ``x``, a document as in :func:`document_ttt`: ``tokens``
      and, where wanted, ``mask`` ``[T, L]``; what comes after its last token of mask 1 is padding.

    Raises:
      ValueError: ``num_steps`` is no integer of at least 1; when called: ``x`` of other shapes.

    References:
      As for :func:`document_ttt`.
    """
    _check_steps("document_adapter", num_steps, 1)
    readers.check_bos(read, bos)

    def predict(params: Params, x: Any, key: Key) -> tuple[PyTree, Info]:
        document = _document("document_adapter", x, bos)
        stream = learning_stream(read, document.room(0), optimizer, select, num_steps)
        carry, info = _learned(stream, params, document, key)
        return carry.fast, info

    return predict


@_arguments.checked(read=readers.rule, num_tokens=_arguments.count(1), bos=_arguments.count(0))
def continue_document(
    read: Reader,
    *,
    num_tokens: int,
    sampler: Sampler | None = None,
    stop: Sequence[int] = (),
    cache: str = "recomputed",
    optimizer: optax.GradientTransformation = optax.adam(3e-3, b1=0.9, b2=0.95, eps=1e-10),
    select: Selection = select.lora(),
    num_steps: int = 1,
    bos: int | None = None,
) -> Predictor:
    """A predictor that learns from a document, then continues it or a prompt that follows it.

    The document is learned chunk by chunk as in :func:`document_ttt`. The continuation is that of
    :func:`ttt_jax.generation.generate` under the adapted parameters. An update makes keys and
    values of earlier tokens those of older parameters, so what is remembered is said, not guessed:

    * ``"recomputed"``: the document is read again under the adapted parameters, which is what
      ``generate`` on document and prompt gives;
    * ``"kept"``: every chunk's keys and values stay those of the parameters it was read with;
    * ``"empty"``: nothing but the adapter; the prompt begins at position 0, as for a document that
      is longer than any window.

    **Fails** on a short document as :func:`document_ttt` does, and with ``"empty"`` on what has to
    be copied word for word: an adapter recalls no exact string.

    **Cost** of an instance: a forward and a backward pass per chunk and step, one more forward pass
    per chunk with ``"recomputed"``, and a pass per token.

    Args:
      read: with a memory, such as :func:`ttt_jax.models.reader`.
      num_tokens: tokens generated at most, static.
      sampler: as for :func:`~ttt_jax.generation.generate`.
      stop: tokens that end the continuation; they are part of it.
      cache: ``"recomputed"``, ``"kept"`` or ``"empty"``.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: updates per chunk, static; 0 continues with the model as it is.
      bos: the token before the first; None for a model without.

    Returns:
      A :class:`~ttt_jax.Predictor` with output :class:`~ttt_jax.generation.Generated`, over ``x``:
      a document as in :func:`document_ttt`, ``tokens`` and, where wanted, ``mask`` ``[T, L]`` (what
      comes after its last token of mask 1 is padding: an unscored end belongs in the prompt), and,
      where wanted, ``prompt``: tokens ``[P]``, or a mapping of ``tokens`` and ``mask``. ``Info``
      has the steps on the document; ``ok`` is False where one was not finite and not taken, where
      the continuation's logits were not, or where there is nothing to continue.

    Raises:
      ValueError: an argument out of range, or another ``cache``; when called: ``x`` of other
        shapes, or ``cache="empty"`` without a prompt.

    References:
      As for :func:`document_ttt`; stale keys: vllm-project/vllm, issue 42125.
    """
    stop_tokens, draw = generation.check_stop(stop), sampler or generation.greedy()
    _check_steps("continue_document", num_steps, 0)
    readers.check_bos(read, bos)
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {CACHES}; got {cache!r}.")

    def predict(params: Params, x: Any, key: Key) -> tuple[Generated, Info]:
        document = _document("continue_document", x, bos)
        prompt = _prompt(x, cache)
        length = document.size[1]
        room = document.room(prompt[0].size + num_tokens)
        learn_key, draw_key = jax.random.split(key)
        stream = learning_stream(read, room, optimizer, select, num_steps)
        carry, info = _learned(stream, params, document, learn_key)
        adapted, memory = params, carry
        if num_steps:
            adapted = select.merge(carry.fast, select.split(params)[1])
            memory = carry.memory
        if cache != "kept":
            memory = read.init(1, *room)
        if cache == "recomputed":
            inputs, positions = (
                document.chunks[name].reshape(-1) for name in ("inputs", "positions")
            )
            memory = generation.read_in_chunks(read, adapted, memory, (inputs, positions), length)
        joined, first = _after(document, prompt, cache, bos)
        row = generation.begin(read, adapted, memory, joined, first, length)
        made, end = generation.continued(
            read, adapted, row, draw_key, num_tokens, draw, stop_tokens
        )
        return made, info._replace(ok=info.ok & end.ok)

    return predict


class _Document(NamedTuple):
    """A document in chunks.

    Attributes:
      chunks: of :func:`chunks_of`.
      size: T and L.
      count: int32 scalar, n, its tokens.
      last: int32 scalar, the last of them, which is in no chunk's inputs.
    """

    chunks: dict[str, jax.Array]
    size: tuple[int, int]
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose
    last: jax.Array

    def room(self, more: int) -> tuple[int, int]:
        """Tokens of a memory that has room for more, and tokens of a chunk."""
        count, length = self.size
        return count * length + 1 + more, length


def _document(place: str, x: Any, bos: int | None) -> _Document:
    own = {"tokens", "mask"}
    leaves = {name: x[name] for name in own & set(x)} if isinstance(x, Mapping) else x
    tokens, mask = document_of(place, leaves)
    places = jnp.arange(1, tokens.size + 1, dtype=jnp.int32)
    count = jnp.where(mask.reshape(-1) != 0, places, 0).max()
    chunks = chunks_of(tokens, mask, bos)
    last = tokens.reshape(-1)[jnp.maximum(count - 1, 0)].astype(jnp.int32)
    return _Document(chunks, (tokens.shape[0], tokens.shape[1]), count, last)


def _prompt(x: Any, cache: str) -> tuple[jax.Array, jax.Array]:
    if isinstance(x, Mapping) and "prompt" in x:
        return generation.prompt_of("methods.continue_document", x["prompt"])
    if cache == "empty":
        raise ValueError(
            "methods.continue_document with cache='empty' needs x with a 'prompt'; got only a "
            "document: nothing of it is remembered that could be continued."
        )
    return jnp.zeros((0,), jnp.int32), jnp.zeros((0,), bool)


def _after(
    document: _Document, prompt: tuple[jax.Array, jax.Array], cache: str, bos: int | None
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """What is read after the document's chunks, with its mask, and its first position."""
    tokens, mask = prompt
    begins = jnp.asarray(0 if bos is None else bos, jnp.int32)
    there, lead, first = jnp.asarray(bos is not None), begins, jnp.zeros((), jnp.int32)
    if cache != "empty":
        # An empty document is like none.
        there |= document.count > 0
        lead = jnp.where(document.count > 0, document.last, begins)
        first = jnp.maximum(document.count - (1 if bos is None else 0), 0)
    joined = jnp.concatenate([lead[None], tokens]), jnp.concatenate([there[None], mask])
    return joined, first


def _learned(stream: Stream, params: Params, document: _Document, key: Key) -> tuple[Any, Info]:
    """The carry after the last chunk, and the steps on all of them in a row."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(document.size[0]))

    def body(carry: Any, chunk: Any) -> Any:
        return stream.step(params, carry, *chunk)

    carry, (_, info) = _varying.scan(body, stream.init(params), (document.chunks, keys))
    loss, grad_norm = (leaf.reshape(-1) for leaf in (info.loss, info.grad_norm))
    return carry, Info(loss, grad_norm, info.ok.all(), info.updated.any())


def _check_steps(place: str, num_steps: Any, least: int) -> None:
    inner.check_num_steps(num_steps)
    if num_steps < least:
        raise ValueError(
            f"num_steps of methods.{place} must be at least {least}, got {num_steps}: without an "
            "update there is no adapter."
        )

"""Adapting to a document while it is read: every chunk is scored, then learned from."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _trees, inner, readers, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import (
    Info,
    Key,
    Params,
    Predictor,
    Selection,
    StatefulLoss,
    Stream,
    StreamInfo,
)
from ttt_jax.losses.tokens import masked_mean, token_nats
from ttt_jax.online import unroll
from ttt_jax.readers import Parts, Reader


@_arguments.checked(read=readers.rule, bos=_arguments.count(0), remat=_arguments.count(0))
def document_ttt(
    read: Reader,
    *,
    optimizer: optax.GradientTransformation = optax.adam(3e-3, b1=0.9, b2=0.95, eps=1e-10),
    select: Selection = select.lora(),
    num_steps: int = 1,
    bos: int | None = None,
    remat: int | None = 0,
    mixed: bool = False,
) -> Predictor:
    """A predictor that scores a document chunk by chunk, and learns from each after its score.

    Chunk c is scored by the weights that learned from the chunks before it, and its mean nats are
    the loss of the next step (dynamic evaluation, with low-rank weights of the document's own)::

        nats[c, i] = -log p(token[c, i] | tokens before it; w[c])
        w[c + 1]   = optimizer(w[c], grad_w of mean_i nats[c, i]),     w[0] the pristine weights

    The score **is** the loss of the first step, from one pass. Nothing is scored twice, every
    document starts from the pristine weights, and the step on the last chunk is of no consequence.
    :func:`ttt_jax.audit.score_before_update` checks it.

    What was read before comes from ``read``. With a cache, keys and values stay those of the
    weights that made them, and no gradient goes through them; with several steps a chunk's own are
    made anew by each step, the last time before the last update. With
    :func:`ttt_jax.readers.recomputed` they are those of the newest weights. The two are different
    methods with different scores: say which.

    **Published:** (parameter-golf, pull request 77) rank 8 on queries, values and the head, Adam
    0.01 (0.9, 0.95), epsilon 1e-10, one step for each chunk of 256 tokens in a window of 1,024:
    1.1941 to 1.1910 bits per byte beside the same windows without adapting; most of what had
    seemed to be adaptation was the window. The default step size is smaller: with 0.01 single
    chunks of code became worse.

    **Fails** on short documents: a thousand tokens gain next to nothing. A rank without
    ``alpha / rank`` scaling makes the steps of large ranks too long. A rolling cache **without
    sinks** (the first tokens, kept for ever) damages the model, and adapting then repairs the
    damage: compare with a control that has them. A large step harms documents that the model
    knows well. Report ``num_steps=0``, isolated windows and a longer window beside it.

    **Cost** of a chunk: ``num_steps`` forward and backward passes; with ``num_steps=0`` one forward
    pass. Kept per document: selected weights, optimizer state and the reader's memory.

    Args:
      read: a :class:`ttt_jax.readers.Reader`: :func:`ttt_jax.models.reader`,
        :func:`~ttt_jax.readers.recomputed` or :func:`~ttt_jax.readers.isolated`.
      optimizer: an optax transformation; its state is the document's own.
      select: the parameters that adapt.
      num_steps: inner steps per chunk, static; 0 scores with the pristine weights, the control.
      bos: the token that the model was trained to see before a text; ``None`` for none, and then
        the first token has no score.
      remat: of a gradient through the chunks, see :func:`ttt_jax.unroll`.
      mixed: whether such a gradient differentiates the updates forward over reverse, see
        :func:`ttt_jax.gradient_adapter`.

    Returns:
      A :class:`~ttt_jax.Predictor` over one document ``x``: integers ``[T, L]``, T chunks of L
      tokens, or a mapping of ``tokens`` and ``mask`` ``[T, L]`` (which tokens are scored and
      learned from, bool or weights of at least 0). Tokens of mask 0 are read as context; those
      after the last scored one are padding, which nothing reads, so that documents of unequal
      length go side by side. With ``start``, bool ``[T]``, several documents go one after the
      other: at a chunk where it is true, weights, optimizer state and memory are the pristine ones
      again, so that short documents fill the rows of a batch of long ones. Output: float32
      ``[T, L]``, nats of each scored token, 0 for the others. ``Info`` has the ``T * num_steps``
      steps. A chunk whose step is not finite is neither learned from nor remembered; its own scores
      stay as they came out.

    Raises:
      TypeError: ``read`` is no reader.
      ValueError: ``num_steps`` or ``bos`` out of range; when called: tokens of another rank or
        dtype, or a mask or starts of another shape.

    References:
      Krause et al., `Dynamic Evaluation of Neural Sequence Models
      <https://arxiv.org/abs/1709.07432>`_, 2018, Section 3, which moves all weights, and pulls
      them back to the pristine ones by a decay that is not here (add ``optax.add_decayed_weights``
      for low-rank weights, whose pristine ``b`` is zero). The chunked low-rank form:
      github.com/openai/parameter-golf, pull request 77, which reads each window anew.
    """
    inner.check_num_steps(num_steps)
    readers.check_bos(read, bos)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        tokens, mask = document_of("document_ttt", x, "start")
        count, length = tokens.shape
        start = starts_of(x, count)
        chunks = chunks_of(tokens, mask, bos, start)
        room = count * length, length
        stream = learning_stream(read, room, optimizer, select, num_steps, mixed=mixed)
        return unroll(stream, remat=remat)(params, chunks, key)

    return predict


def document_of(name: str, x: Any, *more: str) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask, each ``[T, L]``; refuses what is no document.

    Args:
      name: of the method.
      x: the document.
      *more: further leaves that it may have.
    """
    leaves = dict(x) if isinstance(x, Mapping) else {"tokens": x}
    if "tokens" not in leaves or set(leaves) - {"tokens", "mask", *more}:
        raise ValueError(
            f"methods.{name} needs a document with 'tokens' and, where wanted, 'mask'; got "
            f"{sorted(leaves)}: pass integers [T, L], or a mapping of the two."
        )
    tokens = jnp.asarray(leaves["tokens"])
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"methods.{name} needs integer tokens [T, L], T chunks of L; got shape {tokens.shape} "
            f"and dtype {tokens.dtype}. Cut the document into chunks, pad the last one and give "
            "it a mask; map over documents with ttt_jax.batched."
        )
    if not tokens.size:
        raise ValueError(
            f"methods.{name} needs at least one chunk of at least one token; got shape "
            f"{tokens.shape}. Leave out empty documents."
        )
    mask = jnp.asarray(leaves.get("mask", jnp.ones(tokens.shape, bool)))
    if mask.shape != tokens.shape:
        raise ValueError(
            f"methods.{name} needs a mask shaped as its tokens, {tokens.shape}; got {mask.shape}."
        )
    return tokens, mask


def starts_of(x: Any, count: int) -> jax.Array | None:
    """Bool ``[T]``, the chunks that begin a document; None for a single one."""
    start = x.get("start") if isinstance(x, Mapping) else None
    if start is not None and jnp.shape(start) != (count,):
        raise ValueError(
            f"methods.document_ttt needs start with a bool per chunk, ({count},); got shape "
            f"{jnp.shape(start)}: True where another document begins."
        )
    return start


def chunks_of(
    tokens: jax.Array, mask: jax.Array, bos: int | None, start: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What is read and what is scored, chunk by chunk.

    Args:
      tokens: ``[T, L]``, the document in its order.
      mask: ``[T, L]``, which tokens are scored.
      bos: the token before the first; None for a model without, whose first token has no score.
      start: bool ``[T]``, chunks that begin another document, the first of all among them.

    Returns:
      ``inputs``: each token's predecessor, ``positions``: of the inputs, -1 for none and for those
      after which nothing of their document is scored, ``targets`` and ``mask``, each ``[T, L]``;
      and ``start`` ``[T]``, where it is given.
    """
    count, length = tokens.shape
    begins = jnp.zeros(count, bool) if start is None else jnp.asarray(start, bool)
    begins = begins.at[0].set(True)
    number = jnp.arange(count, dtype=jnp.int32)
    chunk = number - jax.lax.cummax(jnp.where(begins, number, 0))
    offset = jnp.arange(length, dtype=jnp.int32)[None]
    targets = tokens.astype(jnp.int32)
    inputs = jnp.concatenate([jnp.zeros(1, jnp.int32), targets.reshape(-1)[:-1]])
    first = begins[:, None] & (offset == 0)
    mask = jnp.where(first & (bos is None), 0.0, mask.astype(jnp.float32))
    # Scored tokens from each token on, less those from the next document on.
    scored = (mask != 0).astype(jnp.int32).reshape(-1)
    left = jnp.concatenate([jnp.cumsum(scored[::-1])[::-1], jnp.zeros(1, jnp.int32)])
    later = jnp.concatenate([jnp.where(begins, number, count)[1:], jnp.full(1, count, jnp.int32)])
    end = jax.lax.cummin(later, reverse=True) * length
    read = left[:-1].reshape(count, length) > left[end][:, None]
    positions = chunk[:, None] * length + offset - (1 if bos is None else 0)
    chunks = {
        "inputs": jnp.where(first, 0 if bos is None else bos, inputs.reshape(targets.shape)),
        "positions": jnp.where(read, positions, -1),
        "targets": targets,
        "mask": mask,
    }
    return chunks if start is None else chunks | {"start": begins}


def _inputs(chunk: Any) -> dict[str, jax.Array]:
    return {"tokens": chunk["inputs"][None], "positions": chunk["positions"][None]}


def _score(read: Parts, params: Params, memory: Any, chunk: Any) -> Any:
    """The mean over a chunk, the nats of every token, and what is to be remembered."""
    logits, rows = read.ahead(params, memory, _inputs(chunk))
    nats = token_nats(logits[0], chunk["targets"])
    nats_of_mask = jnp.where(chunk["mask"] != 0, nats, 0.0)
    return (masked_mean(nats, chunk["mask"]), {"nats": nats_of_mask}), rows


def learning_stream(
    read: Reader,
    room: tuple[int, int],
    optimizer: optax.GradientTransformation,
    select: Selection,
    num_steps: int,
    *,
    mixed: bool = False,
) -> Stream:
    """A stream over chunks whose output is the score before the update, from the same pass.

    Args:
      read: the reader.
      room: tokens that its memory has room for, and tokens of a chunk.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: updates per chunk; without any the carry is the reader's memory alone, else an
        ``AdapterState`` that has it.
      mixed: as of :func:`ttt_jax.gradient_adapter`.
    """
    parts = readers.parts_of(read)
    # The adapter's memory is what the chunk is to leave, and the sample what came before it, too:
    # a guard reads a chunk's rows, not a whole cache.
    loss = StatefulLoss(
        init=lambda params: (),
        value=lambda params, rows, x, key: _score(parts, params, *x),
        after=lambda adapted, rows: rows,
    )
    adapter = inner.guarded(
        gradient_adapter(loss, optimizer, select=select, has_aux=True, mixed=mixed)
    )
    loop = inner.inner_loop(adapter, num_steps)

    def memory_of(params: Params) -> Any:
        return read.init(1, *room)

    def init(params: Params) -> Any:
        return adapter.init(params)._replace(memory=memory_of(params))

    def step(params: Params, carry: Any, chunk: Any, key: Key) -> Any:
        if "start" in chunk:
            carry = _trees.where(chunk["start"], init(params), carry)
        memory = carry.memory
        nothing = parts.nothing(memory, _inputs(chunk))
        state, infos = loop(params, carry._replace(memory=nothing), (memory, chunk), key)
        state = state._replace(memory=parts.keep(memory, state.memory, infos.finite.any()))
        output = infos.aux["nats"][0]
        info = StreamInfo(
            loss=infos.loss,
            grad_norm=infos.grad_norm,
            ok=infos.finite.all(),
            updated=_trees.differs(carry.fast, state.fast),
            reset=jnp.zeros((), bool),
        )
        return state, (output, info)

    def score(params: Params, memory: Any, chunk: Any, key: Key) -> Any:
        if "start" in chunk:
            memory = _trees.where(chunk["start"], memory_of(params), memory)
        nothing = parts.nothing(memory, _inputs(chunk))
        (value, aux), rows = _score(parts, params, memory, chunk)
        ok = jnp.isfinite(value) & ~_trees.spoiled(nothing, rows)
        empty = jnp.zeros((0,), jnp.float32)
        false = jnp.zeros((), bool)
        info = StreamInfo(empty, empty, ok, false, false)
        return parts.keep(memory, _trees.where(ok, rows, nothing), ok), (aux["nats"], info)

    return Stream(memory_of, score) if num_steps == 0 else Stream(init, step)

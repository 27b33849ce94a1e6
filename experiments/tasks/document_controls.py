"""Controls of adapting to documents: an adapter that all share, and another document's adapter.

Neither is per-document adaptation. Both read a batch of documents side by side, score each chunk
before they learn from it, and are methods that a config names by import path.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import ttt_jax as ttt
from ttt_jax.losses.tokens import masked_mean, token_nats
from ttt_jax.methods.document_ttt import chunks_of
from ttt_jax.online import Carry
from ttt_jax.readers import Reader


def shared(
    read: Reader,
    *,
    optimizer: optax.GradientTransformation,
    select: ttt.Selection = ttt.select.lora(),  # noqa: B008 (immutable)
    num_steps: int = 1,
    bos: int | None = None,
    batch: bool = True,
) -> ttt.Stream:
    """One adapter that learns from all documents of a stream and is never pristine again.

    The documents of a batch are read in step: the loss of chunk t is the mean over the scored
    tokens of all of them. What it saves is what the documents have in common, such as their
    language; the order of the documents matters.

    Args:
      read: the model with its memory, which begins anew with each document.
      optimizer: of the steps; its state is carried along, too.
      select: what adapts.
      num_steps: steps per chunk.
      bos: the token before the first.
      batch: whether an instance is a batch; it must be.
    """
    _require_batch(batch)

    def init(params: Any) -> Carry:
        state = _adapter(read, optimizer, select, (1, 1, 1)).init(params)
        return Carry(state._replace(memory=()), ())

    def step(params: Any, carry: Carry, x: Any, key: jax.Array) -> Any:
        adapter = _adapter(read, optimizer, select, x["tokens"].shape)
        start = carry.state._replace(memory=adapter.init(params).memory)
        state, nats, info = _learned(adapter, num_steps, params, start, _chunks(x, bos), key)
        return Carry(state._replace(memory=()), ()), (nats, info)

    return ttt.Stream(init, step)


def crossed(
    read: Reader,
    *,
    optimizer: optax.GradientTransformation,
    select: ttt.Selection = ttt.select.lora(),  # noqa: B008 (immutable)
    num_steps: int = 1,
    bos: int | None = None,
    batch: bool = True,
) -> ttt.Predictor:
    """Each document of a batch under the adapter of the one before it: what adapting forgets.

    The adapter is that of a whole document, read chunk by chunk as ``document_ttt`` reads it, and
    does not learn from what it scores here. Arguments as in :func:`shared`.

    Raises:
      ValueError: when called: a batch of one document.
    """
    _require_batch(batch)
    learn = ttt.methods.document_adapter(
        read, optimizer=optimizer, select=select, num_steps=num_steps, bos=bos
    )
    score = ttt.adapted(ttt.methods.document_ttt(read, num_steps=0, bos=bos), select=select)

    def predict(params: Any, x: Any, key: jax.Array) -> tuple[Any, ttt.Info]:
        count = x["tokens"].shape[0]
        if count < 2:
            raise ValueError(
                "crossed needs batches of at least two documents; got one. Raise adapt.batch_size "
                "or data.most."
            )
        adapters, info = jax.vmap(learn, in_axes=(None, 0, None))(params, x, key)
        others = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), adapters)
        nats, _ = jax.vmap(score, in_axes=(None, 0, None))(params, (others, x), key)
        whole = ttt.Info(
            info.loss.mean(0), info.grad_norm.mean(0), info.ok.all(), info.updated.any()
        )
        return nats, whole

    return predict


def _require_batch(batch: bool) -> None:
    if not batch:
        raise ValueError("batch must be True: documents are read side by side; got False.")


def _chunks(x: Any, bos: int | None) -> Any:
    """What is read and scored of documents ``[N, T, L]``, each leaf ``[T, N, L]``."""
    made = jax.vmap(lambda tokens, mask: chunks_of(tokens, mask, bos))(x["tokens"], x["mask"])
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), made)


def _adapter(
    read: Reader,
    optimizer: optax.GradientTransformation,
    select: ttt.Selection,
    shape: tuple[int, int, int],
) -> ttt.Adapter:
    """One copy that learns from a chunk of each of N documents; its memory is what was read."""
    count, chunks, length = shape

    def value(params: Any, memory: Any, chunk: Any, key: jax.Array) -> Any:
        inputs = {"tokens": chunk["inputs"], "positions": chunk["positions"]}
        logits, memory = read.read(params, memory, inputs)
        nats = token_nats(logits, chunk["targets"])
        scored = jnp.where(chunk["mask"] != 0, nats, 0.0)
        return (masked_mean(nats, chunk["mask"]), {"nats": scored}), memory

    loss = ttt.StatefulLoss(
        init=lambda params: read.init(count, chunks * length, length),
        value=value,
        after=lambda adapted, memory: memory,
    )
    adapter = ttt.gradient_adapter(loss, optimizer, select=select, has_aux=True)
    return ttt.inner.guarded(adapter)


def _learned(
    adapter: ttt.Adapter, num_steps: int, params: Any, start: Any, chunks: Any, key: jax.Array
) -> tuple[Any, jax.Array, ttt.StreamInfo]:
    """The state after all chunks, the nats before each update ``[N, T, L]``, and what happened."""
    loop = ttt.inner_loop(adapter, num_steps)

    def body(state: Any, pair: Any) -> Any:
        chunk, number = pair
        state, infos = loop(params, state, chunk, jax.random.fold_in(key, number))
        return state, (infos.aux["nats"][0], infos._replace(aux={}))

    numbers = jnp.arange(chunks["targets"].shape[0])
    state, (nats, infos) = jax.lax.scan(body, start, (chunks, numbers))
    moved = [
        (before != after).any()
        for before, after in zip(*map(jax.tree.leaves, (start.fast, state.fast)), strict=True)
    ]
    info = ttt.StreamInfo(
        loss=infos.loss.reshape(-1),
        grad_norm=infos.grad_norm.reshape(-1),
        ok=infos.finite.all(),
        updated=jnp.stack(moved).any(),
        reset=jnp.zeros((), bool),
    )
    return state, jnp.swapaxes(nats, 0, 1), info

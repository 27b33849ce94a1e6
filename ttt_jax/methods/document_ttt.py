"""Adapting to a document while it is read: every chunk is scored, then learned from."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _trees, inner, select
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
from ttt_jax.readers import Reader


@_arguments.checked()
def document_ttt(
    read: Reader,
    *,
    optimizer: optax.GradientTransformation = optax.adam(3e-3, b1=0.9, b2=0.95, eps=1e-10),
    select: Selection = select.lora(),
    num_steps: int = 1,
    bos: int | None = None,
) -> Predictor:
    """A predictor that scores a document chunk by chunk, and learns from each after its score."""
    inner.check_num_steps(num_steps)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        tokens = jnp.asarray(x["tokens"])
        count, length = tokens.shape
        chunks = chunks_of(tokens, x["mask"], bos, x.get("start"))
        loss = StatefulLoss(
            init=lambda params: read.init(1, count * length, length),
            value=lambda params, memory, chunk, key: _score(read, params, memory, chunk),
            after=lambda adapted, memory: memory,
        )
        return unroll(_stream(loss, optimizer, select, num_steps))(params, chunks, key)

    return predict


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
      ``inputs``: each token's predecessor, ``positions``: of the inputs, -1 for none, ``targets``
      and ``mask``, each ``[T, L]``; and ``start`` ``[T]``, where it is given.
    """
    count, length = tokens.shape
    begins = jnp.zeros(count, bool) if start is None else jnp.asarray(start, bool)
    begins = begins.at[0].set(True)
    chunk = jnp.arange(count, dtype=jnp.int32)
    chunk = chunk - jax.lax.cummax(jnp.where(begins, chunk, 0))
    offset = jnp.arange(length, dtype=jnp.int32)[None]
    positions = chunk[:, None] * length + offset - (1 if bos is None else 0)
    targets = tokens.astype(jnp.int32)
    inputs = jnp.concatenate([jnp.zeros(1, jnp.int32), targets.reshape(-1)[:-1]])
    first = begins[:, None] & (offset == 0)
    chunks = {
        "inputs": jnp.where(first, 0 if bos is None else bos, inputs.reshape(targets.shape)),
        "positions": positions,
        "targets": targets,
        "mask": jnp.where(first & (bos is None), 0.0, mask.astype(jnp.float32)),
    }
    return chunks if start is None else chunks | {"start": begins}


def _score(read: Reader, params: Params, memory: Any, chunk: Any) -> Any:
    """The mean over a chunk, with what is remembered and the nats of every token."""
    inputs = {"tokens": chunk["inputs"][None], "positions": chunk["positions"][None]}
    logits, memory = read.read(params, memory, inputs)
    nats = token_nats(logits[0], chunk["targets"])
    nats_of_mask = jnp.where(chunk["mask"] != 0, nats, 0.0)
    return (masked_mean(nats, chunk["mask"]), {"nats": nats_of_mask}), memory


def _stream(
    loss: StatefulLoss, optimizer: optax.GradientTransformation, select: Selection, num_steps: int
) -> Stream:
    """A stream over chunks whose output is the score before the update, from the same pass."""
    adapter = inner.guarded(gradient_adapter(loss, optimizer, select=select, has_aux=True))
    loop = inner.inner_loop(adapter, num_steps)

    def step(params: Params, carry: Any, chunk: Any, key: Key) -> Any:
        if "start" in chunk:
            carry = _trees.where(chunk["start"], adapter.init(params), carry)
        state, infos = loop(params, carry, chunk, key)
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
            memory = _trees.where(chunk["start"], loss.init(params), memory)
        (_, aux), memory = loss.value(params, memory, chunk, key)
        empty = jnp.zeros((0,), jnp.float32)
        false = jnp.zeros((), bool)
        return memory, (aux["nats"], StreamInfo(empty, empty, ~false, false, false))

    return Stream(loss.init, score) if num_steps == 0 else Stream(adapter.init, step)

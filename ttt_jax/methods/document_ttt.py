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
        chunks = chunks_of(tokens, x["mask"], bos)
        stream = learning_stream(read, (count * length, length), optimizer, select, num_steps)
        return unroll(stream)(params, chunks, key)

    return predict


def chunks_of(tokens: jax.Array, mask: jax.Array, bos: int | None) -> dict[str, jax.Array]:
    """What is read and what is scored, chunk by chunk.

    Args:
      tokens: ``[T, L]``, the document in its order.
      mask: ``[T, L]``, which tokens are scored.
      bos: the token before the first; None for a model without, whose first token has no score.

    Returns:
      ``inputs``: each token's predecessor, ``positions``: of the inputs, -1 for none, ``targets``
      and ``mask``, each ``[T, L]``.
    """
    flat = tokens.reshape(-1).astype(jnp.int32)
    first = jnp.full((1,), 0 if bos is None else bos, jnp.int32)
    positions = jnp.arange(flat.size, dtype=jnp.int32) - (1 if bos is None else 0)
    scored = mask.reshape(-1).astype(jnp.float32)
    if bos is None:
        scored = scored.at[0].set(0.0)
    leaves = {
        "inputs": jnp.concatenate([first, flat[:-1]]),
        "positions": positions,
        "targets": flat,
        "mask": scored,
    }
    return {name: leaf.reshape(tokens.shape) for name, leaf in leaves.items()}


def _score(read: Reader, params: Params, memory: Any, chunk: Any) -> Any:
    """The mean over a chunk, with what is remembered and the nats of every token."""
    inputs = {"tokens": chunk["inputs"][None], "positions": chunk["positions"][None]}
    logits, memory = read.read(params, memory, inputs)
    nats = token_nats(logits[0], chunk["targets"])
    nats_of_mask = jnp.where(chunk["mask"] != 0, nats, 0.0)
    return (masked_mean(nats, chunk["mask"]), {"nats": nats_of_mask}), memory


def learning_stream(
    read: Reader,
    room: tuple[int, int],
    optimizer: optax.GradientTransformation,
    select: Selection,
    num_steps: int,
) -> Stream:
    """A stream over chunks whose output is the score before the update, from the same pass.

    Args:
      read: the reader.
      room: tokens that its memory has room for, and tokens of a chunk.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: updates per chunk; without any the carry is the reader's memory alone, else an
        ``AdapterState`` that has it.
    """
    loss = StatefulLoss(
        init=lambda params: read.init(1, *room),
        value=lambda params, memory, chunk, key: _score(read, params, memory, chunk),
        after=lambda adapted, memory: memory,
    )
    adapter = inner.guarded(gradient_adapter(loss, optimizer, select=select, has_aux=True))
    loop = inner.inner_loop(adapter, num_steps)

    def step(params: Params, carry: Any, chunk: Any, key: Key) -> Any:
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
        (_, aux), memory = loss.value(params, memory, chunk, key)
        empty = jnp.zeros((0,), jnp.float32)
        false = jnp.zeros((), bool)
        return memory, (aux["nats"], StreamInfo(empty, empty, ~false, false, false))

    return Stream(loss.init, score) if num_steps == 0 else Stream(adapter.init, step)

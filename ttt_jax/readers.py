"""Readers: model functions that read a document chunk by chunk and remember what came before."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _contract
from ttt_jax.base import Params, PyTree

__all__ = ["HiddenReader", "Parts", "Reader", "isolated", "recomputed"]


class Parts(NamedTuple):
    """A reading in parts, for a memory that is much larger than a chunk.

    Whether a chunk is to be remembered is known after it was read, and is then a choice of its rows
    alone, not of the whole memory.

    Attributes:
      ahead: ``ahead(params, memory, inputs) -> (logits[N, L, V], rows)``: what is read, with what
        is to be remembered of it apart.
      keep: ``keep(memory, rows, kept) -> memory``, with the rows where the bool scalar ``kept`` is
        true; else the rows may be those of ``nothing``.
      nothing: ``nothing(memory, inputs) -> rows`` of a chunk that was not read: finite, of the
        shapes and dtypes that ``ahead`` gives.
    """

    ahead: Callable[[Params, PyTree, Any], tuple[jax.Array, PyTree]]
    keep: Callable[[PyTree, PyTree, jax.Array], PyTree]
    nothing: Callable[[PyTree, Any], PyTree]


class Reader(NamedTuple):
    """A model function with a memory of the tokens that it has read.

    Attributes:
      init: ``init(batch, tokens, chunk) -> memory`` of sequences that have at most ``tokens``
        tokens and are read at most ``chunk`` at a time; three static integers.
      read: ``read(params, memory, inputs) -> (logits[N, L, V], memory)`` with ``inputs`` a mapping
        of ``tokens`` and ``positions``, int32 ``[N, L]``. Logits at a token are those of the next
        one. Position -1 is padding, which no token sees. Reading a chunk again, at the same
        positions, replaces what is remembered of it.
      parts: the same reading in parts; None for a memory that ``read`` may replace as a whole.
      vocabulary: how many tokens the model knows, from 0 on; None where that is not known, and then
        no token is refused.
    """

    init: Callable[[int, int, int], PyTree]
    read: Callable[[Params, PyTree, Any], tuple[jax.Array, PyTree]]
    parts: Parts | None = None
    vocabulary: int | None = None


class HiddenReader(NamedTuple):
    """A reader that also gives what goes into its matrices.

    Attributes:
      init: as of a :class:`Reader`.
      read: ``read(params, memory, inputs) -> (logits[N, L, V], memory, hidden)``; ``hidden`` has
        by the path of a matrix ``[..., F, D]`` its inputs ``[..., N, L, F]``.
      vocabulary: as of a :class:`Reader`.
    """

    init: Callable[[int, int, int], PyTree]
    read: Callable[[Params, PyTree, Any], tuple[jax.Array, PyTree, Mapping[str, jax.Array]]]
    vocabulary: int | None = None


def rule(place: str, name: str, value: Any) -> Reader:
    """A :class:`Reader`; what else is given is refused in one sentence."""
    if not isinstance(value, Reader):
        raise TypeError(
            f"{name} must be a Reader; got {_contract.described(value)}: make one with "
            "models.reader(module), readers.recomputed(apply, context=...) or "
            "readers.isolated(apply)."
        )
    return value


def check_bos(read: Reader | HiddenReader, bos: int | None) -> None:
    """Refuses a token that the model does not know, whose index it would cut without a word."""
    if bos is not None and read.vocabulary is not None and bos >= read.vocabulary:
        raise ValueError(
            f"bos must be a token of the reader's model, from 0 to {read.vocabulary - 1}; got "
            f"{bos}."
        )


def unknown(read: Reader, tokens: jax.Array) -> jax.Array:
    """Bool, shaped as the tokens: those that the model does not know."""
    if read.vocabulary is None:
        return jnp.zeros(tokens.shape, bool)
    return (tokens < 0) | (tokens >= read.vocabulary)


def parts_of(read: Reader) -> Parts:
    """How a reader reads before it is known whether a chunk is to be remembered."""
    whole = Parts(read.read, lambda memory, rows, kept: rows, lambda memory, inputs: memory)
    return read.parts or whole


@_arguments.checked()
def isolated(apply: Callable[[Params, Any], jax.Array]) -> Reader:
    """A reader without memory: every chunk is a sequence of its own, the weakest control.

    Args:
      apply: model function ``(params, tokens[N, L]) -> logits[N, L, V]``, causal.
    """
    _contract.require_function("apply", apply, "(params, tokens[N, L]) -> logits[N, L, V]")

    def read(params: Params, memory: PyTree, inputs: Any) -> tuple[jax.Array, PyTree]:
        tokens, positions = inputs["tokens"], inputs["positions"]
        # The place before a document without a first token goes to the end, where none sees it.
        vacant = (positions[:, :1] < 0) & (positions >= 0).any(1, keepdims=True)
        logits = apply(params, jnp.where(vacant, jnp.roll(tokens, -1, axis=1), tokens))
        later = jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
        return jnp.where(vacant[..., None], later, logits), memory

    return Reader(lambda batch, tokens, chunk: (), read)


class _Recent(NamedTuple):
    tokens: jax.Array
    positions: jax.Array


@_arguments.checked(context=_arguments.count(1))
def recomputed(apply: Callable[[Params, Any], jax.Array], *, context: int) -> Reader:
    """A reader that reads the last tokens again with every chunk, under the newest parameters.

    It costs ``(context + L) / L`` times what a cache does, and its keys are never those of older
    parameters. The gradient of a chunk goes through the tokens before it, too, which a cache holds
    fixed: at step size 0 the two give the same scores where all of a document is seen, and
    otherwise other ones.

    Give it a module **without** a window of its own: the first token that is read again is seen by
    all others and takes the place of the sinks. Under a window it is not, no sinks are
    there, and a pretrained decoder scores worse than in isolated windows.

    Args:
      apply: model function ``(params, inputs) -> logits[N, C + L, V]``, ``inputs`` a mapping of
        ``tokens`` and ``positions`` ``[N, C + L]``; a token at position -1 must be seen by none,
        as in :class:`ttt_jax.models.Decoder` with a cache.
      context: C, how many earlier tokens are read again.
    """
    _contract.require_function("apply", apply, "(params, inputs) -> logits[N, C + L, V]")

    def init(batch: int, tokens: int, chunk: int) -> _Recent:
        # A chunk more than the context: the chunk itself, when it is read again.
        held = context + chunk
        return _Recent(jnp.zeros((batch, held), jnp.int32), jnp.full((batch, held), -1, jnp.int32))

    def read(params: Params, memory: _Recent, inputs: Any) -> tuple[jax.Array, _Recent]:
        tokens, positions = inputs["tokens"], inputs["positions"]
        length, held = tokens.shape[1], memory.positions.shape[1]
        # What is remembered of this chunk, or of later ones, is read anew; padding is in none.
        never = jnp.iinfo(jnp.int32).max
        first = jnp.where(positions < 0, never, positions).min(1, keepdims=True)
        known = jnp.where(memory.positions >= first, -1, memory.positions)
        order = jnp.argsort(known, axis=1)
        before = _Recent(*(jnp.take_along_axis(leaf, order, 1) for leaf in (memory.tokens, known)))
        joined = _Recent(
            jnp.concatenate([before.tokens, tokens], 1),
            jnp.concatenate([before.positions, positions], 1),
        )
        seen = {name: leaf[:, -(context + length) :] for name, leaf in joined._asdict().items()}
        logits = apply(params, seen)
        # As many as before, however many were read: a loop's carry keeps its shape.
        return logits[:, context:], _Recent(*(leaf[:, -held:] for leaf in joined))

    return Reader(init, read)

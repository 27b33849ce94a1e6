"""Serving: more prompts than fit at once, each with its own adapter; rows are refilled."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _arguments, _checks, _contract, _trees, generation, readers
from ttt_jax.base import Key, Params, PyTree, Selection
from ttt_jax.generation import Generated, Row, Sampler
from ttt_jax.readers import Reader

__all__ = ["Request", "Server", "server"]


class Request(NamedTuple):
    """A prompt to be continued.

    Attributes:
      tokens: of the prompt, at least one.
      key: token t is drawn with ``fold_in(key, t)``.
      num_tokens: how many are generated at most.
      fast: the adapter, in the layout of ``select.split(params)[0]``; None for the leaves that the
        parameters have themselves.
    """

    tokens: Sequence[int]
    key: Key
    num_tokens: int
    fast: PyTree = None


Server: TypeAlias = Callable[[Params, Iterable[Request]], Iterator[tuple[int, Generated]]]
"""``(params, requests) -> (index of a request, what was generated), ...``, as they end."""


class _Rows(NamedTuple):
    """What is on the device, each leaf with a leading axis over the rows."""

    row: Row
    fast: PyTree
    key: Key
    limit: jax.Array


class _Task:
    """What the host knows of a row: the prompt still to be read, and what was generated."""

    def __init__(self, index: int, request: Request):
        self.index = index
        self.prompt = np.asarray(request.tokens, np.int32)
        self.read = 0
        self.parts: list[Generated] = []

    @property
    def waits(self) -> bool:
        """Whether its prompt is not read to the end."""
        return self.read < self.prompt.size

    def next_chunk(self, size: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Tokens and positions ``[size]``, and whether nothing is left but the last token."""
        end = min(self.read + size, self.prompt.size - 1)
        tokens, positions = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        tokens[: end - self.read] = self.prompt[self.read : end]
        positions[: end - self.read] = np.arange(self.read, end)
        begins = end == self.prompt.size - 1
        self.read = self.prompt.size if begins else end
        return tokens, positions, begins

    def generated(self) -> Generated:
        """All parts, without what comes after the end."""
        mask = np.concatenate([part.mask for part in self.parts])
        return Generated(
            *(np.concatenate(leaves)[mask] for leaves in zip(*self.parts, strict=True))
        )


@_arguments.checked(read=readers.rule, rows=_arguments.count(1), context=_arguments.count(2))
def server(
    read: Reader,
    *,
    rows: int,
    context: int,
    chunk: int = 64,
    tokens_per_call: int = 8,
    sampler: Sampler | None = None,
    stop: Sequence[int] = (),
    select: Selection | None = None,
) -> Server:
    """A function that continues any number of prompts, so many at a time.

    A row whose sequence has ended is given the next request: its memory is emptied, its adapter
    replaced, and its prompt read in chunks, while the other rows go on. Three programs of fixed
    shapes are compiled, at the first call. What a request gets depends on its own prompt, key and
    adapter alone, and is what :func:`ttt_jax.generation.generate` gives it.

    Args:
      read: with a memory; see :func:`ttt_jax.generation.generate`.
      rows: how many sequences are in flight.
      context: tokens of a prompt with its continuation, at most; the size of a row's memory.
      chunk: tokens of a prompt that are read at once.
      tokens_per_call: tokens of every row between two looks at which have ended.
      sampler: as for :func:`~ttt_jax.generation.generate`.
      stop: tokens that end a sequence; they are part of it.
      select: the parameters that a request may bring; None where all share one model.

    Returns:
      ``(params, requests) -> iterator`` of ``(index, Generated)`` in the order in which they end;
      arrays are NumPy's, of the sequence's own length. Requests are taken as rows become free.

    Raises:
      ValueError: an argument out of range; when called: a request that is longer than
        ``context``, an empty prompt, a token that the reader's model does not know, or an adapter
        of another layout than the selection's.

    References:
      Yu et al., `Orca <https://www.usenix.org/conference/osdi22/presentation/yu>`_, 2022, Section
      3.2 (rows are refilled between steps); Agrawal et al., `Sarathi
      <https://arxiv.org/abs/2308.16369>`_, 2023 (prompts in chunks).
    """
    _checks.check_count("chunk", chunk)
    _checks.check_count("tokens_per_call", tokens_per_call)
    stop_tokens, draw = generation.check_stop(stop), sampler or generation.greedy()
    sizes = context, chunk, tokens_per_call
    programs = _programs(read, sizes, draw, stop_tokens, select)

    def run(params: Params, requests: Iterable[Request]) -> Iterator[tuple[int, Generated]]:
        waiting = enumerate(requests)
        tasks: list[_Task | None] = [None] * rows
        held: _Rows | None = None
        empty = programs.fresh()
        own, frozen = ((), params) if select is None else select.split(params)
        while True:
            for place in range(rows):
                pair = next(waiting, None) if tasks[place] is None else None
                if pair is None:
                    continue
                new = _Rows(empty, *_checked(*pair, own, context))
                _check_prompt(*pair, read.vocabulary)
                if held is None:
                    held = jax.tree.map(lambda leaf: jnp.stack([leaf] * rows), new)
                held = programs.insert(held, jnp.asarray(place), new)
                tasks[place] = _Task(*pair)
            if held is None or not any(tasks):
                return
            if any(task is not None and task.waits for task in tasks):
                held = programs.read_chunk(frozen, held, *_next_chunks(tasks, chunk))
            if all(task is None or task.waits for task in tasks):
                continue
            held, made = programs.decode(frozen, held)
            made, done = jax.device_get((made, held.row.done))
            for place, task in enumerate(tasks):
                if task is None or task.waits:
                    continue
                task.parts.append(Generated(*(leaf[place] for leaf in made)))
                if done[place]:
                    tasks[place] = None
                    yield task.index, task.generated()

    return run


class _Programs(NamedTuple):
    """What is compiled, once for a server.

    Attributes:
      fresh: ``() -> row`` with an empty memory, which waits.
      insert: ``(rows, place, row) -> rows``.
      read_chunk: ``(frozen, rows, tokens, positions, begins) -> rows``; see :func:`_next_chunks`.
      decode: ``(frozen, rows) -> (rows, Generated[R, T])``, some tokens more of every row.
    """

    fresh: Callable[[], Row]
    insert: Callable[..., _Rows]
    read_chunk: Callable[..., _Rows]
    decode: Callable[..., tuple[_Rows, Generated]]


def _programs(
    read: Reader,
    sizes: tuple[int, int, int],
    draw: Sampler,
    stop_tokens: tuple[int, ...],
    select: Selection | None,
) -> _Programs:
    context, chunk, tokens_per_call = sizes

    @jax.jit
    def fresh() -> Row:
        zero = jnp.zeros((), jnp.int32)
        return Row(read.init(1, context, chunk), zero, zero, zero, jnp.ones((), bool))

    def merged(frozen: PyTree, fast: PyTree) -> Params:
        return frozen if select is None else select.merge(fast, frozen)

    def read_row(frozen: PyTree, rows: _Rows, tokens: Any, positions: Any, start: Any) -> Row:
        params = merged(frozen, rows.fast)
        inputs = {"tokens": tokens[None], "positions": positions[None]}
        memory = read.read(params, rows.row.memory, inputs)[1]
        begins, token, position = start
        begun = Row(memory, token, position, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        return _trees.where(begins, begun, rows.row._replace(memory=memory))

    def decode_row(frozen: PyTree, rows: _Rows) -> tuple[Row, Generated]:
        params = merged(frozen, rows.fast)

        def body(row: Row, _: Any) -> tuple[Row, Generated]:
            row, made = generation.advance(read, params, row, rows.key, draw, stop_tokens)
            return row._replace(done=row.done | (row.count >= rows.limit)), made

        return jax.lax.scan(body, rows.row, length=tokens_per_call)

    # The rows are donated: their memories are changed where they are.
    @functools.partial(jax.jit, donate_argnums=0)
    def insert(rows: _Rows, place: jax.Array, new: _Rows) -> _Rows:
        return jax.tree.map(lambda all_rows, row: all_rows.at[place].set(row), rows, new)

    @functools.partial(jax.jit, donate_argnums=1)
    def read_chunk(frozen: PyTree, rows: _Rows, *parts: Any) -> _Rows:
        return rows._replace(row=jax.vmap(read_row, (None, 0, 0, 0, 0))(frozen, rows, *parts))

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(frozen: PyTree, rows: _Rows) -> tuple[_Rows, Generated]:
        row, made = jax.vmap(decode_row, (None, 0))(frozen, rows)
        return rows._replace(row=row), made

    return _Programs(fresh, insert, read_chunk, decode)


def _next_chunks(tasks: Sequence[_Task | None], size: int) -> Any:
    """What every row reads: its next chunk, or padding where it waits for none."""
    tokens = np.zeros((len(tasks), size), np.int32)
    positions = np.full((len(tasks), size), -1, np.int32)
    begins = np.zeros(len(tasks), bool)
    last, place_of_last = np.zeros(len(tasks), np.int32), np.zeros(len(tasks), np.int32)
    for place, task in enumerate(tasks):
        if task is not None and task.waits:
            tokens[place], positions[place], begins[place] = task.next_chunk(size)
            last[place], place_of_last[place] = task.prompt[-1], task.prompt.size - 1
    return tokens, positions, (begins, last, place_of_last)


def _check_prompt(index: int, request: Request, vocabulary: int | None) -> None:
    tokens = np.asarray(request.tokens)
    if vocabulary is not None and (odd := tokens[(tokens < 0) | (tokens >= vocabulary)]).size:
        raise ValueError(
            f"Request {index} needs tokens of the reader's model, from 0 to {vocabulary - 1}; got "
            f"{odd[0]}."
        )


def _checked(
    index: int, request: Request, own: PyTree, context: int
) -> tuple[PyTree, Key, jax.Array]:
    """Adapter, key and limit of a request that can be served."""
    name = f"Request {index}"
    _contract.require(name, request, Request)
    _contract.require_key(name, request.key, maps=True)
    count = _checks.check_count(f"num_tokens of request {index}", request.num_tokens)
    length = np.shape(request.tokens)
    if len(length) != 1 or not length[0] or np.asarray(request.tokens).dtype.kind not in "iu":
        raise ValueError(
            f"{name} needs integer tokens [P], at least one; got shape {length}. Begin an empty "
            "prompt with the model's bos."
        )
    if length[0] + count > context:
        raise ValueError(
            f"{name} needs {length[0]} + {count} tokens, prompt and continuation, and context is "
            f"{context}: cut its prompt, or build the server with a larger context."
        )
    fast = own if request.fast is None else request.fast
    if odd := sorted(_layout(fast) ^ _layout(own)):
        raise ValueError(
            f"{name} needs an adapter in the layout of the server's select; they differ at "
            f"{odd[0][0]!r}, {odd[0][1]}. Build the server with select=..., give the leaves it "
            "chooses, and pad ranks and targets with models.pad_rank."
        )
    return jax.tree.map(jnp.asarray, fast), request.key, jnp.asarray(count, jnp.int32)


def _layout(fast: PyTree) -> set[tuple[str, str]]:
    return {
        (path, f"{jnp.asarray(leaf).dtype}{list(jnp.shape(leaf))}")
        for path, leaf in _trees.named_leaves(fast)
        if leaf is not None
    }

"""Pairs of colored grids as sequences of tokens, for :class:`ttt_jax.models.GridDecoder`.

A pair is ``legend | input | output``. The legend says which color stands for each of the colors 1
to 9 of the task, so that "paint it red" can be learned under views that permute colors. A grid is
its cells row by row, a newline token after each row, and an end token. A token of the output stands
where its *successor* lies: what is to be predicted is then read off the input at the own place.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import _arguments, _contract

COLORS = 10
NEWLINE, END, BEGIN = 10, 11, 12
VOCABULARY = 13
"""Tokens: ten colors, newline, end, and the begin of an output."""
CLASSES = 12
"""Tokens that can be predicted: all but the begin."""
LEGEND, INPUT, OUTPUT = 0, 1, 2
"""Parts of a sequence."""
MOST_CELLS = 30
"""Cells along a side, at most."""
# The numbers of sequences are int8.
_MOST_SEQUENCES = 127


class GridSequence(NamedTuple):
    """A pair, or an input without its output, as tokens.

    Attributes:
      token: int8 ``[T]``.
      row: int8 ``[T]``, the row of the token's cell, or of what it predicts.
      column: int8 ``[T]``.
      part: int8 ``[T]``, ``LEGEND``, ``INPUT`` or ``OUTPUT``.
      label: int8 ``[T]``, the token to be predicted; -1 where there is none.
    """

    token: np.ndarray
    row: np.ndarray
    column: np.ndarray
    part: np.ndarray
    label: np.ndarray

    @property
    def prefix(self) -> int:
        """Tokens before the output."""
        return int((self.part != OUTPUT).sum())


def _grid(name: str, value: Any) -> np.ndarray:
    grid = np.asarray(value)
    whole = grid.ndim == 2 and grid.size and np.issubdtype(grid.dtype, np.integer)
    if not whole or max(grid.shape) > MOST_CELLS or grid.min() < 0 or grid.max() >= COLORS:
        shown = f"shape {grid.shape} and dtype {grid.dtype}"
        if whole and max(grid.shape) <= MOST_CELLS:
            shown = f"colors from {grid.min()} to {grid.max()}"
        raise ValueError(
            f"{name} must be a grid of 1 to {MOST_CELLS} rows and columns with colors from 0 to "
            f"{COLORS - 1}; got {shown}."
        )
    return grid.astype(np.int8)


def _tokens(grid: np.ndarray) -> np.ndarray:
    lines = np.full((grid.shape[0], grid.shape[1] + 1), NEWLINE, np.int8)
    lines[:, :-1] = grid
    return np.append(lines.ravel(), np.int8(END))


def _places(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every token of a grid."""
    rows, columns = np.indices((shape[0], shape[1] + 1), dtype=np.int8)
    return np.append(rows.ravel(), np.int8(shape[0])), np.append(columns.ravel(), np.int8(0))


@_arguments.checked()
def length_of(input: np.ndarray, output: np.ndarray | None = None) -> int:
    """Tokens of a sequence, without making it: 9, and ``h (w + 1) + 1`` for each grid."""
    grids = [_grid("input", input)] + ([] if output is None else [_grid("output", output)])
    sides = [grid.shape for grid in grids]
    return COLORS - 1 + sum(rows * (columns + 1) + 1 for rows, columns in sides)


@_arguments.checked()
def encode(
    input: np.ndarray, output: np.ndarray | None = None, *, colors: Sequence[int] | None = None
) -> GridSequence:
    """The sequence of a pair under a view.

    Args:
      input: integers ``[h, w]``, with the view applied.
      output: likewise; None where it is to be predicted.
      colors: the view's permutation, ``colors[c]`` in place of color c of the task; None for the
        identity.

    Raises:
      ValueError: no grid of 1 to 30 rows and columns with colors 0 to 9, or no permutation.
    """
    table = np.arange(COLORS) if colors is None else np.asarray(colors)
    if sorted(table.tolist()) != list(range(COLORS)):
        raise ValueError(f"colors must be a permutation of 0 to {COLORS - 1}; got {colors!r}.")
    grid = _grid("input", input)
    zeros, index = np.zeros(COLORS - 1, np.int8), np.arange(COLORS - 1, dtype=np.int8)
    none = np.full(COLORS - 1, -1, np.int8)
    legend = GridSequence(table[1:].astype(np.int8), zeros, index, zeros + np.int8(LEGEND), none)
    tokens = _tokens(grid)
    none = np.full(len(tokens), -1, np.int8)
    parts = [legend, _part(tokens, grid.shape, INPUT, none)]
    if output is not None:
        answer = _grid("output", output)
        label = _tokens(answer)
        shifted = np.append(np.int8(BEGIN), label[:-1])
        parts.append(_part(shifted, answer.shape, OUTPUT, label))
    return GridSequence(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


def _part(tokens: np.ndarray, shape: tuple[int, ...], part: int, label: np.ndarray) -> GridSequence:
    rows, columns = _places(shape)
    return GridSequence(tokens, rows, columns, np.full(len(tokens), part, np.int8), label)


@_arguments.checked()
def decode(tokens: np.ndarray) -> np.ndarray | None:
    """The grid that predicted tokens spell, int8 ``[h, w]``; None where they spell none.

    Args:
      tokens: integers ``[T]``, of ``CLASSES``; what follows the first end is left out.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers [T] of one output; got shape {tokens.shape} and dtype "
            f"{tokens.dtype}: decode one row of predictions at a time."
        )
    ends = np.flatnonzero(tokens == END)
    if not len(ends):
        return None
    body = tokens[: ends[0]]
    if not len(body) or body[-1] != NEWLINE:
        return None
    lines = np.split(body, np.flatnonzero(body == NEWLINE) + 1)[:-1]
    widths = {len(line) - 1 for line in lines}
    if len(widths) != 1 or not 0 < widths.pop() <= MOST_CELLS or len(lines) > MOST_CELLS:
        return None
    return np.stack([line[:-1] for line in lines]).astype(np.int8)


class Packed(NamedTuple):
    """Sequences one after another in rows of one length, for one step of a model.

    Attributes:
      token: int8 ``[R, T]``, and likewise ``row``, ``column``, ``part`` and ``label``.
      row: see :class:`GridSequence`.
      column: see there.
      part: see there.
      label: see there; -1 outside of sequences, too.
      segment: int8 ``[R, T]``, which sequence of its row a token belongs to; -1 for none.
      first: int32 ``[R, T]``, the first token of the row that a token sees.
      last: int32 ``[R, T]``, the last one: for the prefix its end, for the output the token
        itself. Smaller than ``first`` outside of sequences.
      task: int32 ``[R, M]``, of each sequence; 0 for none.
      view: int32 ``[R, M]``, the number of the symmetry of each sequence.
    """

    token: np.ndarray
    row: np.ndarray
    column: np.ndarray
    part: np.ndarray
    label: np.ndarray
    segment: np.ndarray
    first: np.ndarray
    last: np.ndarray
    task: np.ndarray
    view: np.ndarray


class Item(NamedTuple):
    """A sequence to be packed: of which task, under which symmetry, and what comes back with it."""

    sequence: GridSequence
    task: int
    view: int
    tag: Any = None


@_arguments.checked(rows=_arguments.count(1), length=_arguments.count(1), most=_arguments.count(1))
def empty(rows: int, length: int, most: int) -> Packed:
    """Rows without a sequence, to build a model's parameters from.

    Args:
      rows: R.
      length: T.
      most: M.
    """
    flat = (rows, length)
    small = {name: np.zeros(flat, np.int8) for name in ("token", "row", "column", "part")}
    absent = {name: np.full(flat, -1, np.int8) for name in ("label", "segment")}
    spans = {"first": np.zeros(flat, np.int32), "last": np.full(flat, -1, np.int32)}
    of_rows = {name: np.zeros((rows, most), np.int32) for name in ("task", "view")}
    return Packed(**small, **absent, **spans, **of_rows)


@_arguments.checked(
    rows=_arguments.count(1),
    length=_arguments.count(1),
    most=_arguments.count(1),
    patience=_arguments.count(1),
)
def pack(
    items: Iterable[Item], rows: int, length: int, most: int, *, patience: int = 24
) -> Iterator[tuple[Packed, list[tuple[int, int, Any]]]]:
    """Fills batches of rows, each sequence in the first row that has room for it.

    Args:
      items: sequences, possibly without an end.
      rows: R.
      length: T.
      most: M, sequences of a row, at most 127.
      patience: a batch is done once so many sequences found no room; they begin the next one.

    Returns:
      An iterator over batches, and for every sequence the row, its place in the row and its tag.

    Raises:
      TypeError: ``items`` is no iterable of items.
      ValueError: an argument out of range; at the batch: a sequence longer than a row.
    """
    if most > _MOST_SEQUENCES:
        raise ValueError(f"most must be at most {_MOST_SEQUENCES}; got {most}.")
    if isinstance(items, str) or not hasattr(items, "__iter__"):
        raise TypeError(
            f"items must be an iterable of grid_sequences.Item; got {_contract.described(items)}."
        )
    return _packed(iter(items), (rows, length, most), patience)


def _packed(
    source: Iterator[Item], sizes: tuple[int, int, int], patience: int
) -> Iterator[tuple[Packed, list[tuple[int, int, Any]]]]:
    rows, length, most = sizes
    waiting: list[Item] = []
    exhausted = False
    while not (exhausted and not waiting):
        batch, used = empty(rows, length, most), np.zeros((rows, 2), np.int64)
        tags: list[tuple[int, int, Any]] = []
        left: list[Item] = []
        while len(left) < patience:
            item = waiting.pop(0) if waiting else next(source, None)
            if item is None:
                exhausted = True
                break
            if not isinstance(item, Item):
                raise TypeError(
                    "items must be an iterable of grid_sequences.Item; got among them "
                    f"{_contract.described(item)}."
                )
            size = len(item.sequence.token)
            if size > length:
                raise ValueError(
                    f"A sequence must fit in a row of {length} tokens; got one of {size}: choose "
                    "a larger length, or leave such pairs out."
                )
            room = (used[:, 0] + size <= length) & (used[:, 1] < most)
            if not room.any():
                left.append(item)
                continue
            row = int(np.argmax(room))
            begin, place = map(int, used[row])
            _put(batch, item, row, place, begin)
            tags.append((row, place, item.tag))
            used[row] += (size, 1)
        waiting = left + waiting
        if tags:
            yield batch, tags


def _put(batch: Packed, item: Item, row: int, place: int, begin: int) -> None:
    size = len(item.sequence.token)
    span = slice(begin, begin + size)
    for name, values in item.sequence._asdict().items():
        getattr(batch, name)[row, span] = values
    index = np.arange(begin, begin + size, dtype=np.int32)
    prefix = item.sequence.prefix
    batch.segment[row, span] = place
    batch.first[row, span] = begin
    batch.last[row, span] = np.where(index < begin + prefix, begin + prefix - 1, index)
    batch.task[row, place], batch.view[row, place] = item.task, item.view

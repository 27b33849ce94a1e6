"""Grids as tokens, there and back, and in packed rows."""

import itertools

import numpy as np
import pytest

from ttt_jax.data import grid_sequences as sequences

RNG = np.random.default_rng(0)
SHAPES = [(1, 1), (3, 5), (30, 30), (2, 1), (1, 7)]


def grid(shape):
    return RNG.integers(0, 10, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_output_spells_its_grid(shape):
    answer = grid(shape)
    made = sequences.encode(grid((2, 2)), answer)
    label = made.label[made.label >= 0]
    np.testing.assert_array_equal(sequences.decode(label), answer)
    assert len(made.token) == sequences.length_of(np.zeros((2, 2), int), answer)
    np.testing.assert_array_equal(sequences.decode(np.append(label, [3, 3])), answer)


def test_a_token_of_the_output_stands_where_its_successor_lies():
    answer = np.array([[1, 2], [3, 4]])
    made = sequences.encode(answer, answer)
    inputs = made.part == sequences.INPUT
    outputs = made.part == sequences.OUTPUT
    for name in ("row", "column"):
        leaf = getattr(made, name)
        np.testing.assert_array_equal(leaf[inputs], leaf[outputs])
    np.testing.assert_array_equal(made.label[outputs], made.token[inputs])
    np.testing.assert_array_equal(made.token[outputs][1:], made.label[outputs][:-1])
    assert made.token[outputs][0] == sequences.BEGIN
    np.testing.assert_array_equal(made.row[inputs], [0, 0, 0, 1, 1, 1, 2])
    np.testing.assert_array_equal(made.column[inputs], [0, 1, 2, 0, 1, 2, 0])
    assert made.prefix == 9 + 7 and (made.label[: made.prefix] == -1).all()


def test_the_legend_says_which_color_stands_for_which():
    colors = [0, 3, 2, 1, 4, 5, 6, 7, 8, 9]
    made = sequences.encode(np.array([[0]]), colors=colors)
    np.testing.assert_array_equal(made.token[:9], colors[1:])
    with pytest.raises(ValueError, match="permutation of 0 to 9; got"):
        sequences.encode(np.array([[0]]), colors=[0] * 10)


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        ([1, 10, 1], "no end"),
        ([11], "nothing"),
        ([1, 2, 10, 1, 10, 11], "rows of two widths"),
        ([1, 2, 11], "no newline"),
        ([10, 10, 11], "empty rows"),
        ([1] * 31 + [10, 11], "too wide"),
        ([1, 10] * 31 + [11], "too tall"),
    ],
)
def test_what_spells_no_grid_is_none(tokens, why):
    assert sequences.decode(np.array(tokens)) is None, why


@pytest.mark.parametrize("wrong", [np.zeros((31, 1), int), np.zeros(3, int), [[0.5]], [[10]]])
def test_what_is_no_grid_is_refused(wrong):
    with pytest.raises(ValueError, match="input must be a grid of 1 to 30 rows"):
        sequences.encode(np.array(wrong))


def items(count):
    rng = np.random.default_rng(1)
    for number in range(count):
        shape = rng.integers(1, 6, 2)
        pair = rng.integers(0, 10, (2, *shape))
        yield sequences.Item(sequences.encode(*pair), number % 7, number % 8, number)


def test_every_sequence_is_packed_once_and_whole():
    originals = {item.tag: item for item in items(40)}
    found = set()
    for batch, tags in sequences.pack(items(40), rows=2, length=160, most=4, patience=3):
        for row, place, tag in tags:
            span = np.flatnonzero(batch.segment[row] == place)
            item = originals[tag]
            assert tag not in found
            found.add(tag)
            np.testing.assert_array_equal(span, np.arange(span[0], span[0] + len(span)))
            for name, leaf in item.sequence._asdict().items():
                np.testing.assert_array_equal(getattr(batch, name)[row, span], leaf)
            assert (batch.task[row, place], batch.view[row, place]) == (item.task, item.view)
            prefix = item.sequence.prefix
            np.testing.assert_array_equal(batch.first[row, span], span[0])
            np.testing.assert_array_equal(batch.last[row, span[:prefix]], span[prefix - 1])
            np.testing.assert_array_equal(batch.last[row, span[prefix:]], span[prefix:])
        outside = batch.segment < 0
        assert (batch.last[outside] < batch.first[outside]).all()
        assert (batch.label[outside] == -1).all()
    assert found == set(originals)


def test_a_stream_without_an_end_fills_its_rows():
    endless = itertools.cycle(items(20))
    batches = sequences.pack(endless, rows=4, length=256, most=8)
    fill = [np.mean(next(batches)[0].segment >= 0) for _ in range(5)]
    assert min(fill) > 0.85


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a row of 16 tokens; got one of"):
        next(sequences.pack(items(1), rows=1, length=16, most=1))

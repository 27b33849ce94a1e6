"""Private copies of a decoder of grids: apart from each other, guarded, forgotten."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.arc import answers, private
from ttt_jax import models
from ttt_jax.data import grid_sequences
from ttt_jax.data.few_shot import Example, FewShotTask

pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

SETTINGS = private.Settings(
    rank=2,
    alpha=2.0,
    rate=3e-2,
    num_steps=6,
    every=3,
    length=128,
    most=4,
    tasks_at_once=3,
    held_out_views=2,
)
NET = models.GridDecoder(tasks=4, width=32, depth=1, heads=2, mlp_width=32, attention="xla")


def tasks(count=4):
    rng = np.random.default_rng(0)

    def pair(number):
        before = rng.integers(0, 10, (2, 3))
        return Example(before, (before + number) % 10)

    return [
        FewShotTask(f"add{n}", tuple(pair(n) for _ in range(3)), (pair(n),)) for n in range(count)
    ]


@pytest.fixture(scope="module")
def copies():
    params = NET.init(jax.random.key(0), grid_sequences.empty(1, 128, 4)._asdict())
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)
    return private.copies_of(NET, params, SETTINGS, 0)


@pytest.fixture(scope="module")
def learned(copies):
    """Three tasks at once: rows, held-out rows, and what they leave."""
    rngs = [np.random.default_rng(n) for n in range(3)]
    parts = [private._held_out(t, n, SETTINGS, rngs[n]) for n, t in enumerate(tasks(3))]
    rows = private._rows([t for t, _ in parts], range(3), SETTINGS, rngs)
    held_out = private._stacked([row for _, row in parts])
    run = jax.jit(lambda *given: private.learn(copies, *given, SETTINGS))
    return run, rows, held_out, jax.device_get(run(rows, np.full(3, 6), held_out))


def test_copies_learn_and_are_apart(copies, learned):
    run, rows, held_out, (fast, curves) = learned
    assert curves.shape == (3, 3) and np.isfinite(curves).all()
    assert (curves[:, -1] < curves[:, 0]).all()
    order = np.array([2, 0, 1])
    mixed = {name: leaf[:, order] for name, leaf in rows.items()}
    moved, _ = run(mixed, np.full(3, 6), {k: v[order] for k, v in held_out.items()})
    for ours, wanted in zip(jax.tree.leaves(moved), jax.tree.leaves(fast), strict=True):
        np.testing.assert_array_equal(ours, wanted[order])
    spoiled = {name: leaf.copy() for name, leaf in rows.items()}
    spoiled["label"][:, 1] = 0
    others, _ = jax.device_get(run(spoiled, np.full(3, 6), held_out))
    for ours, wanted in zip(jax.tree.leaves(others), jax.tree.leaves(fast), strict=True):
        np.testing.assert_array_equal(ours[[0, 2]], wanted[[0, 2]])
    assert any((o[1] != w[1]).any() for o, w in zip(*map(jax.tree.leaves, (others, fast))))  # noqa: B905


def test_a_copy_that_takes_no_step_is_the_source(copies, learned):
    run, rows, held_out, _ = learned
    fast, curves = jax.device_get(run(rows, np.array([0, 3, 0]), held_out))
    np.testing.assert_allclose(curves[[0, 2]], curves[[0, 2], :1].repeat(3, 1), rtol=1e-6)
    assert curves[1, 1] == pytest.approx(curves[1, 2], rel=1e-6)
    assert curves[1, 1] < curves[1, 0]
    first = jax.device_get(copies.adapter.init(copies.params).fast)
    for ours, wanted in zip(jax.tree.leaves(fast), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(ours[0], wanted)


def test_the_guard_takes_no_step_that_harms():
    curves = np.array([[1.0, 0.5, 0.7], [1.0, 1.2, 1.1], [1.0, np.nan, 0.9], [1.0, 0.99, 2.0]])
    np.testing.assert_array_equal(private.steps_of(curves, SETTINGS), [3, 0, 6, 3])
    np.testing.assert_array_equal(private.steps_of(curves, SETTINGS, margin=0.05), [3, 0, 6, 0])


def test_every_task_is_answered_by_its_own_copy(copies, monkeypatch):
    """Four tasks in groups of three; without a step the votes are the source's."""
    # A drawn decoder spells no grid: its first six tokens are taken for one.
    spelled = lambda tokens: (tokens[:6] % 10).reshape(2, 3)  # noqa: E731
    monkeypatch.setattr(answers.grid_sequences, "decode", spelled)
    given = {"num_views": 2, "slots": 48, "seed": 0, "log": lambda line: None}
    cast, taken = private.answer(copies, tasks(), settings=SETTINGS, **given)
    assert set(cast) == set(taken) == {0, 1, 2, 3}
    assert all(steps in (0, 3, 6) for steps in taken.values())
    assert all(len(votes) == 1 and len(votes[0]) == 2 for votes in cast.values())
    still, none = private.answer(
        copies, tasks(), settings=SETTINGS._replace(rate=0.0), guarded=False, **given
    )
    assert set(none.values()) == {6}
    alone, _ = private.answer(
        copies,
        tasks(),
        settings=SETTINGS._replace(rate=0.0, tasks_at_once=1),
        guarded=False,
        **given,
    )
    for number in range(4):
        for ours, wanted in zip(still[number][0], alone[number][0], strict=True):
            np.testing.assert_array_equal(ours.answer, wanted.answer)
    assert any((a.answer != b.answer).any() for a, b in zip(still[0][0], still[1][0], strict=True))
    assert jnp.ndim(copies.params["params"]["token"]) == 2

"""Discovery: scores against NumPy, problems apart from each other, and the whole program."""

import itertools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from benchmarks import discovery, discovery_problems as problems
from benchmarks.discovery_problems import ASK, BAR, CLOSED, FAMILIES
from experiments import launch
from experiments.report import committed

STEPS, RULERS = FAMILIES["steps"], FAMILIES["rulers"]


def ratio(heights):
    """By NumPy's convolution."""
    return heights.sum() ** 2 / (2 * len(heights) * np.convolve(heights, heights).max())


def measured(problem, gaps):
    """The share of the distances, by sets."""
    marks = np.cumsum([0, *gaps[problem["free"]]])
    most = (len(marks) * (len(marks) - 1)) // 2
    wanted = set(range(1, most + 1)) - set(problem["head"][:-1].tolist())
    count = len(wanted & {int(b - a) for a, b in itertools.combinations(marks, 2)})
    return (count - marks[-1] / (problems.NUMBERS * len(gaps))) / len(wanted)


def drawn(family, count=20, seed=0):
    rng = np.random.default_rng(seed)
    sizes = (family.easy[0], family.places)
    each = [family.draw(rng, sizes[place % 2], family.places) for place in range(count)]
    made = problems.stacked(each)
    return made, problems.random_states(family, rng, made, 3)


@pytest.mark.parametrize(("family", "wanted"), [(STEPS, None), (RULERS, measured)])
def test_scores_are_those_of_numpy(family, wanted):
    made, states = drawn(family)
    found = jax.vmap(lambda problem, each: problems.scores(family, problem, each))(made, states)
    for place, row in enumerate(states):
        problem = {name: leaf[place] for name, leaf in made.items()}
        for state, score in zip(row, found[place], strict=True):
            open_state = np.where(problem["free"], state, 0)
            exact = wanted(problem, state) if wanted else ratio(open_state)
            assert float(score) == pytest.approx(exact, abs=1e-6)


def test_a_flat_function_and_a_good_one():
    """A flat one leaves C = 1/2 (height 1 on all: max f * f is its length); a known ruler."""
    problem = {"head": np.zeros(0, np.int32), "free": np.ones(16, bool)}
    flat = jnp.full((1, 16), 7, jnp.int32)
    assert float(problems.scores(STEPS, problem, flat)[0]) == pytest.approx(0.5)
    # Marks 0 1 4 6 measure all of 1 to 6, of which 2 does not count.
    problem = {"head": np.array([2, BAR], np.int32), "free": np.ones(3, bool)}
    ruler = jnp.array([[1, 3, 2]], jnp.int32)
    price = 6 / (problems.NUMBERS * 3)
    assert float(problems.scores(RULERS, problem, ruler)[0]) == pytest.approx((5 - price) / 5)


def test_what_fills_other_places_or_is_no_number_has_no_score():
    made, states = drawn(STEPS, count=2)
    problem, state = {name: leaf[0] for name, leaf in made.items()}, states[0, 0]
    closed, free = np.flatnonzero(~problem["free"])[0], np.flatnonzero(problem["free"])[0]
    wrong = np.repeat(state[None], 4, 0)
    wrong[0, closed], wrong[1, free], wrong[2, free] = STEPS.high, CLOSED, ASK
    found = np.asarray(problems.scores(STEPS, problem, jnp.asarray(wrong)))
    np.testing.assert_array_equal(np.isfinite(found), [False, False, False, True])


def test_local_search_never_falls_and_fills_the_free_places_alone():
    made, states = drawn(STEPS, count=4)

    def climbed(problem, start, key):
        return problems.climb(STEPS, problem, start, key, 3, 20)

    keys = jax.random.split(jax.random.key(0), 4)
    found, values = jax.jit(jax.vmap(climbed))(made, states[:, 0], keys)
    assert (np.diff(values, axis=1) >= 0).all() and (values[:, -1] > values[:, 0]).all()
    np.testing.assert_array_equal(found[:, 0], states[:, 0])
    again = jax.vmap(lambda problem, each: problems.scores(STEPS, problem, each))(made, found)
    np.testing.assert_allclose(again, values, rtol=1e-6)


@pytest.mark.parametrize("family", [STEPS, RULERS])
def test_problems_differ_and_those_of_the_test_are_never_for_validation(family):
    seen = {}
    for role, seed in itertools.product(problems.ROLES, range(3)):
        rng = np.random.default_rng(seed)
        made = problems.distinct(family, rng, 32, role)
        names = [head.tobytes() + free.tobytes() for head, free in zip(*made.values(), strict=True)]
        assert len(set(names)) == 32
        seen.setdefault(role, set()).update(names)
        extent = [np.ptp(np.flatnonzero(free)) + 1 for free in made["free"]]
        assert set(extent) == {family.places} and family.places > family.easy[1]
    assert not seen["test"] & seen["validation"]
    with pytest.raises(ValueError, match="must be 32 distinct problems for test; found 1"):
        fixed = problems.distinct(family, np.random.default_rng(0), 1, "test")
        one = {name: leaf[0] for name, leaf in fixed.items()}
        problems.distinct(
            family._replace(draw=lambda *_: one), np.random.default_rng(0), 32, "test"
        )


def test_better_solutions_alone_are_learned_from():
    rng = np.random.default_rng(0)
    heads = np.array([[1, BAR], [2, BAR]])
    states = np.arange(len(discovery.SEEN))[None, :, None] + np.array([0, 10])[:, None, None]
    states = np.repeat(states, 3, 2).astype(np.int32)
    states[1] = 9
    batch = discovery.training_batch(rng, heads, states, 50)
    for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
        assert tokens[1] == BAR and tokens[5] == ASK and len(tokens) == 9
        before, after = tokens[2:5], tokens[6:]
        if tokens[0] == 1:
            assert (after > before).all()
            np.testing.assert_array_equal(mask, [0] * 6 + [1] * 3)
        else:
            assert not mask.any()
    assert {1, 2} == set(batch["tokens"][:, 0].tolist())


def test_the_committed_solutions_have_the_scores_that_are_reported():
    """Drawn anew from the seed, scored by sets; no way has another start."""
    record = committed.read("discovery")
    asked = ml_collections.ConfigDict(record["config"])
    made = discovery.hard_problems(RULERS, asked)
    for row in record["rows"]:
        assert len(row["best"]) == len(row["solutions"]) == len(made["free"]) == 32
        assert row["first"] == record["rows"][0]["first"]
        for place, (gaps, best) in enumerate(zip(row["solutions"], row["best"], strict=True)):
            problem = {name: leaf[place] for name, leaf in made.items()}
            gaps = np.array(gaps)
            assert ((gaps == CLOSED) != problem["free"]).all()
            assert measured(problem, gaps) == pytest.approx(best, abs=1e-6)


def test_wins_ties_and_losses():
    found = discovery.against([1.0, 2.0, 3.0, 4.0], [0.5, 2.0 + 1e-8, 3.5, 3.0])
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    assert found["mean"] == pytest.approx(0.25)
    assert found["interval"][0] < 0.25 < found["interval"][1]


def settings(**changes):
    values = {"family": "steps", "role": "test", "ways": tuple(discovery.WAYS), "seed": 0}
    values |= {"width": 32, "depth": 1, "num_steps": 3, "rows": 4, "easy_problems": 8, "rank": 2}
    values |= {"rate": 1e-2, "kl": 0.0, "temperature": 1.0, "exploration": 1.0, "problems": 2}
    values |= {"steps": 2, "starts": 2, "rollouts": 4, "pool": 4, "chunk": 2}
    return ml_collections.ConfigDict(values | changes)


def test_the_program_runs_every_way_at_equal_samples(tmp_path, monkeypatch):
    pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")
    monkeypatch.setitem(FAMILIES, "steps", STEPS._replace(places=5, easy=(3, 4)))
    record = discovery.run(str(tmp_path / "a.json"), settings())
    assert record == json.loads((tmp_path / "a.json").read_text())
    assert record["samples"] == 16 and len(record["rows"]) == 5
    for row in record["rows"]:
        assert np.shape(row["best_along"]) == (2, 2) and len(row["curve"]["mean"]) == 2
        assert (np.array(row["best"]) >= np.array(row["first"]) - 1e-6).all()
        np.testing.assert_allclose(row["best"], np.array(row["best_along"])[:, -1], atol=1e-5)
        for state, best in zip(row["solutions"], row["best"], strict=True):
            state = np.array(state)
            assert ratio(np.where(state == CLOSED, 0, state)) == pytest.approx(best, abs=1e-6)
    rows = {row["way"]: row for row in record["rows"]}
    # Without learning what is drawn first is the same; the starts are those of every way.
    assert rows["discover"]["curve"]["mean"][0] == rows["search"]["curve"]["mean"][0]
    assert rows["learning"]["curve"]["mean"][0] == rows["samples"]["curve"]["mean"][0]
    for way in ("samples", "search", "learning", "program"):
        assert rows[way]["first"] == rows["discover"]["first"]
        wanted = discovery.against(rows["discover"]["best"], rows[way]["best"])
        assert record["against"][way] == wanted
        assert wanted["wins"] + wanted["ties"] + wanted["losses"] == 2
    with pytest.raises(launch.UserError, match="unknown way 'x'"):
        discovery.run(str(tmp_path / "b.json"), settings(ways=("x",)))
    with pytest.raises(launch.UserError, match="at most pool, where they are kept; got 5 and 4"):
        discovery.run(str(tmp_path / "b.json"), settings(starts=5))
    with pytest.raises(ValueError, match="must be larger than easy ones"):
        discovery.hard_problems(STEPS._replace(easy=(6, 16)), settings())

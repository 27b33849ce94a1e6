"""The pictures of a run: which instances, what was predicted of them, rows left as they are."""

import shutil

import jax
import numpy as np
import pytest

from experiments import adapt, examples, journal, settings, tasks, units
from experiments.report import pictures
from tests.experiments import dense_config, tiny_config
from ttt_jax import checkpoint, evaluation

PART = adapt.Part(domains=("clean", "fog", "contrast"))


def config_of():
    """The stream before the method that adapts each instance alone, of one setting each."""
    config = dense_config.get_config()
    # One batch: the numbers of the streams, which say which image is kept, are below its size.
    config.adapt.update({"batch_size": 30, "chunk_size": 30})
    # Of either kind a method with a small program.
    return tiny_config.with_methods(
        config,
        source={},
        tent_online={"method": "tent", "predict": "after", "learning_rate": 0.01},
        memo={"num_views": 2, "num_steps": 1, "learning_rate": 0.01, "select": "all"},
    )


@pytest.fixture(scope="module")
def run(dense, dense_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(dense_folder / "checkpoints", folder / "checkpoints")
    assert adapt.run(config_of(), str(folder), devices=1, part=PART) == 0
    return folder


def test_a_run_keeps_images_with_what_is_predicted_before_and_after(run):
    config = config_of()
    task = tasks.build(config)
    held = np.load(run / "examples.npz")
    assert held["domain"].tolist() == ["fog", "contrast"]
    params = checkpoint.load(run / "checkpoints" / "seed_0", like=None).params
    classify = jax.jit(task.heads()["classify"])
    streams = task.streams("reported", 0)
    for k, domain in enumerate(held["domain"]):
        number = list(streams).index(domain)
        shifted, clean = (next(iter(streams[name])) for name in (domain, "clean"))
        assert shifted.id[number] == clean.id[number]
        assert held["label"][k] == shifted.y[number]
        np.testing.assert_allclose(held["shifted"][k], shifted.x[number], atol=5e-4)
        np.testing.assert_allclose(held["clean"][k], clean.x[number], atol=5e-4)
        logits = classify(params, shifted.x[number : number + 1])
        assert held["before"][k] == np.argmax(logits)
    assert len(pictures.examples(run / "examples.npz", [])) == 2


def test_what_is_kept_was_predicted_by_the_method_that_is_shown(run, tmp_path):
    config = config_of()
    task = tasks.build(config)
    candidates = settings.candidates(config, task)
    # Each instance alone goes before streams, whatever their order in the config.
    assert examples.shown(candidates) == "memo"
    assert examples.shown({"source": candidates["source"]}) is None
    # Whatever it is called: the methods come in the order of their names.
    memo = candidates["memo"][0]
    control = memo._replace(label="control", settings={**memo.settings, "learning_rate": 0.0})
    assert examples.shown({"control": [control], **candidates}) == "memo"
    params = checkpoint.load(run / "checkpoints" / "seed_0", like=None).params
    options = {"role": "reported", "seed": 0, "chunk_size": config.adapt.chunk_size}
    keeper = examples.PICTURES
    kept = examples.KeptEvaluation(
        task, params, label="memo", folder=tmp_path, keeper=keeper, **options
    )
    plain = evaluation.Evaluation(task, params, **options)
    method = candidates["memo"][0].bind(params, 0)
    # Those that the run compiled.
    kept.programs = plain.programs = units.programs(config, None)
    for stream in ("clean", "fog"):
        (row,), (same,) = (each.rows("memo", method, (stream,)) for each in (kept, plain))
        assert row.values == same.values and row.each.keys() == same.each.keys()
        assert row.sums.keys() == same.sums.keys()
    assert np.load(tmp_path / "examples.npz")["domain"].tolist() == ["fog"]
    number = kept.streams.index("fog")
    held = np.load(tmp_path / "examples.npz")
    assert (held["after"][0] != held["label"][0]) == same.each["error"][0][number]


def test_a_resumed_run_keeps_its_pictures(run):
    before = (run / "examples.npz").read_bytes()
    rows = journal.Journal(run / "results.jsonl").rows()
    assert adapt.run(config_of(), str(run), devices=1, part=PART) == 0
    assert (run / "examples.npz").read_bytes() == before
    assert journal.Journal(run / "results.jsonl").rows() == rows

"""SAR, and the methods that measure the training images first, against direct calls."""

import json

import jax
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from experiments import adapt, methods, problem, rows, trials
from tests.core import golden
from tests.experiments import tiny_config, tiny_model
from tests.experiments.test_batch_methods import Lab, close
from ttt_jax import checkpoint, data, diagnostics

NORM = ttt.select.norm_affine()


def get_config():
    return tiny_config.with_methods(
        tiny_config.get_batch_norm_config(),
        source={},
        bn_adapt={},
        sar={"learning_rate": 0.3, "margin": 0.9},
        eata={
            "learning_rate": (0.01, 0.05),
            "epsilon": 0.99,
            "margin": 0.999,
            "fisher_weight": 30.0,
            "fisher_images": 100,
        },
        actmad={"learning_rate": 0.01},
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_model.install(monkeypatch)
        yield Lab(get_config(), tmp_path_factory.mktemp("lab"))


def training_images(lab, count=None):
    source = problem.load_data(lab.config, "train")
    plan = data.streams.shuffled(source, seed=0)
    return np.stack([source[int(index)].image for index in plan.index[:count]])


def streamed(lab, adapter, apply, *, predict, reset=None):
    """``(logits, infos)`` of the three batches, one after the other."""
    stream = ttt.online(adapter, apply, reset=reset or ttt.resets.never(), predict=predict)
    params = lab.pristine.restore("memory")
    carry, step, logits, infos = stream.init(params), jax.jit(stream.step), [], []
    for batch in lab.batches:
        # As the runner has it: the key of a batch is that of its first image.
        key = ttt.sample_keys(jax.random.key(0), batch.id)[0]
        carry, (output, info) = step(params, carry, batch.image, key)
        logits.append(output)
        infos.append(info)
    return np.concatenate(logits), infos


def test_sar_is_the_library(lab):
    apply = lab.classify("batch")

    def reliable(reference=None):
        return ttt.losses.reliable_entropy(apply, margin=0.9, reference=reference, batch=True)

    adapter = ttt.sharpness_aware_adapter(
        reliable(), optax.sgd(0.3, momentum=0.9), select=NORM, rho=0.05, peak_loss=reliable
    )
    expected, infos = streamed(lab, adapter, apply, predict="before")
    assert all(info.updated for info in infos)
    outcome = lab.run("sar", reset_below=0.0)
    close(outcome.logits, expected)
    assert not outcome.reset.any()
    # Before the first update nothing has changed; later it has.
    statistics = lab.run("bn_adapt")
    close(outcome.logits[:20], statistics.logits[:20])
    assert np.abs(outcome.logits - statistics.logits)[20:].max() > 1e-2


def test_sar_recovers_where_the_loss_is_low(lab):
    """Below any entropy the state is dropped after every batch, momentum too."""
    outcome = lab.run("sar", reset_below=10.0)
    close(outcome.logits, lab.run("bn_adapt").logits)
    assert np.flatnonzero(outcome.reset).tolist() == [19, 39, 49]


def test_sar_without_a_reliable_image_does_not_recover(lab):
    outcome = lab.run("sar", margin=1e-6, reset_below=10.0)
    close(outcome.logits, lab.run("bn_adapt").logits)
    assert not outcome.reset.any()


def eata_loss(apply):
    return ttt.losses.sample_adaptive_entropy(
        apply, num_classes=10, epsilon=0.99, margin=0.999, batch=True
    )


def test_eata_is_the_library_with_the_fisher_information_of_training_images(lab):
    apply, params = lab.classify("batch"), lab.pristine.restore("memory")
    images = training_images(lab, 100)
    fn = jax.jit(ttt.losses.fisher_diagonal(apply, select=NORM, batch=True))
    parts = fn(params, images[:64]), fn(params, images[64:])
    anchor = jax.tree.map(lambda a, b: 2 * 30.0 * (0.64 * a + 0.36 * b), *parts)
    free, held = (
        ttt.gradient_adapter(eata_loss(apply), optax.adam(0.01), select=NORM, **options)
        for options in ({}, {"anchor": anchor})
    )
    expected, infos = streamed(lab, held, apply, predict="before")
    assert all(info.updated for info in infos)
    outcome = lab.run("eata")
    close(outcome.logits, expected)
    assert outcome.source_seconds > 0
    # The penalty is part of it.
    assert np.abs(streamed(lab, free, apply, predict="before")[0] - expected).max() > 1e-3


# Behind the last normalization there is no gradient.
FAST = ("encoder/kernel", "encoder/bias", "bn/scale", "bn/bias")


def normalized(p, images, mean, var):
    """``tiny_model`` up to its BatchNorm, in NumPy."""
    flat = (np.asarray(images, np.float64).reshape(len(images), -1) - 0.5) / 0.5
    rows = (golden.dense(p, "encoder", flat) - mean) / np.sqrt(var + golden.EPSILON)
    return rows * p["bn/scale"] + p["bn/bias"]


def views_of(lab, batch):
    """The one random shift of each image of a batch that the loss draws."""
    seen = []

    def collect(params, images):
        seen.append(images)
        return {"images": images}

    zeros = {"images": np.zeros(batch.image.shape[1:])}
    source = {"mean": zeros, "square": zeros}
    loss = ttt.losses.activation_matching(
        collect, source, augment=lab.problem.view, num_views=1, batch=True
    )
    key = ttt.sample_keys(jax.random.key(0), batch.id)[0]
    loss(None, batch.image, jax.random.fold_in(key, 0))
    (views,) = seen
    padded = np.pad(batch.image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    shifts = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    assert np.all(np.any([np.all(views == s, axis=(1, 2, 3)) for s in shifts], axis=0))
    return views


def test_actmad_by_its_formulas(lab):
    """The stream in NumPy: Nesterov's momentum and weight decay on central differences."""
    pristine = lab.pristine.restore("memory")
    p = golden.flat(pristine["params"])
    running = [np.asarray(pristine["batch_stats"]["bn"][name]) for name in ("mean", "var")]
    images = training_images(lab)
    parts = [images[n : n + 500] for n in range(0, len(images), 500)]
    draws = [jax.random.split(jax.random.key(0), len(part)) for part in parts]
    views = np.concatenate(
        [jax.vmap(lab.problem.view)(*pair) for pair in zip(parts, draws, strict=True)]
    )
    source = normalized(p, views, *running)
    expected, nearest = [], []

    def loss(p, views):
        rows = normalized(p, views, *running)
        off = rows.mean(axis=0) - source.mean(axis=0)
        gap = rows.var(axis=0, ddof=1) - source.var(axis=0)
        nearest.append(np.abs([off, gap]).min())
        return (np.abs(off).mean() + np.abs(gap).mean()) / 2, None

    optimizer = golden.SGD(0.1, momentum=0.9, nesterov=True, decay=5e-4)
    for batch in lab.batches:
        p = optimizer.step(p, golden.slopes(loss, p, FAST, views_of(lab, batch)))
        features = np.maximum(normalized(p, batch.image, *running), 0)
        expected.append(golden.dense(p, "fc", features))
    # No sign changes within a difference, nor by rounding.
    assert min(nearest) > 1e-4
    outcome = lab.run("actmad", learning_rate=0.1, select="params/(encoder|bn)/.*")
    close(outcome.logits, np.concatenate(expected))


def test_candidates_that_differ_in_traced_settings_share_a_measurement(lab, monkeypatch):
    calls = []
    measure = ttt.source_statistics

    def counted(*args, **options):
        calls.append(1)
        return measure(*args, **options)

    monkeypatch.setattr(ttt, "source_statistics", counted)
    method = lab.method("eata")
    again = lab.fresh_runner()
    for settings in method.grid:
        again.run("eata", method, settings, lab.batches)
    assert len(method.grid) == 2 and len(calls) == 1


def test_test_images_are_refused_as_source(lab):
    config = get_config()
    config.data.train = "test[:100]"
    method = lab.method("actmad")
    with pytest.raises(ValueError, match="must not come from test data"):
        lab.fresh_runner(config).run("actmad", method, method.grid[0], lab.batches)


def test_a_bad_option_is_refused_before_anything_is_measured(lab):
    config = get_config()
    config.methods.actmad.optimizer = "adamw"
    with pytest.raises(ValueError, match=r"methods\.actmad: optimizer .* got 'adamw'"):
        methods.build(config, lab.problem, lab.plain)
    config = tiny_config.with_methods(get_config(), eata={"learning_rate": 0.1, "epsilon": 0.4})
    with pytest.raises(ValueError, match=r"methods\.eata needs the option 'fisher_weight'"):
        methods.build(config, lab.problem, lab.plain)


def test_rows_say_how_long_the_source_statistics_took(lab):
    method = lab.method("actmad")
    outcome = lab.run("actmad")
    plan = trials.plan_for(lab.config.adapt, problem.load_data(lab.config, "test"), "fog", 5, 0)
    found = np.zeros(50, int)
    trial = trials.Trial("none", (plan,))
    (row,) = rows.make_rows(method, method.grid[0], trial, outcome, found, {}, {})
    adapted = outcome.logits.argmax(-1)
    assert row["agreement"] == (adapted == 0).mean() and row["predicted_classes_before"] == 1
    named = diagnostics.predicted_classes(outcome.logits)
    assert row["predicted_classes_after"] == pytest.approx(float(named), rel=1e-5)
    assert row["source_seconds"] == outcome.source_seconds > 0
    assert (row["scope"], row["reset"], row["predict"]) == ("stream", "per_domain", "after")
    assert (row["forwards_per_sample"], row["backwards_per_sample"]) == (2, 1)


def test_the_program_runs_them(tmp_path, monkeypatch):
    tiny_model.install(monkeypatch)
    config = get_config()
    # Less to compile: one candidate, batches of one size.
    del config.methods.sar, config.methods.bn_adapt
    config.methods.eata.learning_rate = (0.01,)
    config.data.test, config.adapt.batch_size = "test[:20]", 20
    lab = Lab(config, tmp_path)
    folder = tmp_path / "run"
    checkpoint.save(
        folder / "checkpoints" / "seed_0",
        lab.pristine.restore("memory"),
        metadata=problem.checkpoint_metadata(config),
    )
    assert adapt.run(config, str(folder)) == 0
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in found} == set(config.methods)
    assert len(found) == 3 * (4 + 16) and all(row["status"] == "ok" for row in found)
    with_source = {row["method"] for row in found if "source_seconds" in row}
    assert with_source == {"eata", "actmad"}

"""Methods over whole batches, against direct calls of the library."""

import jax
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from experiments import methods, problem, runner, trials
from tests.experiments import tiny_config, tiny_model
from ttt_jax import checkpoint, models


class Lab:
    """A runner over an untrained model, and the batches of fog: 20, 20 and 10 images."""

    def __init__(self, config, folder):
        self.config = config
        source = problem.load_data(config, "test")
        self.problem = problem.build(config, source)
        self.plain = problem.build(config, source, shared_kernels=True)
        # Away from the initial values: with all biases at zero too much is symmetric.
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda leaf: np.asarray(leaf) + rng.uniform(0, 0.2, leaf.shape).astype(np.float32),
            problem.initial(self.plain, 0),
        )
        checkpoint.save(folder / "model", params)
        self.pristine = checkpoint.load(folder / "model")
        self.runner = self.fresh_runner()
        plan = trials.plan_for(config.adapt, source, "fog", 5, 0)
        self.batches = self.runner.batches(source, trials.Trial("none", (plan,)))

    def fresh_runner(self, config=None):
        config = config or self.config
        return runner.Runner(config, self.plain, self.pristine, seed=0, restore="memory")

    def method(self, name):
        return methods.build(self.config, self.problem, self.plain)[name]

    def run(self, name, **settings):
        method = self.method(name)
        return self.runner.run(name, method, method.grid[0] | settings, self.batches)

    def classify(self, norm):
        raw = models.from_linen(self.plain.module, norm=norm)
        return lambda params, images: raw(params, (images - 0.5) / 0.5)

    def direct(self, loss, optimizer, *, norm="batch", num_steps=1):
        """Every batch by itself, through ``ttt.episodic``."""
        apply = self.classify(norm)
        adapter = ttt.gradient_adapter(
            loss(apply, batch=True), optimizer, select=ttt.select.norm_affine()
        )
        predict = jax.jit(ttt.episodic(adapter, apply, num_steps=num_steps))
        params = self.pristine.restore("memory")
        key = jax.random.key(0)
        return np.concatenate([predict(params, batch.image, key)[0] for batch in self.batches])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_model.install(monkeypatch)
        return Lab(tiny_config.get_batch_norm_config(), tmp_path_factory.mktemp("lab"))


def close(a, b):
    ttt.audit.require_close(a, b, num_steps=len(a))


def test_tent_is_the_library_on_each_batch_of_its_true_size(lab):
    assert [len(batch.id) for batch in lab.batches] == [20, 20, 10]
    outcome = lab.run("tent")
    close(outcome.logits, lab.direct(ttt.losses.entropy, optax.adam(0.05)))
    assert outcome.ok.shape == (50,) and outcome.ok.all()


def test_before_the_update_tent_is_the_statistics_alone(lab):
    before, statistics = lab.run("tent", predict="before"), lab.run("bn_adapt")
    close(before.logits, statistics.logits)
    assert np.abs(lab.run("tent").logits - before.logits).max() > 1e-2


def test_a_stream_of_batches_keeps_its_state(lab):
    apply, params = lab.classify("batch"), lab.pristine.restore("memory")
    adapter = ttt.gradient_adapter(
        ttt.losses.entropy(apply, batch=True), optax.sgd(0.05), select=ttt.select.norm_affine()
    )
    state, expected = adapter.init(params), []
    for batch in lab.batches:
        expected.append(apply(adapter.merge(params, state), batch.image))
        state, _ = adapter.step(params, state, batch.image, jax.random.key(0))
    outcome = lab.run("tent_online")
    close(outcome.logits, np.concatenate(expected))
    forgetful = lab.run("tent", optimizer="sgd", predict="before")
    assert np.abs(outcome.logits - forgetful.logits)[20:].max() > 1e-4


def test_pseudo_label_is_the_library(lab):
    expected = lab.direct(ttt.losses.pseudo_label, optax.sgd(0.05, momentum=0.9), num_steps=2)
    close(lab.run("pseudo_label").logits, expected)


def test_a_prior_blends_the_statistics_of_the_batch(lab):
    params = lab.pristine.restore("memory")
    expected = [lab.classify(16)(params, batch.image) for batch in lab.batches]
    close(lab.run("bn_adapt", prior=16).logits, np.concatenate(expected))


def test_without_batch_norm_tent_adapts_layer_norms_and_bn_adapt_is_refused(tmp_path):
    config = tiny_config.get_config()
    lab = Lab(tiny_config.with_methods(config, tent={"learning_rate": 0.05}), tmp_path)
    close(
        lab.run("tent").logits,
        lab.direct(ttt.losses.entropy, optax.adam(0.05), norm="running"),
    )
    tiny_config.with_methods(config, bn_adapt={})
    with pytest.raises(ValueError, match=r"methods\.bn_adapt needs a model with BatchNorm"):
        lab.method("bn_adapt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.1, "optimizer": "adamw"}, r"methods\.tent: optimizer .* got 'adamw'"),
        ({"learning_rate": 0.1, "momentum": 0.9}, r"methods\.tent: .*'adam' with momentum=0\.9"),
        ({"learning_rate": 0.1, "predict": "during"}, r"methods\.tent: predict .* got 'during'"),
        ({"optimizer": "sgd"}, r"methods\.tent needs the option 'learning_rate'"),
    ],
)
def test_an_impossible_option_is_refused(lab, options, words):
    config = tiny_config.with_methods(tiny_config.get_batch_norm_config(), tent=options)
    with pytest.raises(ValueError, match=words):
        methods.build(config, lab.problem, lab.plain)


def test_masked_reconstruction_needs_a_decoder(lab):
    config = tiny_config.get_mae_config()
    with pytest.raises(ValueError, match=r"methods\.mae needs .* Dense .*model\.name='vit'"):
        methods.build(config, lab.problem, lab.plain)

"""What is given where the contract asks for another thing: one sentence with rule, value, fix."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import audit, losses, methods, resets, select

KEY = jax.random.key(0)
KEYS = ttt.sample_keys(KEY, np.arange(4))
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
P = {"w": np.eye(3, dtype=np.float32), "b": np.zeros(3, np.float32)}
IMAGE = np.ones((6, 6, 1), np.float32)


def model(params, x):
    return x @ params["w"] + params["b"][None]


def keep(x, key):
    return x


one = ttt.unbatched(model)
SGD = optax.sgd(0.1)
ADAPTER = ttt.gradient_adapter(losses.entropy(model), SGD, select=select.everything())
PREDICT = ttt.episodic(ADAPTER, one, num_steps=1)
STREAM = ttt.online(ADAPTER, one, reset=resets.never())
LOSSES = {
    "rotation": losses.rotation,
    "entropy": losses.entropy,
    "marginal_entropy": lambda apply: losses.marginal_entropy(apply, keep, num_views=2),
    "pseudo_label": losses.pseudo_label,
    "reliable_entropy": losses.reliable_entropy,
    "sample_adaptive_entropy": lambda apply: losses.sample_adaptive_entropy(
        apply, num_classes=3, epsilon=0.5
    ),
    "denoising": lambda apply: losses.denoising(apply, noise=0.1),
    "masked_reconstruction": lambda apply: losses.masked_reconstruction(apply, patch=3),
    "contrastive": lambda apply: losses.contrastive(apply, keep, bank=np.eye(3)),
    "fisher_diagonal": lambda apply: losses.fisher_diagonal(apply, select=select.everything()),
    "feature_moments": losses.feature_moments,
    "activation_moments": losses.activation_moments,
    "moment_matching": lambda apply: losses.moment_matching(
        apply,
        {"mean": np.zeros(3), "centered": np.eye(3)},
        mean_weight=1.0,
        covariance_weight=1.0,
        batch=True,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, functools.partial], ids=("itself", "jit", "partial")
)
def test_a_loss_refuses_unbatched(name, wrap):
    with pytest.raises(TypeError, match=rf"{name} .*got unbatched\(apply\).*pass apply"):
        LOSSES[name](wrap(ttt.unbatched(model)))


def test_unbatched_refuses_unbatched():
    with pytest.raises(TypeError, match=r"got unbatched\(apply\)"):
        ttt.unbatched(one)


def test_a_mapped_one_instance_function_is_a_model_function():
    mapped = jax.vmap(one, in_axes=(None, 0))
    assert losses.entropy(mapped)(P, X[0], KEY) == losses.entropy(model)(P, X[0], KEY)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ttt.online(ADAPTER, one, reset=resets.never), r"reset .*never: call resets.never"),
        (lambda: ttt.online(ADAPTER, one, reset=SGD), "reset must be a Reset; got a Grad"),
        (lambda: ttt.online(STREAM, one, reset=resets.never()), "adapter must .*got a Stream"),
        (lambda: methods.tent(model, reset=resets.never), r"call resets.never\(\)"),
        (lambda: methods.tent(model, select=select.everything), r"call select.everything\(\)"),
        (lambda: methods.tent(model, optimizer=optax.adam), "the function adam"),
        (lambda: ttt.gradient_adapter(losses.entropy, SGD, select=select.everything()), "call los"),
        (lambda: ttt.gradient_adapter(ADAPTER, SGD, select=select.everything()), "got an Adapter"),
        (lambda: ttt.gradient_adapter(lambda *a: 0.0, 0.1, select=select.biases()), "float 0.1"),
        (lambda: ttt.gradient_adapter(lambda *a: 0.0, SGD, select="w"), "Selection; got str 'w'"),
        (lambda: ttt.episodic(losses.entropy(model), one, num_steps=1), "adapter must be an Adap"),
        (lambda: ttt.episodic(ADAPTER, nn.Dense(3), num_steps=1), "Dense: build it with models"),
        (lambda: ttt.episodic(ADAPTER, (model, P), num_steps=1), "pass its first entry"),
        (lambda: ttt.inner_loop(PREDICT, 1), "adapter must be an Adapter"),
        (lambda: ttt.filtered(PREDICT, keep), "adapter must be an Adapter"),
        (lambda: ttt.filtered(ADAPTER, 0.5), "keep must be a function"),
        (lambda: ttt.batched(STREAM), "got a Stream: .*ttt_jax.episode"),
        (lambda: ttt.batched(one), "ttt_jax.source"),
        (lambda: ttt.batched(ttt.batched(PREDICT)), "over many already"),
        (lambda: ttt.batched(methods.tent), r"call methods.tent\(...\)"),
        (lambda: ttt.vote(STREAM, 2, combine=lambda o: o[0]), "got a Stream"),
        (lambda: ttt.episode(PREDICT), "stream must be a Stream"),
        (lambda: ttt.unroll(ADAPTER), "stream must be a Stream; got an Adapter"),
        (lambda: audit.check(STREAM, P, X, KEYS), "got a Stream"),
        (lambda: select.union(select.biases), r"call select.biases\(\)"),
        (lambda: select.exclude(select.everything(), "b"), "must be a Selection; got str 'b'"),
        (lambda: select.describe(select.biases, P), r"call select.biases\(\)"),
        (lambda: losses.entropy(nn.Dense(3)), "build it with models.from_linen"),
        (lambda: losses.weighted((1.0, losses.entropy)), "call losses.entropy"),
        (lambda: resets.on_collapse(0.2, 0.5), "statistic must be a function"),
    ],
)
def test_another_thing_than_the_contract_asks_for(build, words):
    with pytest.raises(TypeError, match=words):
        build()


@pytest.mark.parametrize(
    ("outputs", "fix"),
    [
        (lambda y: {"logits": y}, r"returned a dict with 'logits'.*x\)\['logits'\]"),
        (lambda y: {"aux": y, "features": y}, r"\['(features|aux)'\]"),
        (lambda y: (y, y), r"a tuple of 2.*x\)\[0\]"),
    ],
)
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("activation_moments",)])
def test_a_model_of_several_outputs(name, outputs, fix):
    def several(params, x, *rest):
        return outputs(x)

    many = name in ("fisher_diagonal", "feature_moments", "moment_matching")
    x = IMAGE if name in ("rotation", "masked_reconstruction") else X if many else X[0]
    loss = LOSSES[name](several)
    with pytest.raises(TypeError, match=fix):
        if isinstance(loss, ttt.StatefulLoss):
            loss.value(P, loss.init(P), x, KEY)
        else:
            loss(P, x) if name in ("fisher_diagonal", "feature_moments") else loss(P, x, KEY)


def test_augmented_refuses_several_outputs():
    predict = ttt.augmented(lambda p, x: {"logits": one(p, x)}, keep, num_views=2)
    with pytest.raises(TypeError, match=r"augmented .*\['logits'\]"):
        predict(P, X[0], KEY)


def test_batched_refuses_a_list_of_instances():
    with pytest.raises(ValueError, match=r"a list of 4 arrays of shape \(3,\). Stack them"):
        ttt.batched(PREDICT)(P, list(X), KEYS)


def test_over_batch_refuses_a_loss_over_a_batch():
    for loss in (losses.entropy(model, batch=True), losses.over_batch(losses.entropy(model))):
        with pytest.raises(ValueError, match="over one instance; got one that averages over a bat"):
            losses.over_batch(loss)


def test_over_batch_refuses_an_empty_batch():
    with pytest.raises(ValueError, match=r"over_batch .* at least one instance; got 0"):
        losses.over_batch(losses.entropy(model))(P, X[:0], KEY)


@pytest.mark.parametrize("lift", [losses.over_batch, lambda loss: losses.weighted((1.0, loss))])
def test_losses_of_losses_refuse_a_report(lift):
    with pytest.raises(TypeError, match="return a scalar; one returned"):
        lift(lambda p, x, key: (jnp.sum(x), {"a": 1.0}))(P, X, KEY)


@pytest.mark.parametrize("predict", ["episodic", "stream", "vote", "augmented", "unroll"])
@pytest.mark.parametrize(
    ("key", "words"),
    [(0, "got key = int 0. Make one"), (None, "key = None"), (KEYS, r"keys of shape \(4,\)")],
    ids=["int", "none", "many"],
)
def test_one_typed_key(predict, key, words):
    call = {
        "episodic": PREDICT,
        "stream": ttt.episode(STREAM),
        "vote": ttt.vote(PREDICT, 2, combine=lambda o: o.mean(0)),
        "augmented": ttt.augmented(one, keep, num_views=2),
        "unroll": ttt.unroll(STREAM),
    }[predict]
    with pytest.raises((TypeError, ValueError), match=words):
        call(P, X if predict == "unroll" else X[0], key)


def test_an_anchor_with_its_split_is_its_value():
    fisher = {"w": jnp.ones((3, 3)), "b": jnp.ones(3)}
    both = [
        ttt.gradient_adapter(losses.entropy(model), SGD, select=select.everything(), anchor=anchor)
        for anchor in (ttt.SourceStatistics(fisher, "train"), fisher)
    ]
    states = [ttt.inner_loop(a, 2)(P, a.init(P), X[0], KEY)[0].fast["w"] for a in both]
    np.testing.assert_array_equal(*states)


def test_the_average_of_on_collapse_keeps_its_width():
    with jax.enable_x64(True):
        reset = resets.on_collapse(lambda out, info: info.loss[-1], 0.2, decay=np.float64(0.9))
        stream = ttt.online(ADAPTER, one, reset=reset)
        xs = jnp.asarray(X)
        jax.lax.scan(lambda c, x: stream.step(P, c, x, KEY), stream.init(P), xs)


def test_the_average_of_sample_adaptive_entropy_keeps_its_width():
    with jax.enable_x64(True):
        loss = losses.sample_adaptive_entropy(
            model, num_classes=3, epsilon=0.5, margin=2.0, decay=np.float64(0.9)
        )
        memory = jax.eval_shape(lambda: loss.value(P, loss.init(P), jnp.asarray(X[0]), KEY)[1])
    assert memory["probability"].dtype == jnp.float32


def test_sample_adaptive_entropy_promotes_no_dtype():
    loss = losses.sample_adaptive_entropy(model, num_classes=3, epsilon=0.5, margin=2.0)
    with jax.numpy_dtype_promotion("strict"):
        loss.value(P, loss.init(P), jnp.asarray(X[0]), KEY)

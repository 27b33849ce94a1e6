"""Tent and pseudo-labels against NumPy in float64, through batch statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import golden
from tests.core.compiling import quickly
from tests.core.streaming import rows, scanned
from ttt_jax import methods, resets

N, SIZE, INPUTS, WIDTH, CLASSES = 3, 8, 6, 5, 3
# Adam divides each slope by its size. With this seed none is below 0.003, where float32 is exact
# enough; rounding errors of a smaller one would grow into whole steps.
RNG = np.random.default_rng(188)
BATCHES = RNG.normal(size=(N, SIZE, INPUTS)).astype(np.float32)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(N))


def normal(*shape, mean=0.0, scale=1.0):
    return RNG.normal(mean, scale, size=shape).astype(np.float32)


def norm():
    return {"scale": normal(WIDTH, mean=1.0, scale=0.3), "bias": normal(WIDTH, scale=0.3)}


PARAMS = {
    "dense1": {"kernel": normal(INPUTS, WIDTH)},
    "norm1": norm(),
    "dense2": {"kernel": normal(WIDTH, WIDTH)},
    "norm2": norm(),
    "head": {"kernel": normal(WIDTH, CLASSES), "bias": normal(CLASSES)},
}
SOURCE = golden.flat(PARAMS)
AFFINE = ("norm1/scale", "norm1/bias", "norm2/scale", "norm2/bias")
RATE = 0.02


def batch_norm(layer, rows):
    centred = rows - rows.mean(axis=0, keepdims=True)
    variance = jnp.square(centred).mean(axis=0, keepdims=True)
    standard = centred / jnp.sqrt(variance + golden.EPSILON)
    return standard * layer["scale"][None] + layer["bias"][None]


def model(params, rows):
    lower = jnp.tanh(batch_norm(params["norm1"], rows @ params["dense1"]["kernel"]))
    upper = jnp.tanh(batch_norm(params["norm2"], lower @ params["dense2"]["kernel"]))
    return upper @ params["head"]["kernel"] + params["head"]["bias"][None]


def predicted(params, batch):
    """The prediction beside the parameters that made it."""
    return model(params, batch), params


def tent(**options):
    return methods.tent(model, optimizer=optax.adam(RATE), serve=predicted, **options)


def test_the_gradient_by_hand_is_a_slope():
    golden.same_slopes(golden.entropy, SOURCE, BATCHES[0])


@pytest.mark.parametrize("order", ["before", "after"])
def test_online(order):
    """One step a batch. Parameters, moments and their count go on from batch to batch."""
    stream = tent(predict=order)
    _, ((outputs, weights), info), carries = quickly(
        lambda p, x, k: scanned(stream, p, x, k), PARAMS, BATCHES, KEYS
    )
    p, optimizer = SOURCE, golden.Adam(RATE)
    for i, batch in enumerate(BATCHES.astype(np.float64)):
        before = p
        p, *steps = golden.adapt(p, golden.entropy, optimizer, [(batch,)])
        used = before if order == "before" else p
        golden.same_steps(rows(info, i), *steps)
        golden.same_weights(rows(weights, i), used)
        golden.same_weights(rows(carries.state.fast, i), p)
        golden.close(outputs[i], golden.batch_normalized(used, batch)[0])
    golden.adapted(SOURCE, p, AFFINE, 0.01)


def test_episodes_predict_after():
    """Two steps a batch, every batch from the source parameters and with fresh moments."""
    predict = ttt.batched(ttt.episode(tent(num_steps=2, predict="after")))
    (outputs, weights), info = quickly(predict, PARAMS, BATCHES, KEYS)
    for i, batch in enumerate(BATCHES.astype(np.float64)):
        p, *steps = golden.adapt(SOURCE, golden.entropy, golden.Adam(RATE), [(batch,)] * 2)
        golden.same_steps(rows(info, i), *steps)
        golden.same_weights(rows(weights, i), p)
        golden.close(outputs[i], golden.batch_normalized(p, batch)[0])
        golden.adapted(SOURCE, p, AFFINE, 0.01)


def test_episodes_predict_before():
    """What a stream's first step gives: the source prediction, whatever is learned after it."""
    (outputs, weights), info = quickly(ttt.batched(ttt.episode(tent())), PARAMS, BATCHES, KEYS)
    for i, batch in enumerate(BATCHES.astype(np.float64)):
        golden.close(outputs[i], golden.batch_normalized(SOURCE, batch)[0])
        golden.same_weights(rows(weights, i), SOURCE)
    assert info.updated.all() and info.loss.shape == (N, 1)


def pseudo_label(p, batch, labels):
    """``sum_n w_n CE(p_n, y_n) / max(sum_n w_n, 1)`` with the labels and weights of before."""
    probability = golden.softmax(golden.batch_normalized(p, batch)[0])
    kept = labels >= 0
    chosen = probability[np.arange(len(batch)), labels]
    return -(np.log(chosen) * kept).sum() / max(kept.sum(), 1), None


def test_pseudo_label():
    rate, threshold = 0.5, 0.7
    stream = methods.pseudo_label(
        model, threshold=threshold, optimizer=optax.sgd(rate), reset=resets.never(), serve=predicted
    )
    _, ((_, weights), info), carries = quickly(
        lambda p, x, k: scanned(stream, p, x, k), PARAMS, BATCHES, KEYS
    )
    p, optimizer, counts = SOURCE, golden.SGD(rate), []
    for i, batch in enumerate(BATCHES.astype(np.float64)):
        probability = golden.softmax(golden.batch_normalized(p, batch)[0])
        labels = np.where(probability.max(axis=1) >= threshold, probability.argmax(axis=1), -1)
        counts.append((labels >= 0).sum())
        golden.same_weights(rows(weights, i), p)
        value, _ = pseudo_label(p, batch, labels)
        golden.close(info.loss[i], [value])
        slopes = golden.slopes(pseudo_label, p, AFFINE, batch, labels)
        p = optimizer.step(p, slopes)
        golden.same_weights(rows(carries.state.fast, i), p)
    # The threshold leaves some out, never all.
    assert 0 < min(counts) and sum(counts) < N * SIZE
    golden.adapted(SOURCE, p, AFFINE, 0.001)


def generalized_cross_entropy(p, batch, labels, q=0.6):
    """``mean_n (1 - p_ny^q) / q`` with the labels of before."""
    probability = golden.softmax(golden.batch_normalized(p, batch)[0])
    return ((1 - probability[np.arange(len(batch)), labels] ** q) / q).mean(), None


def test_rpl():
    rate = 0.5
    stream = methods.rpl(model, q=0.6, optimizer=optax.sgd(rate), serve=predicted)
    _, ((_, weights), info), carries = quickly(
        lambda p, x, k: scanned(stream, p, x, k), PARAMS, BATCHES, KEYS
    )
    p, optimizer = SOURCE, golden.SGD(rate)
    for i, batch in enumerate(BATCHES.astype(np.float64)):
        labels = golden.batch_normalized(p, batch)[0].argmax(axis=1)
        golden.same_weights(rows(weights, i), p)
        golden.close(info.loss[i], [generalized_cross_entropy(p, batch, labels)[0]])
        p = optimizer.step(p, golden.slopes(generalized_cross_entropy, p, AFFINE, batch, labels))
        golden.same_weights(rows(carries.state.fast, i), p)
    golden.adapted(SOURCE, p, AFFINE, 0.001)


@pytest.mark.parametrize("q", [0.0, -0.1, 1.1, float("nan")])
def test_rpl_refuses_an_exponent_out_of_range(q):
    with pytest.raises(ValueError, match=r"rpl: q must be a number in \(0, 1\]; got"):
        methods.rpl(model, q=q)

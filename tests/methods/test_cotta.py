"""CoTTA against NumPy in float64: targets, student, teacher, and what the stream returns."""

import jax
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import methods, resets

from . import linear_model as lab

VIEWS, DECAY, RATE = 3, 0.7, 0.5


def grain(x, key):
    return x + 0.5 * jax.random.normal(key, x.shape)


@jax.jit
def all_views(batch, key):
    keys = jax.random.split(key, VIEWS)
    return [jax.vmap(grain)(batch, jax.random.split(k, len(batch))) for k in keys]


def views_of(batch, key):
    """``[V, N, 3]``: every instance of every augmented batch has a draw of its own."""
    views = all_views(batch, key)
    assert len(np.unique(np.array(views).round(5))) == VIEWS * batch.size
    return np.array(views, np.float64)


def target(source, teacher, batch, key, threshold):
    confidence = lab.probabilities(lab.forward(source, batch)).max(axis=1).mean()
    if confidence < threshold:
        return lab.forward(teacher, views_of(batch, key)).mean(axis=0), True
    return lab.forward(teacher, batch), False


def stream_of(threshold, **options):
    return methods.cotta(
        lab.classify,
        augment=grain,
        num_views=VIEWS,
        threshold=threshold,
        decay=DECAY,
        optimizer=optax.sgd(RATE),
        **{"reset": resets.never()} | options,
    )


def confidences():
    source = lab.theta_of(lab.PARAMS)
    rows = [lab.probabilities(lab.forward(source, batch)).max(axis=1) for batch in lab.BATCHES]
    return np.mean(rows, axis=1)


@pytest.mark.parametrize("order", ["before", "after"])
def test_stream(order):
    # The threshold lies between the batches: some targets are averaged, some are not.
    threshold = float(np.median(confidences()))
    outputs, infos, carries = lab.run(stream_of(threshold, predict=order))
    source = lab.theta_of(lab.PARAMS)
    student, teacher, averaged = source, source, []
    for i, batch in enumerate(lab.BATCHES):
        key = jax.random.fold_in(lab.KEYS[i], 0)
        logits, many = target(source, teacher, batch, key, threshold)
        averaged.append(many)
        wanted = lab.probabilities(logits)

        def loss(theta, batch=batch, wanted=wanted):
            logits = lab.forward(theta, batch)
            log_p = np.log(lab.probabilities(logits))
            return -(wanted * log_p).sum(axis=1).mean()

        lab.close(infos.loss[i, 0], loss(student))
        student = student - RATE * lab.slope(loss, student)
        before, teacher = teacher, DECAY * teacher + (1 - DECAY) * student
        used = before if order == "before" else teacher
        lab.close(outputs[i], target(source, used, batch, key, threshold)[0])
        state = jax.tree.map(lambda leaf, i=i: leaf[i], carries.state)
        lab.close(lab.theta_of(state.fast), student)
        lab.close(lab.theta_of(state.memory), teacher)
    assert len(set(averaged)) == 2
    assert np.abs(teacher - source).max() > 0.01 < np.abs(student - teacher).max()


def test_the_default_restores_elements_of_the_student_alone():
    params = {"w": lab.PARAMS["w"], "wide": np.zeros((100, 100), np.float32)}

    def classify(params, inputs):
        # Every element has a slope.
        return inputs @ params["w"] * (1 + params["wide"].sum())

    stream = methods.cotta(
        classify,
        augment=grain,
        num_views=1,
        optimizer=optax.adam(1e-3),
        select=ttt.select.paths("wide"),
    )
    _, infos, carries = lab.run(stream, lab.BATCHES[:1], lab.KEYS[:1], params)
    assert infos.reset.all()
    restored = (np.asarray(carries.state.fast["wide"][0]) == 0).mean()
    assert restored == pytest.approx(0.01, abs=0.004)
    assert (np.asarray(carries.state.memory["wide"][0]) != 0).all()


def test_one_instance_is_a_batch_of_one():
    threshold = float(np.median(confidences()))
    single = stream_of(threshold, batch=False)
    lifted = stream_of(threshold)
    xs = lab.BATCHES[:, 0]
    outputs, infos, _ = lab.run(single, xs)
    expected, others, _ = lab.run(lifted, xs[:, None])
    lab.close(outputs, expected[:, 0])
    lab.close(infos.loss, others.loss)


def test_a_student_far_away_does_not_move_the_source():
    """The source of the confidences is pristine, however long the stream."""
    stream = stream_of(1.0, num_steps=3)
    before = lab.theta_of(lab.PARAMS)
    lab.run(stream)
    np.testing.assert_array_equal(lab.theta_of(lab.PARAMS), before)


@pytest.mark.parametrize("count", [0, 2.0])
def test_number_of_views(count):
    with pytest.raises(ValueError, match=rf"methods\.cotta: num_views .* at least 1, got {count}"):
        methods.cotta(lab.classify, augment=grain, num_views=count)

"""DUA against NumPy in float64: the falling weight, the views, and the reset."""

import jax
import numpy as np
import pytest

from ttt_jax import methods, resets

from . import linear_model as lab

VIEWS = 4
PARAMS = {
    "params": {"w": lab.PARAMS["w"]},
    "batch_stats": {"mean": np.full(3, 0.5, np.float32), "var": np.full(3, 2.0, np.float32)},
}


def classify(params, inputs):
    stats = params["batch_stats"]
    return (inputs - stats["mean"][None]) / stats["var"][None] @ params["params"]["w"]


def statistics(params, inputs):
    return {
        "params": {"w": None},
        "batch_stats": {"mean": inputs.mean(axis=0), "var": inputs.var(axis=0)},
    }


def grain(x, key):
    return x + 0.3 * jax.random.normal(key, x.shape)


def predicted(mean, var, x):
    return (x - mean) / var @ PARAMS["params"]["w"].astype(np.float64)


@pytest.mark.parametrize("period", [None, 2])
def test_stream(period):
    xs = lab.BATCHES[:, 0]
    stream = methods.dua(
        classify,
        statistics,
        augment=grain,
        num_views=VIEWS,
        momentum=0.4,
        decay=0.5,
        floor=0.03,
        reset=resets.never() if period is None else resets.every(period),
    )
    outputs, infos, _ = lab.run(stream, xs, params=PARAMS)
    weights = []
    for i, x in enumerate(xs.astype(np.float64)):
        if i % (period or lab.N) == 0:
            mean, var, weight = np.full(3, 0.5), np.full(3, 2.0), 0.4
        keys = jax.random.split(jax.random.fold_in(lab.KEYS[i], 0), VIEWS)
        views = np.array([grain(xs[i], key) for key in keys], np.float64)
        weight = 0.5 * weight
        weights.append(weight + 0.03)
        mean = (1 - weights[-1]) * mean + weights[-1] * views.mean(axis=0)
        var = (1 - weights[-1]) * var + weights[-1] * views.var(axis=0)
        lab.close(outputs[i], predicted(mean, var, x))
    # By hand: 0.4 / 2 + 0.03, and halved but for the floor.
    later = [0.13, 0.08, 0.055] if period is None else [0.13, 0.23, 0.13]
    np.testing.assert_allclose(weights, [0.23, *later])
    assert infos.updated.all() and (infos.loss == 0).all()


def test_a_batch_is_all_views_of_all_instances():
    stream = methods.dua(
        classify, statistics, augment=lambda x, key: x, num_views=2, momentum=1.0, decay=0.5,
        floor=0.0, batch=True,
    )  # fmt: skip
    outputs, _, _ = lab.run(stream, lab.BATCHES[:1], lab.KEYS[:1], PARAMS)
    batch = lab.BATCHES[0].astype(np.float64)
    mean, var = 0.25 + batch.mean(axis=0) / 2, 1.0 + batch.var(axis=0) / 2
    lab.close(outputs[0], predicted(mean, var, batch))


def test_number_of_views():
    with pytest.raises(ValueError, match=r"methods\.dua: num_views .* at least 1, got 0"):
        methods.dua(classify, statistics, augment=grain, num_views=0)

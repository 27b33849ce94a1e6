"""NOTE against NumPy in float64: the reservoir, the statistics, the step, the predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.core import golden
from ttt_jax import methods, resets

from . import linear_model as lab
from .test_rotta import (
    AFFINE,
    CLASSES,
    PARAMS,
    RUNNING,
    SOURCE,
    classify,
    forward,
    normalized,
)

CAPACITY, EVERY, MOMENTUM, RATE = 5, 6, 0.2, 0.8
XS = np.random.default_rng(3).normal(size=(10, 3, 4)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(5), len(XS))


def classify_statistics(params, x):
    """Normalized with the statistics of the batch alone."""
    new = {"mean": x.mean(axis=0), "var": x.var(axis=0)}
    holes = {"norm": {"scale": None, "bias": None}, "head": {"kernel": None}}
    logits = normalized(params, x, new["mean"], new["var"])
    return logits, {"params": holes, "batch_stats": {"norm": new}}


def build(**options):
    return methods.note(
        classify,
        classify_statistics,
        like=jax.ShapeDtypeStruct((4,), jnp.float32),
        num_classes=CLASSES,
        capacity=CAPACITY,
        update_every=EVERY,
        momentum=MOMENTUM,
        optimizer=optax.sgd(RATE),
        **options,
    )


class Slots:
    """The published rules, one newcomer at a time; the draws are the library's."""

    def __init__(self):
        self.members, self.came = [None] * CAPACITY, [0] * CLASSES
        self.fates = {"free": 0, "other class": 0, "own class": 0, "refused": 0}

    def offer(self, x, label, key):
        self.came[label] += 1
        choose, accept = jax.random.split(key)
        draws, chance = jax.random.uniform(choose, (CAPACITY,)), jax.random.uniform(accept)
        if None in self.members:
            fate, slot = "free", self.members.index(None)
        else:
            sizes = [sum(m[1] == c for m in self.members) for c in range(CLASSES)]
            largest = [c for c in range(CLASSES) if sizes[c] == max(sizes)]
            if label not in largest:
                fate = "other class"
            else:
                largest = [label]
                fate = "own class" if chance <= sizes[label] / self.came[label] else "refused"
            slot = max((draws[n], n) for n, m in enumerate(self.members) if m[1] in largest)[1]
        self.fates[fate] += 1
        if fate != "refused":
            self.members[slot] = (x, label)


def statistics(rows):
    return {"mean": rows.mean(axis=0), "var": rows.var(axis=0)}


def entropy(p, rows):
    probability = golden.softmax(forward(p, rows, statistics(rows)))
    return -(probability * np.log(probability)).sum(axis=1).mean(), None


@pytest.mark.parametrize("order", ["before", "after"])
def test_stream(order):
    outputs, infos, carries = lab.run(build(predict=order), XS, KEYS, PARAMS)
    p, running, slots = SOURCE, RUNNING, Slots()
    for i, x in enumerate(XS.astype(np.float64)):
        logits = forward(p, x, running)
        if order == "before":
            lab.close(outputs[i], logits)
        keys = jax.random.split(jax.random.fold_in(KEYS[i], 0), len(x))
        for row, label, key in zip(x, logits.argmax(axis=1), keys, strict=True):
            slots.offer(row, label, key)
        if (i + 1) % 2 == 0:
            rows = np.array([x for x, _ in slots.members])
            lab.close(infos.loss[i, 0], entropy(p, rows)[0])
            p = golden.SGD(RATE).step(p, golden.slopes(entropy, p, AFFINE, rows))
            new = statistics(rows)
            running = {
                name: (1 - MOMENTUM) * running[name] + MOMENTUM * new[name] for name in running
            }
        else:
            assert infos.loss[i, 0] == 0
        if order == "after":
            lab.close(outputs[i], forward(p, x, running))
        state = jax.tree.map(lambda leaf, i=i: leaf[i], carries.state)
        golden.same_weights(state.fast["params"], p)
        kept = [member for member in slots.members if member is not None]
        reservoir = state.memory.reservoir
        lab.close(reservoir.x[: len(kept)], np.array([x for x, _ in kept]))
        assert reservoir.label[: len(kept)].tolist() == [label for _, label in kept]
        assert reservoir.arrivals.tolist() == slots.came
    assert min(slots.fates.values()) > 0
    golden.adapted(SOURCE, p, AFFINE, 0.01)


def test_a_memory_that_is_not_full_is_repeated():
    """Two single instances: both count once in the loss, in turn in the statistics."""
    stream = methods.note(
        classify,
        classify_statistics,
        like=XS[0, 0],
        num_classes=CLASSES,
        capacity=CAPACITY,
        update_every=2,
        momentum=1.0,
        batch=False,
        reset=resets.never(),
        predict="after",
    )
    xs = XS[0, :2]
    _, infos, carries = lab.run(stream, xs, KEYS[:2], PARAMS)
    rows = xs[[0, 1, 0, 1, 0]].astype(np.float64)
    probability = golden.softmax(forward(SOURCE, rows, statistics(rows)))
    each = -(probability * np.log(probability)).sum(axis=1)
    lab.close(infos.loss[:, 0], [0, each[:2].mean()])
    stored = carries.state.memory.statistics["batch_stats"]["norm"]
    lab.close(stored["mean"][1], rows.mean(axis=0))
    lab.close(stored["var"][1], rows.var(axis=0))


def test_bad_input():
    with pytest.raises(ValueError, match=r"methods\.note: capacity .* at least 1, got 0"):
        methods.note(classify, classify_statistics, like=XS[0, 0], num_classes=3, capacity=0)

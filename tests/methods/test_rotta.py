"""RoTTA against NumPy in float64: the memory, both statistics, student, teacher, predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.core import golden
from ttt_jax import methods, resets

from . import linear_model as lab

CLASSES, CAPACITY, EVERY, MOMENTUM, DECAY, RATE = 3, 5, 6, 0.2, 0.6, 0.8
RNG = np.random.default_rng(11)
XS = RNG.normal(size=(8, 3, 4)).astype(np.float32)
# The first six are alike, and of one class: the memory is not full at its first use.
XS[:2] = XS[0, 0] + 0.3 * XS[:2]
KEYS = jax.random.split(jax.random.key(5), len(XS))
PARAMS = {
    "params": {
        "norm": {
            "scale": np.array([1.0, 0.8, 1.2, 0.9], np.float32),
            "bias": np.array([0.1, -0.2, 0.0, 0.3], np.float32),
        },
        "head": {"kernel": RNG.normal(size=(4, CLASSES)).astype(np.float32)},
    },
    "batch_stats": {
        "norm": {"mean": np.full(4, 0.2, np.float32), "var": np.full(4, 1.5, np.float32)}
    },
}
SOURCE = golden.flat(PARAMS["params"])
RUNNING = {name: leaf.astype(float) for name, leaf in PARAMS["batch_stats"]["norm"].items()}
AFFINE = ("norm/scale", "norm/bias")


def normalized(params, x, mean, var):
    norm = params["params"]["norm"]
    standard = (x - mean[None]) * jax.lax.rsqrt(var + golden.EPSILON)[None]
    return (standard * norm["scale"][None] + norm["bias"][None]) @ params["params"]["head"][
        "kernel"
    ]


def classify(params, x):
    stats = params["batch_stats"]["norm"]
    return normalized(params, x, stats["mean"], stats["var"])


def classify_statistics(params, x):
    old, new = params["batch_stats"]["norm"], {"mean": x.mean(axis=0), "var": x.var(axis=0)}
    blend = {name: (1 - MOMENTUM) * old[name] + MOMENTUM * new[name] for name in new}
    holes = {"norm": {"scale": None, "bias": None}, "head": {"kernel": None}}
    logits = normalized(params, x, blend["mean"], blend["var"])
    return logits, {"params": holes, "batch_stats": {"norm": new}}


def grain(x, key):
    return x + 0.5 * jax.random.normal(key, x.shape)


def build(**options):
    return methods.rotta(
        classify,
        classify_statistics,
        augment=grain,
        like=jax.ShapeDtypeStruct((4,), jnp.float32),
        num_classes=CLASSES,
        capacity=CAPACITY,
        update_every=EVERY,
        momentum=MOMENTUM,
        decay=DECAY,
        optimizer=optax.sgd(RATE),
        **options,
    )


def forward(p, x, stats):
    standard = (x - stats["mean"]) / np.sqrt(stats["var"] + golden.EPSILON)
    return (standard * p["norm/scale"] + p["norm/bias"]) @ p["head/kernel"]


def blended(stats, x):
    new = {"mean": x.mean(axis=0), "var": x.var(axis=0)}
    return {name: (1 - MOMENTUM) * stats[name] + MOMENTUM * new[name] for name in stats}


def score(age, entropy):
    return 1 / (1 + np.exp(-age / CAPACITY)) + entropy / np.log(CLASSES)


class Slots:
    """The published rules, one newcomer at a time; counts what became of them."""

    def __init__(self):
        self.members, self.fates = [None] * CAPACITY, {"free": 0, "replaced": 0, "refused": 0}

    def join(self, x, label, entropy):
        counts = [sum(m is not None and m["label"] == c for m in self.members) for c in range(3)]
        crowded = counts[label] >= CAPACITY / CLASSES
        if not crowded and None in self.members:
            slot, fate = self.members.index(None), "free"
        else:
            largest = [label] if crowded else [c for c in range(3) if counts[c] == max(counts)]
            rivals = [
                (score(m["age"], m["entropy"]), n)
                for n, m in enumerate(self.members)
                if m is not None and m["label"] in largest
            ]
            worst, slot = max(rivals)
            fate = "replaced" if worst > score(0, entropy) else "refused"
        self.fates[fate] += 1
        if fate != "refused":
            self.members[slot] = {"x": x, "label": label, "entropy": entropy, "age": 0}
        for member in self.members:
            if member is not None:
                member["age"] += 1

    def repeated(self):
        """Members in turn up to the capacity, and how many there are."""
        members = [m for m in self.members if m is not None]
        return [members[n % len(members)] for n in range(CAPACITY)], len(members)


def student_loss(p, views, target, weight, stats):
    log_p = np.log(golden.softmax(forward(p, views, blended(stats, views))))
    return -(weight * (target * log_p).sum(axis=1)).sum() / (weight > 0).sum(), None


@pytest.mark.parametrize("order", ["before", "after"])
def test_stream(order):
    outputs, infos, carries = lab.run(build(predict=order), XS, KEYS, PARAMS)
    student, teacher, slots, occupied = SOURCE, SOURCE, Slots(), []
    of_teacher, of_student = RUNNING, RUNNING
    for i, x in enumerate(XS.astype(np.float64)):
        logits = forward(teacher, x, of_teacher)
        if order == "before":
            lab.close(outputs[i], logits)
        p = golden.softmax(logits)
        for row, label, q in zip(x, p.argmax(axis=1), p, strict=True):
            slots.join(row, label, -(q * np.log(q + 1e-6)).sum())
        if (i + 1) % 2 == 0:
            members, count = slots.repeated()
            occupied.append(count)
            rows = np.array([m["x"] for m in members])
            keys = jax.random.split(jax.random.fold_in(KEYS[i], 0), CAPACITY)
            views = np.array(jax.vmap(grain)(rows.astype(np.float32), keys), np.float64)
            age = np.array([m["age"] for m in members]) / CAPACITY
            weight = np.where(np.arange(CAPACITY) < count, np.exp(-age) / (1 + np.exp(-age)), 0)
            target = golden.softmax(forward(teacher, rows, blended(of_teacher, rows)))
            data = (views, target, weight, of_student)
            lab.close(infos.loss[i, 0], student_loss(student, *data)[0])
            slopes = golden.slopes(student_loss, student, AFFINE, *data)
            student = golden.SGD(RATE).step(student, slopes)
            of_teacher, of_student = blended(of_teacher, rows), blended(of_student, views)
            teacher = {
                name: DECAY * leaf + (1 - DECAY) * student[name] for name, leaf in teacher.items()
            }
        else:
            assert infos.loss[i, 0] == 0
        if order == "after":
            lab.close(outputs[i], forward(teacher, x, of_teacher))
        state = jax.tree.map(lambda leaf, i=i: leaf[i], carries.state)
        golden.same_weights(state.fast["params"], student)
        golden.same_weights(state.memory.teacher["params"], teacher)
        kept = [m for m in slots.members if m is not None]
        bank = jax.tree.map(lambda leaf, kept=kept: leaf[: len(kept)], state.memory.bank)
        lab.close(bank.x, np.array([m["x"] for m in kept]))
        np.testing.assert_array_equal(bank.label, [m["label"] for m in kept])
        np.testing.assert_array_equal(bank.age, [m["age"] for m in kept])
    # Every rule was used, and the memory was full and not full at an update.
    assert min(slots.fates.values()) > 0 and min(occupied) < CAPACITY == max(occupied)
    golden.adapted(SOURCE, student, AFFINE, 0.01)
    golden.adapted(SOURCE, teacher, AFFINE, 0.005)


def test_one_instance_at_a_time_and_reset():
    """Six single instances make one update; the reset after it forgets the memory too."""
    stream = build(batch=False, reset=resets.every(6))
    xs = XS.reshape(-1, 4)[:12]
    keys = jax.random.split(jax.random.key(2), 12)
    outputs, infos, carries = lab.run(stream, xs, keys, PARAMS)
    assert np.flatnonzero(infos.loss[:, 0]).tolist() == [5, 11]
    assert np.flatnonzero(infos.reset).tolist() == [5, 11]
    assert (carries.state.memory.bank.label[5] == -1).all() and carries.state.memory.seen[5] == 0
    # The teacher does not change within a period.
    lab.close(outputs, forward(SOURCE, xs.astype(np.float64), RUNNING))


def test_bad_input():
    with pytest.raises(ValueError, match=r"methods\.rotta: num_classes .* at least 2, got 1"):
        methods.rotta(
            classify,
            classify_statistics,
            augment=grain,
            like=XS[0, 0],
            num_classes=1,
            capacity=5,
            update_every=6,
        )

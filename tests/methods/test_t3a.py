"""T3A against lists in NumPy, in float64."""

import jax
import numpy as np
import pytest

import ttt_jax as ttt
from ttt_jax import methods, resets

from . import linear_model as lab

# Features of length 3; the rows of the classifier are its columns of weights.
XS = np.random.default_rng(7).normal(size=(4, 6, 3)).astype(np.float32)


def features(params, inputs):
    return inputs


def linear(params):
    return params["w"], params["b"]


class Templates:
    """As published: lists of supports, filtered by entropy, per class."""

    def __init__(self, count):
        self.count, self.sets = count, [[] for _ in range(lab.CLASSES)]
        self.theta = lab.theta_of(lab.PARAMS)
        self.add(lab.PARAMS["w"].T.astype(np.float64))

    def add(self, vectors):
        logits = lab.forward(self.theta, vectors)
        for z, row, entropy in zip(vectors, logits, lab.entropies(logits), strict=True):
            self.sets[row.argmax()].append((entropy, z))
        self.sets = [sorted(members, key=lambda m: m[0])[: self.count] for members in self.sets]

    def scores(self, vectors):
        templates = np.zeros((lab.CLASSES, 3))
        for c, members in enumerate(self.sets):
            total = sum((z / np.linalg.norm(z) for _, z in members), np.zeros(3))
            templates[c] = total / max(np.linalg.norm(total), 1e-30)
        return vectors @ templates.T


@pytest.mark.parametrize("count", [1, 2, 100])
@pytest.mark.parametrize("order", ["before", "after"])
def test_stream(count, order):
    stream = methods.t3a(features, linear=linear, num_supports=count, predict=order)
    outputs, infos, _ = lab.run(stream, XS)
    templates = Templates(count)
    for output, batch in zip(outputs, XS.astype(np.float64), strict=True):
        before = templates.scores(batch)
        templates.add(batch)
        lab.close(output, before if order == "before" else templates.scores(batch))
    assert infos.ok.all()
    sizes = [len(members) for members in templates.sets]
    # Some sets had to leave out what came; with room for all, none did.
    assert (max(sizes) == count) if count < 100 else (sum(sizes) == lab.CLASSES + XS[..., 0].size)


def test_one_instance_and_reset():
    """Forgetting after every instance leaves the classifier's rows and the instance itself."""
    stream = methods.t3a(
        features, linear=linear, num_supports=2, reset=resets.every(1), batch=False
    )
    outputs, infos, _ = lab.run(stream, XS[0], ttt.sample_keys(jax.random.key(0), np.arange(6)))
    for output, z in zip(outputs, XS[0].astype(np.float64), strict=True):
        templates = Templates(2)
        templates.add(z[None])
        lab.close(output, templates.scores(z[None])[0])
    assert infos.reset.all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"methods\.t3a: num_supports .* at least 1, got 0"):
        methods.t3a(features, linear=linear, num_supports=0)
    stream = methods.t3a(features, linear=linear)
    with pytest.raises(ValueError, match=r"features \[N, D\] .* got \(6, 2\) and \(3, 3\)"):
        lab.run(stream, XS[:, :, :2])

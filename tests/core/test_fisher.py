"""The diagonal Fisher information, against its closed form for a linear model."""

import typing

import jax
import numpy as np
import pytest

import ttt_jax as ttt
from ttt_jax import losses, select

from . import models
from .compiling import quickly

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(10, 4)).astype(np.float32)
PARAMS = {
    "head": {"kernel": RNG.normal(size=(4, 3)).astype(np.float32), "bias": np.ones(3, np.float32)},
    "frozen": np.ones(3, np.float32),
}
HEAD = select.paths("head/.*")


def linear(params, inputs):
    head = params["head"]
    return (inputs @ head["kernel"] + head["bias"][None]) * params["frozen"][None]


def gradients(rows):
    """Of the cross-entropy to the own label, one per row: (p - onehot) and its product with x."""
    logits = rows.astype(np.float64) @ PARAMS["head"]["kernel"] + 1
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    bias = p - np.eye(3)[logits.argmax(-1)]
    return rows[:, :, None] * bias[:, None], bias


class Batch(typing.NamedTuple):
    image: np.ndarray
    domain: np.ndarray


class Data:
    """Two batches of five with strings, as those of ``ttt_jax.data``."""

    split = "train"

    def __iter__(self):
        return (Batch(rows, np.array(["clean"])) for rows in np.split(ROWS, [5]))


class TestFisherDiagonal:
    def test_each_instance(self):
        found = quickly(losses.fisher_diagonal(linear, select=HEAD), PARAMS, ROWS)
        kernel, bias = gradients(ROWS)
        np.testing.assert_allclose(found["head"]["kernel"], (kernel**2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(found["head"]["bias"], (bias**2).mean(0), rtol=1e-4)
        assert found["frozen"] is None

    def test_a_loader_of_batches_with_strings(self):
        fn = losses.fisher_diagonal(linear, select=HEAD, batch=True)
        found = ttt.source_statistics(fn, PARAMS, Data())
        parts = [gradients(rows)[1].mean(0) ** 2 for rows in np.split(ROWS, [5])]
        np.testing.assert_allclose(found.value["head"]["bias"], np.mean(parts, 0), rtol=1e-4)
        assert found.split == "train"

    def test_is_an_anchor_for_the_same_selection(self):
        """In the layout of ``fast``: the holes are there too."""
        params = models.make_params()
        chosen = select.norm_affine()
        fn = losses.fisher_diagonal(models.classify, select=chosen)
        found = quickly(fn, params, models.make_images(3))
        fast, _ = chosen.split(params)
        assert jax.tree.structure(found) == jax.tree.structure(fast)
        assert all((leaf > 0).any() for leaf in jax.tree.leaves(found))

    def test_the_mean_gradient_is_smaller(self):
        kernel, _ = gradients(ROWS)
        found = quickly(losses.fisher_diagonal(linear, select=HEAD, batch=True), PARAMS, ROWS)
        np.testing.assert_allclose(found["head"]["kernel"], kernel.mean(0) ** 2, rtol=1e-3)
        assert (found["head"]["kernel"] <= (kernel**2).mean(0) * 1.001).all()

    def test_logits_are_checked(self):
        fn = losses.fisher_diagonal(lambda params, x: x.sum(axis=-1), select=select.everything())
        with pytest.raises(ValueError, match=r"losses\.fisher_diagonal needs .* got \(1,\)"):
            jax.eval_shape(fn, PARAMS, ROWS)

"""Source statistics: weighted means, banks, and the refusal of test data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt

from .compiling import quickly


class Data:
    """Batches of unequal size with a split."""

    def __init__(self, split, sizes=(3, 5, 1)):
        self.split = split
        rows = np.random.default_rng(0).normal(size=(sum(sizes), 4)).astype(np.float32)
        self.rows = rows
        self.batches = np.split(rows, np.cumsum(sizes)[:-1])

    def __iter__(self):
        return iter([{"image": batch} for batch in self.batches])


def second_moment(params, batch):
    return {"mean": batch["image"].mean(axis=0), "square": (batch["image"] ** 2).mean()}


def test_mean_weighs_batches_by_their_size():
    data = Data("train")
    found = ttt.source_statistics(second_moment, None, data)
    np.testing.assert_allclose(found.value["mean"], data.rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.value["square"], (data.rows**2).mean(), rtol=1e-5)
    assert found.split == "train"


def test_concatenate_keeps_order():
    data = Data("train[:80%]")
    found = ttt.source_statistics(
        lambda params, batch: batch["image"] * params, 2.0, data, reduce="concatenate"
    )
    np.testing.assert_allclose(found.value, 2 * data.rows)


def test_fisher_serves_as_anchor():
    """A diagonal shaped like the fast parameters goes straight into an adapter."""
    params = {"w": jnp.ones(4), "b": jnp.zeros(())}
    selection = ttt.select.paths("w")

    def fisher(params, batch):
        fast, frozen = selection.split(params)

        def loss(fast, x):
            merged = selection.merge(fast, frozen)
            return jnp.dot(merged["w"], x) + merged["b"]

        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(fast, batch["image"])
        return jax.tree.map(lambda g: (g**2).mean(axis=0), grads)

    data = Data("train")
    found = ttt.source_statistics(fisher, params, data)
    np.testing.assert_allclose(found.value["w"], (data.rows**2).mean(axis=0), rtol=1e-5)
    adapter = ttt.gradient_adapter(
        lambda p, x, k: jnp.sum(p["w"] * x), optax.sgd(0.1), select=selection, anchor=found.value
    )
    state, x = adapter.init(params), np.ones(4, np.float32)
    _, info = quickly(adapter.step, params, state, x, jax.random.key(0))
    assert info.finite


def test_is_a_pytree_that_carries_its_split():
    found = ttt.SourceStatistics({"a": jnp.ones(2)}, "train")
    doubled = jax.tree.map(lambda a: 2 * a, found)
    assert doubled.split == "train"
    np.testing.assert_array_equal(doubled.value["a"], 2 * np.ones(2))
    assert jax.tree.structure(found) != jax.tree.structure(
        ttt.SourceStatistics({"a": jnp.ones(2)}, "validation")
    )


@pytest.mark.parametrize(
    "split", ["test", "Test", "test[:50%]", "train+test", "my_test", "tests", "all", "train+all"]
)
def test_test_data_is_refused(split):
    message = r"must not come from test data.*" + repr(split).replace("+", r"\+").replace(
        "[", r"\["
    ).replace("]", r"\]")
    with pytest.raises(ValueError, match=message + ".*training split"):
        ttt.source_statistics(second_moment, None, Data(split))


@pytest.mark.parametrize("split", ["mytest", "minitest", "train+cifartest[:5]"])
def test_names_that_end_in_test_are_refused(split):
    with pytest.raises(ValueError, match="must not come from test data"):
        ttt.source_statistics(second_moment, None, Data(split))


@pytest.mark.parametrize("split", ["train", "train[10%:]", "validation", "train_latest", "small"])
def test_other_splits_are_taken(split):
    assert ttt.source_statistics(second_moment, None, Data(split)).split == split


@pytest.mark.parametrize("data", [[{"image": np.ones((2, 4))}], Data(None)])
def test_data_without_a_split_is_refused(data):
    with pytest.raises(TypeError, match=r"which split it is.*\.split.*Loader"):
        ttt.source_statistics(second_moment, None, data)


def test_empty_data():
    data = Data("train")
    data.batches = []
    with pytest.raises(ValueError, match="at least one batch; 'train' is empty"):
        ttt.source_statistics(second_moment, None, data)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'mean' or 'concatenate', got 'sum'"):
        ttt.source_statistics(second_moment, None, Data("train"), reduce="sum")

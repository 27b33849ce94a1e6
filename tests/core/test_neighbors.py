"""Neighbors by brute force in NumPy; adapting together with them against sums written out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, neighbors, select

from . import models
from .compiling import quickly

RNG = np.random.default_rng(0)
BANK = (RNG.normal(size=(53, 5)) + 3).astype(np.float32)
QUERIES = (RNG.normal(size=(7, 5)) + 3).astype(np.float32)
PARAMS = models.make_params()
POOL = models.make_images(53, seed=4)
IMAGES = models.make_images(7)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(7))


def by_brute_force(query, bank, k, metric):
    """Distances one by one in float64; of equal ones the first."""
    query, bank = query.astype(np.float64), bank.astype(np.float64)
    if metric == "cosine":
        distances = [-(query @ row) / np.sqrt((query @ query) * (row @ row)) for row in bank]
    else:
        distances = [np.square(query - row).sum() for row in bank]
    return np.argsort(distances, kind="stable")[:k]


def raises(*words):
    return pytest.raises(ValueError, match=r"(?s)" + ".*".join(words))


class TestNearest:
    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    @pytest.mark.parametrize("k", [1, 4, 53])
    def test_by_brute_force(self, metric, k):
        def together_and_alone(queries):
            find = functools.partial(neighbors.nearest, bank=BANK, k=k, metric=metric)
            return find(queries), jax.lax.map(find, queries)

        found, alone = quickly(together_and_alone, QUERIES)
        assert found.shape == (7, k) and found.dtype == jnp.int32
        for query, places in zip(QUERIES, found, strict=True):
            np.testing.assert_array_equal(places, by_brute_force(query, BANK, k, metric))
        np.testing.assert_array_equal(found, alone)

    def test_the_metrics_differ(self):
        rows = np.array([[9.0, 9.0], [1.0, 0.5], [-1.0, -1.0]], np.float32)
        query = np.array([1.0, 1.0], np.float32)
        assert neighbors.nearest(query, rows, 3).tolist() == [0, 1, 2]
        assert neighbors.nearest(query, rows, 3, metric="euclidean").tolist() == [1, 2, 0]

    def test_a_common_offset_does_not_blur_distances(self):
        """Squares near 1e8 have a spacing of 8; the distances here differ by less than 1."""
        far = BANK + np.float32(1e4)
        query = far[11] + np.float32(0.01)
        found = neighbors.nearest(query, far, 5, metric="euclidean")
        np.testing.assert_array_equal(found, by_brute_force(query, far, 5, "euclidean"))

    def test_equal_rows_and_rows_of_zeros(self):
        rows = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], np.float32)
        assert neighbors.nearest(np.array([1.0, 0.0]), rows, 4).tolist() == [1, 2, 0, 3]

    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_damaged_row_is_nobodys_neighbor(self, metric, bad):
        rows = BANK.copy()
        rows[3, 1] = bad
        others = np.delete(np.arange(len(BANK)), 3)
        find = functools.partial(neighbors.nearest, k=len(rows), metric=metric)
        found = quickly(find, QUERIES, rows)
        for query, places in zip(QUERIES, found[:, :5], strict=True):
            expected = others[by_brute_force(query, BANK[others], 5, metric)]
            np.testing.assert_array_equal(places, expected)
        assert (found[:, -1] == 3).all()


def moved_by(k, rate=0.1, metric="cosine"):
    """One step of ``mean over instance and neighbors of (w . x)^2`` on plain vectors."""
    adapter = ttt.gradient_adapter(
        losses.over_batch(lambda w, x, key: jnp.square(w @ x)),
        optax.sgd(rate),
        select=select.everything(),
    )
    find = neighbors.finder(lambda w, x: x, BANK, BANK, k=k, metric=metric)
    return ttt.episodic(neighbors.with_neighbors(adapter, find), lambda w, x: w, num_steps=1)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_step_is_on_the_instance_and_its_neighbors(metric):
    weights = np.array([0.1, -0.2, 0.3, 0.05, -0.1], np.float32)
    found, info = quickly(ttt.batched(moved_by(2, metric=metric)), weights, QUERIES, KEYS)
    for x, moved, loss in zip(QUERIES, found, info.loss, strict=True):
        rows = np.stack([x, *BANK[by_brute_force(x, BANK, 2, metric)]])
        products = rows @ weights
        np.testing.assert_allclose(loss, [np.square(products).mean()], rtol=1e-5)
        gradient = (2 * products[:, None] * rows).mean(axis=0)
        np.testing.assert_allclose(moved, weights - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def rotation_program(num_steps, **options):
    """``(pool, bank, params, xs, keys) -> (logits, info)``; pool and bank are arguments."""
    loss = losses.rotation(models.turn, batch=True)
    adapter = ttt.gradient_adapter(loss, optax.sgd(0.1), select=select.norm_affine())

    def run(pool, bank, params, xs, keys):
        find = neighbors.finder(models.features, pool, bank, k=3)
        both = neighbors.with_neighbors(adapter, find)
        predict = ttt.episodic(both, ttt.unbatched(models.classify), num_steps=num_steps)
        return ttt.batched(predict, **options)(params, xs, keys)

    return run


def test_keeps_the_promises_of_the_library():
    loss = losses.rotation(models.turn, batch=True, augment=models.jitter)
    adapter = ttt.gradient_adapter(loss, optax.sgd(0.1, momentum=0.9), select=select.norm_affine())
    find = neighbors.finder(models.features, POOL, models.features(PARAMS, POOL), k=3)

    def measure(params, xs, keys):
        return ttt.audit.adapter_differences(
            neighbors.with_neighbors(adapter, find),
            ttt.unbatched(models.classify),
            params,
            xs,
            keys,
            num_steps=1,
        )

    found = quickly(measure, PARAMS, IMAGES[:5], KEYS[:5])
    ttt.audit.require(ttt.audit.findings(found))


def test_neighbors_are_those_of_the_pristine_model():
    """A large step turns the features around; the second step is given the same neighbors."""
    seen = []

    def find(weights, x):
        seen.append(np.asarray(weights))
        return BANK[:2]

    adapter = ttt.gradient_adapter(
        losses.over_batch(lambda w, x, key: jnp.square(w @ x)),
        optax.sgd(10.0),
        select=select.everything(),
    )
    both, weights = neighbors.with_neighbors(adapter, find), jnp.ones(5)
    state, _ = both.step(weights, both.init(weights), QUERIES[0], KEYS[0])
    assert (state.fast != weights).all()
    both.step(weights, state, QUERIES[0], KEYS[0])
    np.testing.assert_array_equal(seen, np.ones((2, 5)))


@pytest.fixture(scope="module")
def compiled():
    bank = models.features(PARAMS, POOL)
    return jax.jit(rotation_program(4)).lower(POOL, bank, PARAMS, IMAGES, KEYS).compile()


@pytest.mark.cpu
class TestCompiled:
    def test_the_pool_is_shared(self, compiled):
        """No array holds the pool once per instance, not even flattened."""
        shapes = re.findall(r"\[([\d,]+)\]", compiled.as_text())
        sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}
        assert POOL.size in sizes
        assert not any(size >= 7 * POOL.size for size in sizes)
        assert compiled.memory_analysis().temp_size_in_bytes < 7 * POOL.nbytes

    def test_four_steps_search_once(self, compiled):
        searches = re.findall(r"= f32\[7,53\]\S* dot\(", compiled.as_text())
        assert len(searches) == 1


@pytest.mark.cpu
def test_over_a_mesh():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arguments = (POOL, quickly(models.features, PARAMS, POOL), PARAMS, IMAGES, KEYS)
    one, _ = quickly(rotation_program(1), *arguments)
    four, _ = quickly(rotation_program(1, mesh=mesh), *arguments)
    ttt.audit.require_close(four, one)


def test_a_bank_of_source_statistics():
    class Data:
        split = "train"

        def __iter__(self):
            return iter([POOL[:50], POOL[50:]])

    bank = ttt.source_statistics(models.features, PARAMS, Data(), reduce="concatenate")
    find = neighbors.finder(
        lambda params, x: models.features(params, x["image"]), {"image": POOL}, bank, k=2
    )
    plain = neighbors.finder(models.features, POOL, models.features(PARAMS, POOL), k=2)

    def both(params, image):
        return find(params, {"image": image})["image"], plain(params, image)

    np.testing.assert_array_equal(*quickly(both, PARAMS, IMAGES[0]))


class TestErrors:
    def test_metric(self):
        with raises("metric must be one of", "cosine", "'manhattan'"):
            neighbors.nearest(QUERIES, BANK, 1, metric="manhattan")

    @pytest.mark.parametrize("k", [0, 54, 2.0])
    def test_count(self, k):
        with raises("k must be an integer from 1 to the 53 rows", str(k)):
            neighbors.nearest(QUERIES, BANK, k)

    @pytest.mark.parametrize("bank", [BANK[0], BANK[:, :4]])
    def test_widths(self, bank):
        with raises(r"\[\.\.\., D\] with a bank \[M, D\]", r"\(7, 5\)", "same model function"):
            neighbors.nearest(QUERIES, bank, 1)

    def test_pool_and_bank_of_different_lengths(self):
        with raises("one row of the bank for each instance", r"\(50,\)", r"\(53, 5\)"):
            neighbors.finder(models.features, POOL[:50], BANK, k=1)

    def test_neighbors_unlike_the_instance(self):
        adapter = ttt.gradient_adapter(
            losses.rotation(models.turn, batch=True), optax.sgd(0.1), select=select.everything()
        )
        pool = np.zeros((4, 6, 6, 1), np.uint8)
        both = neighbors.with_neighbors(adapter, lambda params, x: pool)
        with raises(
            "neighbors .* like the instance", r"uint8\[4, 6, 6, 1\]", r"float32\[6, 6, 1\]"
        ):
            both.step(PARAMS, both.init(PARAMS), IMAGES[0], KEYS[0])

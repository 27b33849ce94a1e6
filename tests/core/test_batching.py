"""Running over many instances: chunks, keys that follow ids, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, predictors, select

from . import models
from .compiling import quickly
from .streaming import rows

PARAMS = models.make_params()
KEY = jax.random.key(0)


def inputs(count):
    return models.make_images(count), ttt.sample_keys(KEY, np.arange(count))


def noisy(params, x, key):
    """A predictor whose output shows its instance and its key."""
    output = {"x": x.sum() * params, "key": jax.random.uniform(key)}
    return output, predictors.no_steps()


class TestBatched:
    @pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 100, np.int64(2)])
    def test_chunks(self, chunk_size):
        """Whatever the chunk, every instance meets its own key and the padding is gone."""
        xs, keys = inputs(5)
        outputs, info = quickly(ttt.batched(noisy, chunk_size=chunk_size), 2.0, xs, keys)
        np.testing.assert_allclose(outputs["x"], 2 * xs.sum(axis=(1, 2, 3)), rtol=1e-4)
        np.testing.assert_array_equal(outputs["key"], quickly(jax.vmap(jax.random.uniform), keys))
        assert info.loss.shape == (5, 0) and info.ok.shape == (5,)

    def test_ragged_pytrees_and_holes(self):
        xs = {"tokens": np.ones((3, 4), np.int32), "mask": np.ones((3, 4), bool), "extra": None}
        predict = ttt.source(lambda params, x: {"n": (x["tokens"] * x["mask"]).sum(), "none": None})
        for chunk_size in (None, 2):
            outputs, _ = ttt.batched(predict, chunk_size=chunk_size)({}, xs, inputs(3)[1])
            np.testing.assert_array_equal(outputs["n"], [4, 4, 4])

    def test_works_without_jit_on_numpy(self):
        xs, keys = inputs(3)
        outputs, _ = ttt.batched(noisy, chunk_size=2)(2.0, np.asarray(xs), keys)
        np.testing.assert_allclose(outputs["x"], 2 * xs.sum(axis=(1, 2, 3)), rtol=1e-4)

    def test_order_does_not_matter(self):
        """Instances and their keys permuted, predictions permuted."""
        adapter = ttt.gradient_adapter(
            losses.marginal_entropy(models.classify, models.jitter, num_views=2),
            optax.sgd(0.1),
            select=select.norm_affine(),
        )
        predict = ttt.episodic(adapter, ttt.unbatched(models.classify), num_steps=1)
        ids = np.array([11, 5, 7, 2])
        order = np.array([2, 0, 3, 1])
        xs, places = models.make_images(4), np.stack([np.arange(4), order])

        def both(xs, keys):
            batched = ttt.batched(predict)
            return jax.lax.map(lambda pair: batched(PARAMS, *pair), (xs, keys))

        keys = jnp.stack([ttt.sample_keys(KEY, ids[at]) for at in places])
        results = quickly(both, xs[places], keys)
        ttt.audit.require_close(rows(results, 1), rows(rows(results, 0), order))


class TestUnbatched:
    def test_adds_and_removes_the_axis(self):
        def apply(params, inputs, keep):
            assert inputs["a"].shape == (1, 3) and keep.shape == (2,)
            return {"sum": inputs["a"].sum(axis=1) * params, "rows": inputs["b"]}

        output = ttt.unbatched(apply)(2.0, {"a": np.ones(3), "b": 5.0}, np.zeros(2))
        assert output["sum"] == 6.0 and output["rows"].shape == ()


class TestSampleKeys:
    def test_keys_follow_ids(self):
        keys = ttt.sample_keys(KEY, [3, 1, 3, 2**32 - 1])
        data = np.asarray(jax.random.key_data(keys))
        np.testing.assert_array_equal(data[0], data[2])
        assert len({tuple(row) for row in data}) == 3
        np.testing.assert_array_equal(data[1], jax.random.key_data(jax.random.fold_in(KEY, 1)))

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
    def test_integer_types_agree(self, dtype):
        keys = ttt.sample_keys(KEY, np.array([0, 7], dtype))
        expected = ttt.sample_keys(KEY, jnp.array([0, 7]))
        assert (keys == expected).all()

    def test_under_jit(self):
        keys = jax.jit(lambda ids: ttt.sample_keys(KEY, ids))(jnp.array([4, 5]))
        assert (keys == ttt.sample_keys(KEY, [4, 5])).all()

    @pytest.mark.parametrize("ids", [[-1, 2], [0, 2**32]])
    def test_range(self, ids):
        with pytest.raises(ValueError, match=rf"\[0, 2\*\*32\); got.*{ids[0]} to {ids[1]}.*hash"):
            ttt.sample_keys(KEY, ids)

    @pytest.mark.parametrize("ids", [3, [[1, 2]], [0.5, 1.0], ["a"]])
    def test_vector_of_integers(self, ids):
        with pytest.raises(ValueError, match="vector of integers, one per instance; got shape"):
            ttt.sample_keys(KEY, ids)


class TestErrors:
    RUN = staticmethod(ttt.batched(noisy))

    def test_unequal_axes(self):
        xs = {"image": np.ones((3, 2)), "mask": np.ones((2, 2))}
        with pytest.raises(ValueError, match=r"same leading.*'image': \(3, 2\).*'mask': \(2, 2\)"):
            self.RUN(1.0, xs, inputs(3)[1])

    def test_an_instance_without_the_axis(self):
        with pytest.raises(ValueError, match=r"same leading sample axis.*'xs': \(\)"):
            self.RUN(1.0, 3.0, inputs(3)[1])

    def test_no_instance(self):
        with pytest.raises(ValueError, match="at least one instance; got an empty batch"):
            self.RUN(1.0, np.ones((0, 2)), jax.random.split(KEY, 0))

    def test_one_key_for_all(self):
        with pytest.raises(
            ValueError, match=r"one key per instance.*\(3,\); got \(\).*sample_keys"
        ):
            self.RUN(1.0, np.ones((3, 2)), KEY)

    def test_too_few_keys(self):
        with pytest.raises(ValueError, match=r"shape \(3,\); got \(2,\)"):
            self.RUN(1.0, np.ones((3, 2)), inputs(2)[1])

    def test_raw_keys(self):
        raw = jax.random.key_data(inputs(3)[1])
        with pytest.raises(ValueError, match=r"typed keys \[N\]; got uint32.*jax\.random\.key\("):
            self.RUN(1.0, np.ones((3, 2)), raw)

    def test_no_keys(self):
        with pytest.raises(ValueError, match=r"typed keys.*got NoneType"):
            self.RUN(1.0, np.ones((3, 2)), None)

    @pytest.mark.parametrize("chunk_size", [0, -2, 2.5, True])
    def test_chunk_size(self, chunk_size):
        with pytest.raises(ValueError, match=f"at least 1, got {chunk_size}"):
            ttt.batched(noisy, chunk_size=chunk_size)

"""A count is that of all leaves: unequal leading axes are refused, whichever leaf comes first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from ttt_jax import losses, methods

from . import models

KEY = jax.random.key(0)
# The leaf that comes first in the tree has one row.
UNEVEN = {"a_scale": jnp.ones((1, 1)), "x": jnp.ones((4, 2))}
EVEN = {"a_scale": jnp.ones((4, 1)), "x": jnp.ones((4, 2))}


class Data:
    split = "train"

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def logits(params, inputs):
    return inputs["x"] * params


def image(params, inputs):
    return models.classify(params, inputs["x"])


def one(params, x, key):
    return jnp.sum(x["x"]) * params


def shift(x, key):
    return x


COUNTED = {
    "source_statistics": lambda x: ttt.source_statistics(
        lambda params, batch: batch["x"].mean(0), None, Data(x)
    ),
    "over_batch": lambda x: losses.over_batch(one)(1.0, x, KEY),
    "entropy": lambda x: losses.entropy(logits, batch=True)(1.0, x, KEY),
    "marginal_entropy": lambda x: losses.marginal_entropy(logits, shift, num_views=2, batch=True)(
        1.0, x, KEY
    ),
    "fisher": lambda x: losses.fisher_diagonal(logits, select=ttt.select.everything(), batch=True)(
        jnp.float32(1.0), x
    ),
    "rpl": lambda x: ttt.episode(methods.rpl(logits, select=ttt.select.everything()))(
        jnp.float32(1.0), x, KEY
    ),
    "batched": lambda x: ttt.batched(ttt.source(lambda params, x: x["x"]))(
        1.0, x, ttt.sample_keys(KEY, np.arange(4))
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_unequal_leading_axes_are_refused(name):
    with pytest.raises(ValueError, match=r"same leading .*axis on every leaf.*'a_scale': \(1, 1\)"):
        COUNTED[name](UNEVEN)
    COUNTED[name](EVEN)


def test_batches_weigh_as_many_instances_as_they_have():
    data = Data({"a": jnp.ones((4, 1)), "x": jnp.ones((4, 2))}, {"a": 0, "x": 3 * jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"source_statistics: a batch .*'a': \(\)"):
        ttt.source_statistics(lambda params, batch: batch["x"].mean(0), None, data)
    data.batches[1]["a"] = jnp.ones((2, 1))
    found = ttt.source_statistics(lambda params, batch: batch["x"].mean(0), None, data)
    np.testing.assert_allclose(found.value, 10 / 6, rtol=1e-6)


def test_text_is_not_counted():
    batch = {"domain": np.array(["snow"]), "name": "set", "x": np.ones((4, 2))}
    found = ttt.source_statistics(lambda params, batch: batch["x"].mean(0), None, Data(batch))
    np.testing.assert_array_equal(found.value, [1, 1])

"""The NNX modules of the TTT layers: those of Linen, with one tree of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ttt_jax as ttt
from tests.core.compiling import quickly
from tests.layers import test_linen
from tests.layers.test_ttt import to
from ttt_jax import layers

KINDS = {"linear": layers.nnx.TTTLinear, "mlp": layers.nnx.TTTMLP}
SIZES = {"width": 8, "heads": 2, "head_size": 6, "chunk_size": 4}


@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_have_one_tree_of_parameters(kind, backbone):
    """And the same outputs, of whole, packed and padded sequences and from a cache."""
    linen = test_linen.module(kind, backbone, jnp.float32)
    params = to(np.float32, test_linen.parameters(kind, backbone))
    net = KINDS[kind](**SIZES, backbone=backbone, rngs=nnx.Rngs(0))
    call, own = ttt.models.from_nnx(net)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, dict(params))
    graph, state = nnx.split(net)
    for path, variable in nnx.to_flat_state(state):
        leaf = params["params"]
        for part in path:
            leaf = leaf[part]
        variable[...] = leaf
    x = to(np.float32, test_linen.tokens())
    marks = np.repeat([[0, 1], [2, 3]], 11, axis=1).astype(np.int32)
    mask = np.arange(22)[None] < np.array([[3], [22]])

    def every(apply, empty):
        cache = empty(2)
        return (
            apply(x),
            apply(x, segments=marks),
            apply(x, mask=mask),
            apply(x, cache=cache, mask=mask),
        )

    def in_nnx(state):
        model = nnx.merge(graph, state)
        return every(model, model.empty_cache)

    def in_linen(p):
        def empty(batch):
            return linen.apply(p, batch, method="empty_cache")

        return every(lambda *a, **more: linen.apply(p, *a, **more), empty)

    actual, due = quickly(lambda *a: (in_nnx(a[0]), in_linen(a[1])), state, params)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(quickly(call, params, x), due[0], rtol=1e-5, atol=1e-5)


def test_initial_weights_are_those_of_linen():
    net = layers.nnx.TTTMLP(32, 2, rngs=nnx.Rngs(0))
    for name in ("weight_1", "weight_2"):
        np.testing.assert_allclose(getattr(net, name)[...].std(), 0.02, rtol=0.1)
    np.testing.assert_allclose(net.value.kernel[...].std(), 0.02, rtol=0.1)
    assert not net.bias_1[...].any() and (net.gamma[...] == 1).all()
    assert net.base_rate == 0.1


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="head_size must be even"):
        layers.nnx.TTTLinear(8, 2, rngs=nnx.Rngs(0), head_size=3)

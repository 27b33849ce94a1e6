"""Causal attention under a window: against NumPy, and the call that cuDNN is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels.attention.masked import attend_masked

TOKENS = 11


def drawn(heads, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, TOKENS, heads, 8)), jnp.float32)


@pytest.mark.parametrize("window", [1, 4, 11, 50, None])
def test_a_token_sees_its_window(window):
    query, key, value = drawn(4, 0), drawn(2, 1), drawn(2, 2)
    out = attend_masked(query, key, value, None, form="xla", window=window)
    for token in range(TOKENS):
        first = 0 if window is None else max(token - window + 1, 0)
        for head in range(4):
            seen = np.asarray(key)[:, first : token + 1, head // 2]
            scores = np.einsum("nd,nsd->ns", np.asarray(query)[:, token, head], seen) / 8**0.5
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            due = np.einsum(
                "ns,nsd->nd", weights, np.asarray(value)[:, first : token + 1, head // 2]
            )
            np.testing.assert_allclose(out[:, token, head], due, atol=1e-5)


def test_cudnn_is_asked_for_the_same_window(monkeypatch):
    """JAX's own form of the arguments stands in for the card."""
    given, plain = {}, jax.nn.dot_product_attention

    def attention(*arrays, implementation, **options):
        given.update(options, implementation=implementation)
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    query, key, value = (drawn(2, seed)[:, :10] for seed in range(3))
    fused = attend_masked(query, key, value, None, form="fused", window=4)
    due = attend_masked(query, key, value, None, form="xla", window=4)
    np.testing.assert_allclose(fused, due, atol=1e-5)
    # A mask, or its bias, would be as large as the scores.
    assert given["mask"] is None and given["is_causal"] and given["implementation"] == "cudnn"


def test_a_window_beside_a_mask_is_refused():
    x = drawn(2, 0)
    with pytest.raises(ValueError, match="a window or a mask, got both"):
        attend_masked(x, x, x, jnp.ones((1, TOKENS, TOKENS), bool), form="xla", window=3)
    with pytest.raises(ValueError, match="window must be an integer of at least 1; got 0"):
        attend_masked(x, x, x, None, form="xla", window=0)

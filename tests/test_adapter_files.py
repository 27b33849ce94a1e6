"""Adapters on disk: the low-rank leaves alone, with their optimizer, and the base they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import small_reader
from ttt_jax import checkpoint, losses, select

PARAMS = small_reader.draw_params()
BASE = select.lora().split(PARAMS)[1]
TOKENS = jnp.array([1, 2, 3, 4, 5])
KEY = jax.random.key(0)
ADAPTER = ttt.gradient_adapter(
    losses.next_token(small_reader.model), optax.adam(0.05), select=select.lora()
)
step = jax.jit(ADAPTER.step)


@pytest.fixture(scope="module")
def state():
    state = ADAPTER.init(PARAMS)
    for _ in range(2):
        state, _ = step(PARAMS, state, TOKENS, KEY)
    return state


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "document_7"
    checkpoint.save_adapter(path, state, base=BASE, metadata={"alpha": 8.0})
    return path


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_one_step_after_loading_is_one_step_on(state, saved):
    held = checkpoint.load_adapter(saved, base=BASE, like=ADAPTER.init(PARAMS))
    assert_equal(held.params, state)
    assert_equal(step(PARAMS, held.params, TOKENS, KEY), step(PARAMS, state, TOKENS, KEY))


def test_it_has_no_leaf_of_the_base(saved):
    held = checkpoint.load_adapter(saved, base=checkpoint.fingerprint(BASE))
    assert not any("embedding" in path for path in held.leaves)
    held.require(alpha=8.0)
    with pytest.raises(checkpoint.CheckpointError, match="alpha"):
        held.require(alpha=16.0)


def test_another_base_is_refused(state, saved):
    other = jax.tree.map(lambda leaf: leaf, BASE)
    other["params"]["query"] = other["params"]["query"].at[0, 0].add(1e-6)
    with pytest.raises(checkpoint.CheckpointError, match="made on the base with fingerprint"):
        checkpoint.load_adapter(saved, base=other)
    # With the adapter's own leaves in it, what is given is no base.
    with pytest.raises(checkpoint.CheckpointError, match=r"without the adapter's leaves"):
        checkpoint.load_adapter(saved, base=ADAPTER.merge(PARAMS, state))


def test_the_fast_leaves_alone_are_an_adapter_too(state, tmp_path):
    checkpoint.save_adapter(tmp_path / "fast", state.fast, base=checkpoint.fingerprint(BASE))
    held = checkpoint.load_adapter(tmp_path / "fast", base=BASE)
    assert_equal(held.params, state.fast)
    model = ttt.adapted(
        ttt.source(lambda params, x: small_reader.model(params, x[None])[0]), select=select.lora()
    )
    served, _ = model(PARAMS, (held.params, TOKENS), KEY)
    due = small_reader.model(ADAPTER.merge(PARAMS, state), TOKENS[None])[0]
    np.testing.assert_array_equal(served, due)


def test_what_is_no_adapter(state, tmp_path):
    checkpoint.save(tmp_path / "plain", PARAMS)
    with pytest.raises(checkpoint.CheckpointError, match="names no base"):
        checkpoint.load_adapter(tmp_path / "plain", base=BASE)
    with pytest.raises(checkpoint.CheckpointError, match="choose another name"):
        checkpoint.save_adapter(tmp_path / "x", state.fast, base=BASE, metadata={"base": "mine"})
    assert not (tmp_path / "x").exists()
    with pytest.raises(checkpoint.CheckpointError, match=r"64 hex digits; got 'smollm2'"):
        checkpoint.save_adapter(tmp_path / "x", state.fast, base="smollm2")

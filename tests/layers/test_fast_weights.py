"""The fast-weight layer: its arguments one by one, what goes through all of them, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from tests.core.compiling import quickly
from tests.layers.test_ttt import relative
from tests.methods.test_jax_settings import SETTINGS
from ttt_jax import layers
from ttt_jax.layers import inner_losses, inner_optimizers, memories, retentions

TOKENS, WIDTH, VALUES, CHUNK = 14, 4, 3, 4
RANDOM = np.random.default_rng(0)
Q, K = RANDOM.normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
V = RANDOM.normal(size=(TOKENS, VALUES)).astype(np.float32)
GATE, RETAIN, MOMENTUM = (
    RANDOM.uniform(0.05, 0.3, size=(3, TOKENS)) + np.array([[0.0], [0.6], [0.5]])
).astype(np.float32)
WEIGHT = (0.3 * RANDOM.normal(size=(WIDTH, VALUES))).astype(np.float32)
LINEAR = memories.linear()
# Momentum and decay in chunks, as Titans has them, which leave a rest of two tokens.
RULE = {
    "memory": LINEAR,
    "retention": retentions.decay(first=False),
    "optimizer": optax.chain(inner_optimizers.momentum(), optax.sgd(1.0)),
    "chunk_size": CHUNK,
}
PARTS = {name: RULE[name] for name in ("retention", "optimizer")}
RATES = layers.Rates(GATE, RETAIN, MOMENTUM)


def titans(q, k, v, rates, weights, **changes):
    state = layers.fast_state(weights, **PARTS)
    return layers.fast_weight(q, k, v, rates, state, **{**RULE, **changes})


def by_chunk(q, k, v, rates, weights, **rule):
    return layers.fast_weight(
        q, k, v, rates, layers.fast_state(weights), memory=LINEAR, step="chunk", **rule
    )


def test_two_parts_are_the_whole():
    def both(rows, rates, weights):
        whole = titans(*rows, rates, weights)
        head, tail = (
            jax.tree.map(lambda leaf, part=part: leaf[part], (rows, rates))
            for part in (slice(8), slice(8, None))
        )
        first, middle = titans(*head[0], head[1], weights)
        second, last = layers.fast_weight(*tail[0], tail[1], middle, **RULE)
        return whole, (jnp.concatenate([first, second]), last)

    whole, parts = quickly(both, (Q, K, V), RATES, (WEIGHT,))
    for actual, due in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(actual, due, rtol=1e-5, atol=1e-6)


def test_a_window_goes_on_from_part_to_part():
    """And before the first token there is nothing in it."""
    rates, rule = layers.Rates(GATE), {"memory": LINEAR, "window": 3}

    def parts(step):
        state, outs = layers.fast_state((WEIGHT,)), []
        for part in (slice(4), slice(4, 12), slice(12, None)):
            rows = (leaf[part] for leaf in (Q, K, V))
            out, state = layers.fast_weight(
                *rows, layers.Rates(GATE[part]), state, **rule, step=step, chunk_size=2
            )
            outs.append(out)
        return jnp.concatenate(outs), state

    for step in ("token", "chunk"):
        actual = quickly(lambda step=step: parts(step))
        due = quickly(
            lambda step=step: layers.fast_weight(
                Q, K, V, rates, layers.fast_state((WEIGHT,)), **rule, step=step, chunk_size=2
            )
        )
        for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(due), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="window must be 3, that of the state; got 2"):
        layers.fast_weight(Q, K, V, rates, actual[1], memory=LINEAR, window=2)


@pytest.mark.parametrize("reads", ["before", "after"])
def test_no_token_sees_a_later_one(reads):
    """Nor its key, value, gate or rates."""
    run = jax.jit(functools.partial(titans, reads=reads))
    given = (Q, K, V, RATES, (WEIGHT,))
    due = np.asarray(run(*given)[0])
    for token in (2, 4, 9):
        for index in range(6):
            leaves, structure = jax.tree.flatten(given)
            leaves[index] = leaves[index].copy()
            leaves[index][token] += 0.5
            actual = np.asarray(run(*jax.tree.unflatten(structure, leaves))[0])
            np.testing.assert_array_equal(actual[:token], due[:token])
            if reads == "after" or index == 0:
                assert (actual[token] != due[token]).any(), index
            else:
                end = (token // CHUNK + 1) * CHUNK
                np.testing.assert_array_equal(actual[:end], due[:end])
                assert (actual[end:] != due[end:]).any(), index


def test_less_than_a_chunk_is_read_and_not_learned():
    rates = jax.tree.map(lambda leaf: leaf[:3], RATES)
    whole, _ = quickly(titans, Q, K, V, RATES, (WEIGHT,))
    out, state = quickly(titans, Q[:3], K[:3], V[:3], rates, (WEIGHT,))
    np.testing.assert_allclose(out, whole[:3], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.weights[0], WEIGHT)
    assert not jax.tree.leaves(state.optimizer)[0].any()


OPTIMIZERS = {
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0)),
    "orthogonal": optax.chain(inner_optimizers.orthogonal(), optax.sgd(0.1)),
    "normalized": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("step", ["token", "chunk"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_a_rest_are_those_of_whole_chunks(name, step):
    """An optimizer that takes a norm has no derivative at a step of zero, so there must be none."""
    rule = {"memory": LINEAR, "optimizer": OPTIMIZERS[name], "reads": "before", "step": step}

    def total(gate, weight, length, remat=0):
        state = layers.fast_state((weight,), optimizer=OPTIMIZERS[name])
        rows = (leaf[:length].astype(float) for leaf in (Q, K, V))
        rates = layers.Rates(gate[:length])
        out, _ = layers.fast_weight(*rows, rates, state, chunk_size=CHUNK, remat=remat, **rule)
        return jnp.sin(out[:9]).sum()

    def gradients(length, remat=0):
        given = GATE.astype(float), WEIGHT.astype(float)
        return jax.grad(lambda *given: total(*given, length, remat), (0, 1))(*given)

    with jax.enable_x64(True):
        whole, rest, grouped = quickly(lambda: (gradients(12), gradients(9), gradients(9, 2)))
    assert jnp.abs(whole[1]).max() > 1e-3
    for made in (rest, grouped):
        for leaf, due in zip(made, whole, strict=True):
            np.testing.assert_allclose(leaf, due, rtol=1e-7, atol=1e-9)


def test_kept_states_change_no_gradient():
    def gradients(remat):
        def loss(*a):
            return (titans(*a, remat=remat)[0] ** 2).sum()

        return quickly(jax.grad(loss, argnums=range(5)), Q, K, V, RATES, (WEIGHT,))

    due = gradients(0)
    for remat in (1, 3):
        assert relative(gradients(remat), jax.tree.map(np.float64, due)) < 1e-5


@pytest.mark.parametrize(("scaled", "window"), [(False, 1), (True, 1), (False, 3)])
def test_one_step_of_a_chunk(scaled, window):
    """All of its tokens read what the whole chunk has changed, or a part of it."""
    scale = np.array([0.3, 0.7, 0.2, 0.9], np.float32) if scaled else None
    out, state = quickly(
        lambda *a: by_chunk(*a, chunk_size=CHUNK, window=window),
        Q, K, V, layers.Rates(GATE, scale=scale), (WEIGHT,),
    )  # fmt: skip
    weight, due = WEIGHT.astype(np.float64), []
    for first in range(0, TOKENS, CHUNK):
        own = slice(max(first - window + 1, 0), first + CHUNK)
        change = -(K[own] * GATE[own, None]).T @ (K[own] @ weight - V[own])
        parts = scale if scaled else np.ones(CHUNK)
        due += [q @ (weight + p * change) for q, p in zip(Q[first:], parts, strict=False)]
        if first + CHUNK <= TOKENS:
            weight = weight + parts[-1] * change
    assert relative(out, np.array(due)) < 1e-5
    assert relative(state.weights[0], weight) < 1e-5


def test_a_decay_before_the_gradient_of_a_chunk():
    fade = np.array([0.5, 0.8, 0.9, 0.7], np.float32)
    out, state = quickly(
        lambda *a: by_chunk(*a, retention=retentions.decay(), reads="before", chunk_size=CHUNK),
        Q, K, V, layers.Rates(GATE, fade), (WEIGHT,),
    )  # fmt: skip
    weight, due = WEIGHT.astype(np.float64), []
    for number, first in enumerate(range(0, TOKENS, CHUNK)):
        own = slice(first, first + CHUNK)
        due += list(Q[own] @ weight)
        if first + CHUNK <= TOKENS:
            weight = fade[number] * weight
            weight = weight - (K[own] * GATE[own, None]).T @ (K[own] @ weight - V[own])
    assert relative(out, np.array(due)) < 1e-5
    assert relative(state.weights[0], weight) < 1e-5


def test_an_elastic_retention_draws_back_to_the_beginning():
    back = retentions.elastic()
    out, state = quickly(
        lambda *a: layers.fast_weight(
            *a[:4], layers.fast_state(a[4], retention=back), memory=LINEAR, retention=back
        ),
        Q, K, V, layers.Rates(GATE, RETAIN), (WEIGHT,),
    )  # fmt: skip
    weight, due = WEIGHT.astype(np.float64), []
    for q, k, v, gate, retain in zip(Q, K, V, GATE, RETAIN, strict=True):
        step = gate * np.outer(k, k @ weight - v)
        weight = WEIGHT + retain * (weight - WEIGHT) - step
        due.append(q @ weight)
    assert relative(out, np.array(due)) < 1e-5
    assert relative(state.weights[0], weight) < 1e-5


def test_a_memory_a_loss_and_an_optimizer_of_ones_own():
    """Weights that are a mapping, a bounded loss, and Adam, whose moments are in the state."""
    memory = memories.Memory(
        lambda key, inputs, outputs: {"map": jnp.zeros((inputs, outputs))},
        lambda weights, q: jnp.tanh(q @ weights["map"]),
        lambda weights, k: jnp.tanh(k @ weights["map"]),
    )
    adam = optax.adam(0.1)

    def loss(prediction, target):
        return jnp.log1p((prediction - target) ** 2).sum()

    def layer(q, k, v, weights):
        state = layers.fast_state(weights, optimizer=adam)
        rates = layers.Rates(jnp.ones(TOKENS))
        return layers.fast_weight(q, k, v, rates, state, memory=memory, loss=loss, optimizer=adam)

    def loop(q, k, v, weights):
        state, out = adam.init(weights), []
        for t in range(TOKENS):
            made = jax.grad(lambda w, t=t: loss(jnp.tanh(k[t] @ w["map"]), v[t]))(weights)
            updates, state = adam.update(made, state, weights)
            weights = optax.apply_updates(weights, updates)
            out.append(jnp.tanh(q[t] @ weights["map"]))
        return jnp.stack(out), weights

    (out, state), due = quickly(
        lambda *a: (layer(*a), loop(*a)), Q, K, V, {"map": jnp.asarray(WEIGHT)}
    )
    assert relative((out, state.weights), jax.tree.map(np.float64, due)) < 1e-5


def test_orthogonal_updates_have_singular_values_near_one():
    optimizer = inner_optimizers.orthogonal()
    wide, tall, vector = RANDOM.normal(size=(5, 9)), RANDOM.normal(size=(9, 5)), np.ones(4)
    given = tuple(jnp.asarray(x, jnp.float32) for x in (wide, tall, vector))
    made, _ = optimizer.update(given, optimizer.init(given))
    for x, due in ((made[0], wide), (made[1], tall)):
        left, _, right = np.linalg.svd(due, full_matrices=False)
        values = np.linalg.svd(x, compute_uv=False)
        assert values.min() > 0.5 and values.max() < 1.3
        # The directions stay.
        inner = left.T @ np.asarray(x) @ right.T
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-4
    np.testing.assert_array_equal(made[2], vector)


@pytest.mark.parametrize("name", ["linear", "linear, bias", "mlp", "swiglu", "residual"])
def test_initial_weights_of_a_memory(name):
    memory = {
        "linear": lambda: memories.linear(),
        "linear, bias": lambda: memories.linear(bias=True),
        "mlp": lambda: memories.mlp(64),
        "swiglu": lambda: memories.swiglu(64),
        "residual": lambda: memories.residual(memories.mlp(64), (np.ones(32), np.ones(32))),
    }[name]()
    weights = memory.init(jax.random.key(0), 32, 32)
    for leaf in weights:
        if leaf.ndim == 2:
            np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.1)
        else:
            assert not leaf.any()
    assert memory.read(weights, jnp.ones(32)).shape == (32,)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_nothing(setting):
    due = quickly(titans, Q, K, V, RATES, (WEIGHT,))
    with SETTINGS[setting]():
        actual = quickly(lambda *a: titans(*a), Q, K, V, RATES, (WEIGHT,))
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(due), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_a_shard_map_of_the_callers_own():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), (Q, K, V, RATES))
    run = jax.vmap(titans, (0, 0, 0, 0, None))
    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(*(P("d"),) * 4, P()), out_specs=P("d"), check_vma=True
    )
    due = quickly(titans, Q, K, V, RATES, (WEIGHT,))
    actual = quickly(spread, *many, (jnp.asarray(WEIGHT),))
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(leaf[0], other, rtol=1e-5, atol=1e-6)


WRONG = {
    "reads": (dict(reads="during"), "reads must be one of ('before', 'after'); got 'during'"),
    "step": (dict(step="epoch"), "step must be one of ('token', 'chunk'); got 'epoch'"),
    "empty": (dict(q=Q[:0]), "q must have at least one token"),
    "keys": (dict(k=K[:5]), "k must have shape (14, 4), as q; got (5, 4)"),
    "gate": (dict(rates=layers.Rates(GATE[:5])), "rates.gate must have T = 14 rows"),
    "gates": (dict(rates=layers.Rates((GATE, GATE))), "laid out as the weights"),
    "retain": (dict(rates=layers.Rates(GATE, RETAIN[:4])), "rates.retain must have 14 rows"),
    "segments": (dict(segments=np.zeros(5, np.int32)), "segments must have shape (14,)"),
    "packed chunks": (
        dict(segments=np.zeros(14, np.int32), step="chunk"),
        "segments with step='chunk' need reads='before'",
    ),
    "packed rates": (
        dict(
            rates=layers.Rates(GATE, RETAIN[:7]),
            segments=np.zeros(14, np.int32),
            step="chunk",
            reads="before",
            chunk_size=2,
        ),
        "rates.retain must have 14 rows, one for each token",
    ),
    "scale": (dict(rates=layers.Rates(GATE, scale=GATE)), "rates.scale must have shape (1,)"),
    "first": (
        dict(retention=retentions.decay(), chunk_size=2),
        "retention decays before the gradient",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(case):
    changes, words = WRONG[case]
    given = {"q": Q, "k": K, "v": V, "rates": layers.Rates(GATE), "memory": LINEAR}
    with pytest.raises(ValueError) as caught:
        layers.fast_weight(**{**given, "state": layers.fast_state((WEIGHT,)), **changes})
    assert words in str(caught.value)


def test_a_state_of_another_optimizer_is_refused():
    state = layers.fast_state((WEIGHT,), optimizer=optax.adam(1.0))
    with pytest.raises(ValueError, match=r"state.optimizer must be of the layer's optimizer"):
        layers.fast_weight(Q, K, V, layers.Rates(GATE), state, memory=LINEAR)


def test_targets_that_a_loss_cannot_take_are_refused():
    with pytest.raises(TypeError, match=r"target must be a pair \(value, delta\)"):
        inner_losses.huber(V[0], V[0])
    with pytest.raises(TypeError, match=r"prediction must be that of memories\.ridge"):
        inner_losses.sums(V[0], V[0])
    with pytest.raises(ValueError, match="coefficients must be three numbers"):
        inner_optimizers.orthogonal(((1.0, 2.0),))

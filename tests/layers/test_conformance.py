"""The table of :func:`ttt_jax.layers.fast_weight`: each layer against its formula in NumPy."""

import jax
import numpy as np
import optax
import pytest

from tests.core.compiling import quickly
from tests.layers import formulas
from tests.layers.test_ttt import relative
from ttt_jax import layers
from ttt_jax.layers import inner_losses, inner_optimizers, memories, retentions

TOKENS, WIDTH, VALUES, HIDDEN, CHUNK = 14, 6, 5, 7, 4
RANDOM = np.random.default_rng(0)
Q, K = RANDOM.normal(size=(2, TOKENS, WIDTH))
K = K / np.linalg.norm(K, axis=-1, keepdims=True)
V = RANDOM.normal(size=(TOKENS, VALUES))
GATE, RETAIN, MOMENTUM = RANDOM.uniform((0.05, 0.6, 0.3), (0.5, 1.0, 0.9), size=(TOKENS, 3)).T
CHANNELS = RANDOM.uniform(0.6, 1.0, size=(TOKENS, WIDTH))
MATRIX = 0.3 * RANDOM.normal(size=(WIDTH, VALUES))
TWO = 0.5 * RANDOM.normal(size=(WIDTH, HIDDEN)), 0.5 * RANDOM.normal(size=(HIDDEN, VALUES))
THREE = (TWO[0], TWO[1], 0.5 * RANDOM.normal(size=(WIDTH, HIDDEN)))
DELTA = RANDOM.uniform(0.2, 0.8, size=TOKENS)
# Numbers that float32 has: the memory of a row is made outside of 64 bits.
PENALTY = RANDOM.uniform(0.3, 1.0, size=WIDTH).astype(np.float32)
ROWS = (Q, K, V)


def linear_attention():
    state, out = MATRIX, []
    for q, k, v in zip(*ROWS, strict=True):
        state = state + np.outer(k, v)
        out.append(q @ state)
    return out, (state,)


def delta_rule(retain=None):
    """The decay, of all or of each channel of the key, comes before the error."""
    state, out = MATRIX, []
    for t, (q, k, v) in enumerate(zip(*ROWS, strict=True)):
        if retain is not None:
            state = np.broadcast_to(retain[t], (WIDTH,))[:, None] * state
        state = state + GATE[t] * np.outer(k, v - k @ state)
        out.append(q @ state)
    return out, (state,)


def mesa():
    keys, values, out = np.zeros((WIDTH, WIDTH)), np.zeros((WIDTH, VALUES)), []
    for t, (q, k, v) in enumerate(zip(*ROWS, strict=True)):
        keys = RETAIN[t] * keys + GATE[t] * np.outer(k, k)
        values = RETAIN[t] * values + GATE[t] * np.outer(k, v)
        out.append(np.linalg.solve(keys + np.diag(PENALTY), q) @ values)
    return out, (keys, values)


def two_layers(x, weights):
    return formulas.gelu(x @ weights[0]) @ weights[1]


def of_two_layers(k, outer, weights):
    """From the gradient with respect to the output to those of both weights."""
    hidden = k @ weights[0]
    inner = (weights[1] @ outer) * formulas.gelu_derivative(hidden)
    return np.outer(k, inner), np.outer(formulas.gelu(hidden), outer)


def titans():
    """Surprise with momentum; weights fade; what is read are those of the chunks before."""
    weights, surprise, out = TWO, (0.0, 0.0), []
    for first in range(0, TOKENS, CHUNK):
        start = weights
        for t in range(first, min(first + CHUNK, TOKENS)):
            out.append(two_layers(Q[t], start))
            made = of_two_layers(K[t], two_layers(K[t], start) - V[t], start)
            surprise = [MOMENTUM[t] * s - GATE[t] * g for s, g in zip(surprise, made, strict=True)]
            weights = [RETAIN[t] * w + s for w, s in zip(weights, surprise, strict=True)]
        done = start if first + CHUNK > TOKENS else weights
    return out, done


def by_steps(start, link, outer_gradient, retain):
    """Gradients at the beginning of a chunk; a step for each token, which reads after it."""
    state, out = start, []
    for first in range(0, TOKENS, CHUNK):
        begun = state
        for t in range(first, min(first + CHUNK, TOKENS)):
            weights = link(begun)
            made = outer_gradient(t, weights)
            state = [retain[t] * a - GATE[t] * g for a, g in zip(state, made, strict=True)]
            out.append((t, link(state)))
        done = begun if first + CHUNK > TOKENS else state
    return out, done


def moneta():
    def link(state):
        return [a / np.linalg.norm(a.ravel(), 4) ** 2 for a in state]

    def gradient(t, weights):
        error = two_layers(K[t], weights) - V[t]
        return of_two_layers(K[t], 3 * error * np.abs(error), weights)

    out, state = by_steps(TWO, link, gradient, RETAIN)
    return [two_layers(Q[t], w) for t, w in out], state


def yaad():
    def gradient(t, weights):
        error = two_layers(K[t], weights) - V[t]
        return of_two_layers(K[t], np.clip(error, -DELTA[t], DELTA[t]), weights)

    out, state = by_steps(TWO, lambda state: state, gradient, RETAIN)
    return [two_layers(Q[t], w) for t, w in out], state


def memora():
    """On the weights themselves, of both layers: W <- 3 softmax(alpha log W - eta grad)."""

    def of_sum_three(grown):
        return 3 * grown / grown.sum(-1, keepdims=True)

    weights, out = [of_sum_three(np.exp(leaf)) for leaf in TWO], []
    for first in range(0, TOKENS, CHUNK):
        start = weights
        for t in range(first, min(first + CHUNK, TOKENS)):
            made = of_two_layers(K[t], two_layers(K[t], start) - V[t], start)
            weights = [
                of_sum_three(w ** RETAIN[t] * np.exp(-GATE[t] * g))
                for w, g in zip(weights, made, strict=True)
            ]
            out.append(two_layers(Q[t], weights))
        done = start if first + CHUNK > TOKENS else weights
    return out, done


def orthogonal(x):
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = values / np.linalg.norm(values)
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    return left @ np.diag(values) @ right


def omega(momentum=None):
    """The loss of a step is that of the last three tokens, at the beginning of a chunk."""
    weights, held, out = TWO, [0.0, 0.0], []
    for first in range(0, TOKENS, CHUNK):
        start = weights
        for t in range(first, min(first + CHUNK, TOKENS)):
            total = [0.0, 0.0]
            for i in range(max(t - 2, 0), t + 1):
                error = two_layers(K[i], start) - V[i]
                made = of_two_layers(K[i], error, start)
                total = [a + GATE[i] * g for a, g in zip(total, made, strict=True)]
            if momentum is not None:
                held = [momentum[t] * m + g for m, g in zip(held, total, strict=True)]
                total = [0.1 * orthogonal(m) for m in held]
            weights = [RETAIN[t] * w - g for w, g in zip(weights, total, strict=True)]
            out.append(two_layers(Q[t], weights))
        done = start if first + CHUNK > TOKENS else weights
    return out, done


# Of the published first and last step.
COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (2.8366, -3.0525, 1.2012))
OWN_GATES = tuple(RANDOM.uniform(0.05, 0.3, size=(3, TOKENS)))


def lact():
    """Reads, then one orthogonal step of a chunk with momentum, then the first norms again."""

    def swiglu(x, w):
        z = x @ w[0]
        return (z / (1 + np.exp(-z)) * (x @ w[2])) @ w[1]

    weights, held, out = THREE, [0.0] * 3, []
    norms = [np.linalg.norm(w, axis=0) for w in THREE]
    for number, first in enumerate(range(0, TOKENS, CHUNK)):
        rows = range(first, min(first + CHUNK, TOKENS))
        out += [swiglu(Q[t], weights) for t in rows]
        if len(rows) < CHUNK:
            break
        total = [0.0] * 3
        for t in rows:
            z, up = K[t] @ weights[0], K[t] @ weights[2]
            s = 1 / (1 + np.exp(-z))
            hidden = weights[1] @ V[t]
            made = (
                np.outer(K[t], hidden * up * s * (1 + z * (1 - s))),
                np.outer(z * s * up, V[t]),
                np.outer(K[t], hidden * z * s),
            )
            total = [a + gate[t] * g for a, gate, g in zip(total, OWN_GATES, made, strict=True)]
        held = [MOMENTUM[number] * m + g for m, g in zip(held, total, strict=True)]
        weights = [w + orthogonal(m) for w, m in zip(weights, held, strict=True)]
        weights = [
            w / (np.linalg.norm(w, axis=0) + 1e-5) * n for w, n in zip(weights, norms, strict=True)
        ]
    return out, weights


def of(state, *, values=V, gate=GATE, rates=None, **rule):
    """``(arrays, run)``: traced arrays, and the layer of a row over them."""
    given = ((Q, K, values), layers.Rates(gate, **(rates or {})), state)
    parts = {name: rule[name] for name in ("retention", "optimizer") if name in rule}

    def run(rows, own, weights, **more):
        return layers.fast_weight(*rows, own, layers.fast_state(weights, **parts), **rule, **more)

    return given, run


LINEAR, MLP = {"memory": memories.linear()}, {"memory": memories.mlp(HIDDEN, bias=False)}
LATE = retentions.decay(first=False)
FADE = {"retain": RETAIN}
TABLE = {
    "linear attention": (
        linear_attention,
        of((MATRIX,), gate=np.ones(TOKENS), loss=inner_losses.dot_product, **LINEAR),
    ),
    "delta rule": (delta_rule, of((MATRIX,), **LINEAR)),
    "gated delta rule": (
        lambda: delta_rule(RETAIN),
        of((MATRIX,), rates=FADE, retention=retentions.decay(), **LINEAR),
    ),
    "KDA": (
        lambda: delta_rule(CHANNELS),
        of((MATRIX,), rates={"retain": CHANNELS}, retention=retentions.decay(), **LINEAR),
    ),
    "Mesa": (
        mesa,
        of(
            (np.zeros((WIDTH, WIDTH)), np.zeros((WIDTH, VALUES))),
            rates=FADE,
            memory=memories.ridge(PENALTY),
            loss=inner_losses.sums,
            retention=LATE,
        ),
    ),
    "Titans": (
        titans,
        of(
            TWO,
            rates={**FADE, "momentum": MOMENTUM},
            retention=LATE,
            optimizer=optax.chain(inner_optimizers.momentum(), optax.sgd(1.0)),
            reads="before",
            chunk_size=CHUNK,
            **MLP,
        ),
    ),
    "Moneta": (
        moneta,
        of(
            TWO,
            rates=FADE,
            loss=inner_losses.power(3.0),
            retention=retentions.power_norm(4.0),
            chunk_size=CHUNK,
            **MLP,
        ),
    ),
    "Yaad": (
        yaad,
        of(
            TWO,
            values=(V, DELTA),
            rates=FADE,
            loss=inner_losses.huber,
            retention=LATE,
            chunk_size=CHUNK,
            **MLP,
        ),
    ),
    "Memora": (
        memora,
        of(TWO, rates=FADE, retention=retentions.kl(3.0), chunk_size=CHUNK, **MLP),
    ),
    "LaCT": (
        lact,
        of(
            THREE,
            gate=OWN_GATES,
            rates={"momentum": MOMENTUM[:4]},
            memory=memories.swiglu(HIDDEN),
            loss=inner_losses.dot_product,
            retention=retentions.norms(),
            optimizer=optax.chain(
                inner_optimizers.momentum(),
                inner_optimizers.orthogonal(COEFFICIENTS, epsilon=0.0),
                optax.sgd(1.0),
            ),
            reads="before",
            step="chunk",
            chunk_size=CHUNK,
        ),
    ),
    "OmegaNet": (omega, of(TWO, rates=FADE, retention=LATE, window=3, chunk_size=CHUNK, **MLP)),
    "ATLAS": (
        lambda: omega(MOMENTUM),
        of(
            TWO,
            rates={**FADE, "momentum": MOMENTUM},
            retention=LATE,
            optimizer=optax.chain(
                inner_optimizers.momentum(),
                inner_optimizers.orthogonal(COEFFICIENTS, epsilon=0.0),
                optax.sgd(0.1),
            ),
            window=3,
            chunk_size=CHUNK,
            **MLP,
        ),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_row_is_its_formula(name):
    formula, (given, run) = TABLE[name]
    due, last = formula()
    with jax.enable_x64(True):
        out, state = quickly(run, *given)
    assert relative(out, np.array(due)) < 1e-12
    if name == "Memora":
        grown = [np.exp(logits) for logits in state.weights]
        state = state._replace(weights=tuple(3 * w / w.sum(-1, keepdims=True) for w in grown))
    assert relative(state.weights, tuple(last)) < 1e-12


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_ttt_layers_are_rows(name):
    *rows, gate, scale, state, norm = formulas.inputs(TOKENS, WIDTH, 1 + (name == "mlp"), CHUNK)
    inner = memories.linear(bias=True) if name == "linear" else memories.mlp(2 * WIDTH)

    def run(rows, own, weights, norm):
        memory = memories.residual(inner, norm)
        return layers.fast_weight(
            *rows, own, layers.fast_state(weights), memory=memory, chunk_size=CHUNK
        )

    due, after = formulas.ttt(*rows, gate, scale, state, norm)
    with jax.enable_x64(True):
        out, last = quickly(run, rows, layers.Rates(gate, scale=scale), state, norm)
    assert relative(out, due) < 1e-12
    assert relative(last.weights, after[-1]) < 1e-12


@pytest.mark.parametrize(
    "name", ["KDA", "Mesa", "Titans", "Moneta", "Yaad", "Memora", "LaCT", "ATLAS"]
)
def test_the_outer_gradient_is_a_difference(name):
    """Through every inner step, of queries, keys, values, rates and initial weights."""
    _, (given, run) = TABLE[name]
    leaves, structure = jax.tree.flatten(given)
    random = np.random.default_rng(1)
    weigh = random.normal(size=(TOKENS, VALUES))
    directions = [random.normal(size=leaf.shape) for leaf in leaves]
    step = 1e-6

    def loss(leaves):
        return (run(*jax.tree.unflatten(structure, leaves))[0] * weigh).sum()

    def changed(size):
        for index, (leaf, direction) in enumerate(zip(leaves, directions, strict=True)):
            yield [*leaves[:index], leaf + size * direction, *leaves[index + 1 :]]

    many = jax.tree.map(lambda *same: np.stack(same), *changed(step), *changed(-step))
    with jax.enable_x64(True):
        gradients, values = quickly(
            lambda own, other: (jax.grad(loss)(own), jax.vmap(loss)(other)), leaves, many
        )
    plus, minus = values.reshape(2, -1)
    actual = [(g * d).sum() for g, d in zip(gradients, directions, strict=True)]
    due = (plus - minus) / (2 * step)
    np.testing.assert_allclose(actual, due, rtol=1e-4, atol=1e-7)
    # The values have one, as the mixed derivative of the loss is not zero.
    assert np.abs(due[2]) > 1e-4

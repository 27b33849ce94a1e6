"""Inner steps of layers, beside loops in NumPy."""

import functools

import jax
import numpy as np
import optax
import pytest

from tests.core.compiling import quickly
from tests.layers import formulas
from tests.layers.test_ttt import relative
from ttt_jax import diagnostics, layers
from ttt_jax.layers import inner_optimizers, memories, retentions

TOKENS, WIDTH, CHUNK = 11, 4, 3


def norm_of(leaves):
    return np.sqrt(sum((leaf**2).sum() for leaf in leaves))


@pytest.mark.parametrize("depth", [1, 2])
def test_of_ttt_layers(depth):
    q, k, v, gate, scale, state, norm = formulas.inputs(TOKENS, WIDTH, depth, CHUNK)
    _, after = formulas.ttt(q, k, v, gate, scale, state, norm)
    due = []
    for number, (start, end) in enumerate(zip([state, *after[:-1]], after, strict=True)):
        own = range(number * CHUNK, (number + 1) * CHUNK)

        def loss(weights, own=own):
            errors = [
                formulas.norm(formulas.network(k[t], weights), *norm) - (v[t] - k[t]) for t in own
            ]
            return 0.5 * np.square(errors).sum(-1).mean()

        made = [formulas.loss_gradient(k[t], v[t], start, *norm) for t in own]
        gradient = [np.mean(parts, 0) for parts in zip(*made, strict=True)]
        spread = np.mean(
            [np.sqrt(formulas.network(k[t], start).var() + formulas.EPSILON) for t in own]
        )
        change = [a - b for a, b in zip(end, start, strict=True)]
        sizes = [norm_of(leaves) for leaves in (gradient, change, start)]
        due.append([loss(start), loss(end), *sizes, spread])
    with jax.enable_x64(True):
        actual = quickly(diagnostics.ttt_steps, k, v, gate, scale, state, norm)
    assert actual.before.shape == (TOKENS // CHUNK,)
    assert relative(tuple(actual), tuple(np.transpose(due))) < 1e-6
    assert (actual.after < actual.before).all()


def test_of_a_layer_with_momentum_a_decay_and_a_window():
    """Rates of each token; the state carries the moments and the tokens of the window."""
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, TOKENS, WIDTH))
    v, weight = random.normal(size=(TOKENS, 2)), 0.3 * random.normal(size=(WIDTH, 2))
    gate, retain, momentum = random.uniform((0.05, 0.8, 0.2), (0.2, 1.0, 0.6), (TOKENS, 3)).T
    optimizer = optax.chain(inner_optimizers.momentum(), optax.sgd(1.0))
    fade = retentions.decay(first=False)
    memory = memories.linear()
    layer = functools.partial(
        layers.fast_weight,
        memory=memory,
        retention=fade,
        optimizer=optimizer,
        chunk_size=CHUNK,
        window=2,
    )
    weights, held, due = weight, 0.0, []
    for first in range(0, TOKENS - TOKENS % CHUNK, CHUNK):
        own, start = slice(first, first + CHUNK), weights
        for t in range(first, first + CHUNK):
            total = sum(
                gate[i] * np.outer(k[i], k[i] @ start - v[i]) for i in range(max(t - 1, 0), t + 1)
            )
            held = momentum[t] * held + total
            weights = retain[t] * weights - held

        def loss(weights, own=own):
            return 0.5 * np.square(k[own] @ weights - v[own]).sum(-1).mean()

        gradient = k[own].T @ (k[own] @ start - v[own]) / CHUNK
        sizes = [norm_of([x]) for x in (gradient, weights - start, start)]
        due.append([loss(start), loss(weights), *sizes])

    def run(rows, weights):
        state = layers.fast_state(weights, retention=fade, optimizer=optimizer)
        return diagnostics.inner_steps(
            layer, rows, state, memory=memory, retention=fade, chunk_size=CHUNK
        )

    with jax.enable_x64(True):
        rows = (q, k, v, layers.Rates(gate, retain, momentum))
        actual = quickly(run, rows, (weight,))
    assert actual.deviation is None
    assert relative(tuple(actual[:-1]), tuple(np.transpose(due))) < 1e-6


def test_rates_of_each_chunk():
    """As many rows as chunks have begun; the rest of two tokens is left out."""
    random = np.random.default_rng(1)
    k, v = random.normal(size=(TOKENS, WIDTH)), random.normal(size=(TOKENS, 2))
    gate, retain = np.full(TOKENS, 0.05), np.array([0.9, 0.5, 0.7, 0.8])
    memory, fade = memories.linear(), retentions.decay(first=False)
    layer = functools.partial(
        layers.fast_weight, memory=memory, retention=fade, step="chunk", chunk_size=CHUNK
    )
    weights, due = np.ones((WIDTH, 2)), []
    for number, first in enumerate(range(0, TOKENS - TOKENS % CHUNK, CHUNK)):
        own, start = slice(first, first + CHUNK), weights
        weights = retain[number] * start - 0.05 * k[own].T @ (k[own] @ start - v[own])
        due.append(norm_of([weights - start]))
    with jax.enable_x64(True):
        actual = quickly(
            lambda rows, start: diagnostics.inner_steps(
                layer,
                rows,
                layers.fast_state(start, retention=fade),
                memory=memory,
                retention=fade,
                chunk_size=CHUNK,
            ),
            (k, k, v, layers.Rates(gate, retain)),
            (np.ones((WIDTH, 2)),),
        )
    assert relative(actual.change, np.array(due)) < 1e-6


def test_too_few_tokens_and_rows_are_refused():
    q, k, v, gate, scale, state, norm = formulas.inputs(2, WIDTH, 1, CHUNK)
    with pytest.raises(ValueError, match="whole chunk of tokens; got T = 2 with chunk_size=3"):
        diagnostics.ttt_steps(k, v, gate, scale, state, norm)
    memory = memories.linear()
    layer = functools.partial(layers.fast_weight, memory=memory)
    with pytest.raises(ValueError, match=r"rows must be \(q, k, v, rates\); got 3"):
        diagnostics.inner_steps(layer, (q, k, v), layers.fast_state(state), memory=memory)

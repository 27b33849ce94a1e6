"""TTT-Linear and TTT-MLP: one definition, against NumPy, in all forms and at all lengths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.layers import formulas
from ttt_jax import layers

LAYERS = {"linear": (layers.ttt_linear, 1), "mlp": (layers.ttt_mlp, 2)}
FORMS = ("primal", "dual")
LONGEST = 100
# Runs of every length up to two chunks and more; 9 comes again as another segment.
SEGMENTS = np.repeat([9, 4, 5, 9, 2, 7, 1], [3, 16, 37, 1, 2, 33, 8]).astype(np.int32)

every_layer = pytest.mark.parametrize("name", LAYERS)
every_form = pytest.mark.parametrize("form", FORMS)


def relative(actual, due):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(due), strict=True)
    return max(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs)


def separate(arguments, segments):
    """Outputs of the segments, each read alone, and the last state."""
    bounds = [0, *np.flatnonzero(np.diff(segments)) + 1, len(segments)]
    outs = []
    for start, end in itertools.pairwise(bounds):
        rows = [leaf[start:end] for leaf in arguments[:4]]
        out, after = formulas.ttt(*rows, *arguments[4:])
        outs.append(out)
    return np.concatenate(outs), after[-1] if after else arguments[5]


@every_layer
@every_form
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, LONGEST])
def test_it_is_the_formula_at_every_length(name, form, tokens):
    function, depth = LAYERS[name]
    arguments = formulas.inputs(tokens, 16, depth)
    due, after = formulas.ttt(*arguments)
    with jax.enable_x64(True):
        out, state = quickly(lambda *a: function(*a, form=form), *arguments)
    assert out.dtype == np.float64 and out.shape == (tokens, 16)
    assert relative(out, due) < 1e-13
    assert relative(state, after[-1] if after else arguments[5]) < 1e-13


@every_layer
@every_form
def test_it_is_the_formula_over_a_thousand_tokens(name, form):
    function, depth = LAYERS[name]
    arguments = formulas.inputs(1000, 16, depth)
    due, after = formulas.ttt(*arguments)
    with jax.enable_x64(True):
        out, state = quickly(lambda *a: function(*a, form=form), *arguments)
    assert relative(out, due) < 1e-11
    # A rest of 8 tokens is read and not learned.
    assert len(after) == 62 and relative(state, after[-1]) < 1e-11


@every_layer
@every_form
def test_in_single_precision(name, form):
    function, depth = LAYERS[name]
    arguments = formulas.inputs(128, 32, depth)
    due, after = formulas.ttt(*arguments)
    out, state = quickly(lambda *a: function(*a, form=form), *to(np.float32, arguments))
    assert out.dtype == np.float32
    assert relative(out, due) < 3e-6
    assert relative(state, after[-1]) < 3e-6


def to(dtype, tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


@every_layer
def test_operands_of_16_bits_beside_a_state_of_32(name):
    function, depth = LAYERS[name]
    arguments = formulas.inputs(1024, 16, depth)
    narrow = (*to(jnp.bfloat16, arguments[:3]), *to(np.float32, arguments[3:]))
    due, after = formulas.ttt(*arguments)
    out, state = quickly(function, *narrow)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in state} == {np.dtype(np.float32)}
    assert relative(out.astype(np.float32), due) < 1e-2
    # Errors do not grow along the sequence.
    assert relative(out[-64:].astype(np.float32), due[-64:]) < 1e-2
    assert relative(state, after[-1]) < 1e-2


@every_layer
@every_form
def test_packed_segments_are_as_separate_sequences(name, form):
    function, depth = LAYERS[name]
    arguments = formulas.inputs(LONGEST, 16, depth)
    due, last = separate(arguments, SEGMENTS)
    with jax.enable_x64(True):
        out, state = quickly(lambda *a: function(*a, form=form, segments=SEGMENTS), *arguments)
    assert relative(out, due) < 1e-13
    assert relative(state, last) < 1e-13


@pytest.mark.parametrize("seed", range(4))
def test_packed_segments_of_random_lengths(seed):
    """One program for all: the segments are traced."""
    random = np.random.default_rng(seed)
    marks = np.cumsum(random.uniform(size=LONGEST) < (0.02, 0.1, 0.5, 1.0)[seed]).astype(np.int32)
    arguments = formulas.inputs(LONGEST, 8, chunk=5, seed=seed)
    due, last = separate(arguments, marks)
    with jax.enable_x64(True):
        out, state = packed_by_five(jnp.asarray(marks), *arguments)
    assert relative(out, due) < 1e-13
    assert relative(state, last) < 1e-13


@jax.jit
def packed_by_five(segments, *arguments):
    return layers.ttt_linear(*arguments, chunk_size=5, segments=segments)


@every_layer
def test_two_halves_are_the_whole(name):
    function, depth = LAYERS[name]
    arguments = formulas.inputs(80, 16, depth)
    rows, rest = arguments[:4], arguments[4:]

    def both(rows, scale, state, norm):
        whole = function(*rows, scale, state, norm)
        first, middle = function(*(leaf[:48] for leaf in rows), scale, state, norm)
        second, last = function(*(leaf[48:] for leaf in rows), scale, middle, norm)
        return whole, (jnp.concatenate([first, second]), last)

    with jax.enable_x64(True):
        whole, halves = quickly(both, rows, *rest)
    assert relative(halves, whole) < 1e-14


# Where, in a chunk and between chunks of segments, a token is changed.
@every_layer
@every_form
@pytest.mark.parametrize("packed", [False, True])
def test_no_token_sees_a_later_one(name, form, packed):
    function, depth = LAYERS[name]
    segments = SEGMENTS if packed else None
    arguments = to(np.float32, formulas.inputs(LONGEST, 8, depth))

    @jax.jit
    def read(*rows):
        return function(*rows, *arguments[4:], segments=segments, form=form)[0]

    due = np.asarray(read(*arguments[:4]))
    for token in (0, 7, 18, 40, 56, 99):
        for index in range(4):
            rows = list(arguments[:4])
            rows[index] = rows[index].at[token].add(0.5)
            actual = np.asarray(read(*rows))
            np.testing.assert_array_equal(actual[:token], due[:token])
            assert (actual[token] != due[token]).any(), (token, index)


@every_layer
def test_a_gate_of_zero_learns_nothing(name):
    """Padding at the end of whole chunks: any values, and the state of the tokens before."""
    function, depth = LAYERS[name]
    q, k, v, gate, *rest = to(np.float32, formulas.inputs(32, 8, depth))
    gate = gate.at[16:].set(0)
    out, state = jax.jit(function)(q, k, v, gate, *rest)
    other = jax.jit(function)(q, k.at[16:].add(3.0), v.at[16:].add(-2.0), gate, *rest)
    shorter = jax.jit(function)(q[:16], k[:16], v[:16], gate[:16], *rest)
    for leaf, changed, due in zip(
        (out[:16], *state), (other[0][:16], *other[1]), (shorter[0], *shorter[1]), strict=True
    ):
        np.testing.assert_array_equal(leaf, changed)
        np.testing.assert_allclose(leaf, due, rtol=1e-6, atol=1e-6)


def test_heads_and_batch_are_mapped():
    heads, batch = 2, 3
    made = [[formulas.inputs(20, 8, seed=10 * n + h) for h in range(heads)] for n in range(batch)]
    # Rows [N, H, ...]; state and norm of a head [H, ...]; one scale.
    rows = [np.stack([[head[i] for head in row] for row in made]) for i in range(4)]
    state, norm = (
        tuple(np.stack([made[0][h][i][j] for h in range(heads)]) for j in range(2)) for i in (5, 6)
    )
    scale = made[0][0][4]
    over_heads = jax.vmap(layers.ttt_linear, (0, 0, 0, 0, None, 0, 0))
    over_batch = jax.vmap(over_heads, (0, 0, 0, 0, None, None, None))
    with jax.enable_x64(True):
        out, (weight, bias) = quickly(over_batch, *rows, scale, state, norm)
    assert weight.shape == (batch, heads, 8, 8) and bias.shape == (batch, heads, 8)
    for n in range(batch):
        for h in range(heads):
            own = [leaf[n, h] for leaf in rows]
            shared = [tuple(leaf[h] for leaf in tree) for tree in (state, norm)]
            due, after = formulas.ttt(*own, scale, *shared)
            assert relative(out[n, h], due) < 1e-13
            assert relative((weight[n, h], bias[n, h]), after[-1]) < 1e-13


WRONG = {
    "no tokens": (dict(tokens=0), "q must have at least one token; got shape (0, 8)"),
    "unknown form": (dict(form="fast"), "form must be one of ('auto', 'primal', 'dual', 'kernel')"),
    "chunk": (dict(chunk_size=8), "scale must have chunk_size entries"),
    "gate": (dict(gate=np.ones(5)), "gate must have shape (4,), one for each token of q"),
    "width": (dict(k=np.ones((4, 7))), "k must have shape (4, 8), as q; got (4, 7)"),
    "state": (
        dict(state=(np.ones((8, 7)), np.ones(7))),
        "state must have shapes (W [d, d], b [d])",
    ),
    "norm": (dict(norm=(np.ones(8), np.ones(7))), "norm (beta) must have shape (8,)"),
    "segments": (dict(segments=np.arange(5)), "segments must have shape (4,)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(case):
    changes, words = WRONG[case]
    names = ("q", "k", "v", "gate", "scale", "state", "norm")
    given = dict(zip(names, formulas.inputs(changes.pop("tokens", 4), 8), strict=True))
    with pytest.raises(ValueError) as caught:
        layers.ttt_linear(**{**given, **changes})
    assert words in str(caught.value)


def test_there_is_no_kernel_in_silence():
    with pytest.raises(ValueError, match=r"no segments; got d = 8, a hidden .*Use form='dual'"):
        layers.ttt_mlp(*formulas.inputs(4, 8, 2), form="kernel")
    with pytest.raises(ValueError, match=r"no segments; got d = 8, .*Use form='dual'"):
        layers.ttt_linear(*formulas.inputs(4, 8), form="kernel")

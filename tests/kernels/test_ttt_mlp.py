"""TTT-MLP in kernels against its form in XLA: outputs, states and all eleven gradients.

On a CPU the kernels are interpreted; on a GPU they are compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.kernels.lowering import lowered_for_gpu
from tests.kernels.test_ttt_linear import equations, errors, weights_of, with_gradients
from ttt_jax import layers
from ttt_jax.kernels import ttt_mlp
from ttt_jax.kernels.ttt_mlp import algebra, gradient, layer, limits

WIDTH, HIDDEN, CHUNK = 16, 64, 16
# Sequences and heads; the scale is of all, weights and norm are of a head.
_EVERY = layer.Tokens(0, 0, 0, 0)
AXES = (
    layer.Operands(_EVERY, layer.Shared(None, None, None), layer.State(*[None] * 4)),
    layer.Operands(_EVERY, layer.Shared(None, 0, 0), layer.State(*[0] * 4)),
)


def operands(tokens, lead=(), heads=(), dtype=jnp.float32, width=WIDTH, hidden=HIDDEN):
    """Random arrays: tokens ``[*lead, *heads, T, d]``, weights and norm ``[*heads, ...]``."""
    rng = np.random.default_rng(tokens)
    draw = lambda size, *shape: jnp.asarray(size * rng.normal(size=shape), jnp.float32)  # noqa: E731
    rows = [draw(0.3, *lead, *heads, tokens, width).astype(dtype) for _ in range(3)]
    gate = jax.nn.sigmoid(draw(1.0, *lead, *heads, tokens)) / width
    scale = (1 + draw(0.1, CHUNK)) / np.arange(1, CHUNK + 1, dtype=np.float32)
    first = draw(0.1, *heads, width, hidden), draw(0.1, *heads, hidden)
    second = draw(0.1, *heads, hidden, width), draw(0.1, *heads, width)
    norm = 1 + draw(0.1, *heads, width), draw(0.1, *heads, width)
    return layer.Operands(
        layer.Tokens(*rows, gate), layer.Shared(scale, *norm), layer.State(*first, *second)
    )


def kernels(given, spacing=4):
    return layer.run(given, spacing=spacing)


def arguments(given):
    (q, k, v, gate), (scale, gamma, beta), state = given
    return q, k, v, gate, scale, tuple(state), (gamma, beta)


def dual(given):
    out, last = layers.ttt_mlp(*arguments(given), form="dual")
    return out, layer.State(*last)


def mapped(function):
    """Over sequences and heads."""
    return jax.vmap(jax.vmap(function, (AXES[1],)), (AXES[0],))


@functools.cache
def reference(tokens, dtype):
    """In float32, at the operands as ``dtype`` rounds them."""
    given = operands(tokens, (2,), (3,), dtype)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), given)
    weights = weights_of(mapped(dual), wide)
    return given, weights, quickly(with_gradients(mapped(dual)), wide, weights)


@pytest.mark.parametrize(
    ("spacing", "dtype"), [(1, jnp.float32), (3, jnp.float32), (1, jnp.bfloat16)]
)
def test_outputs_states_and_gradients(spacing, dtype):
    """Over sequences and heads, with a rest of a chunk."""
    given, weights, due = reference(72, dtype)
    run = mapped(functools.partial(kernels, spacing=spacing))
    found = quickly(with_gradients(run), given, weights)
    assert len(jax.tree.leaves(found)) == 5 + 11
    assert found[0][0].dtype == dtype and found[1].tokens.gate.dtype == np.float32
    limit = 1e-5 if dtype == jnp.float32 else 1.5e-2
    assert max(errors(found, due)) < limit, errors(found, due)
    if dtype == jnp.bfloat16:
        assert max(errors(found, due)) > 1e-4


@pytest.mark.parametrize("whole", [1.0, 0.0])
def test_the_derivative_of_a_chunk_is_that_of_its_definition(whole):
    """In float64, with products that round nothing."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731

    def dot(a, b, axes):
        return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())))

    def state():
        return algebra.State(draw(HIDDEN, WIDTH), draw(HIDDEN), draw(HIDDEN, WIDTH), draw(WIDTH))

    with jax.enable_x64(True):
        rows = [draw(CHUNK, WIDTH) for _ in range(3)]
        tokens = algebra.Tokens(*rows, abs(draw(CHUNK)))
        shared = algebra.Shared(draw(CHUNK), 1 + 0.3 * draw(WIDTH), draw(WIDTH))
        before, later, dout = state(), state(), draw(CHUNK, WIDTH)

        def run(*given):
            return algebra.chunk(*given, whole, dot)

        due = jax.vjp(run, before, tokens, shared)[1]((later, dout))
        made = gradient.chunk_gradient(before, tokens, shared, whole, (later, dout), dot)
        found = made.state, made.tokens, (made.scale, made.gamma.sum(0), made.beta.sum(0))
        assert max(errors(found, due)) < 1e-12
        # With a chunk that changes nothing the state's gradient is passed on, and more is added.
        assert errors(made.state, later)[0] > 1e-3


@pytest.fixture(scope="module")
def whole():
    """A layer's call and its gradients, compiled, and its results."""
    given = operands(500)
    weights = weights_of(dual, given)
    compiled = jax.jit(with_gradients(kernels)).lower(given, weights).compile()
    return compiled, given, weights, jax.device_get(compiled(given, weights))


def test_errors_do_not_grow_along_a_sequence(whole):
    _, given, weights, found = whole
    due = quickly(with_gradients(dual), given, weights)
    assert max(errors(found, due)) < 2e-5
    assert errors(found[0][0][-64:], due[0][0][-64:])[0] < 5e-6


def test_two_calls_are_equal_bit_for_bit(whole):
    compiled, given, weights, found = whole
    again = jax.device_get(compiled(given, weights))
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_a_map_makes_programs_and_no_loop():
    given = operands(48, (2,), (3,))
    run = with_gradients(mapped(functools.partial(kernels, spacing=2)))
    jaxpr = jax.make_jaxpr(run)(given, weights_of(mapped(dual), given))
    grids = [eqn.params["grid_mapping"].grid for eqn in equations(jaxpr.jaxpr, "pallas_call")]
    # Forward, the states between those that are kept, backward.
    assert len(grids) == 3 and all(grid[:2] in ((2, 3), (3, 2)) for grid in grids)
    assert not list(equations(jaxpr.jaxpr, "while")) + list(equations(jaxpr.jaxpr, "scan"))


def test_a_map_equals_a_loop():
    given = operands(40, (2,), (2,))
    both = quickly(mapped(kernels), given)
    one = jax.jit(kernels).lower(pick(given, 0, 0)).compile()
    for sequence in range(2):
        for head in range(2):
            found = jax.device_get(one(pick(given, sequence, head)))
            due = jax.tree.map(lambda leaf, at=(sequence, head): leaf[at], both)
            assert max(errors(found, due)) < 2e-6


def pick(given, sequence, head):
    tokens, shared, state = given
    return layer.Operands(
        jax.tree.map(lambda leaf: leaf[sequence, head], tokens),
        layer.Shared(shared.scale, shared.gamma[head], shared.beta[head]),
        jax.tree.map(lambda leaf: leaf[head], state),
    )


@pytest.mark.parametrize("tokens", [1, 15])
def test_less_than_a_chunk_is_read_and_not_learned(tokens):
    given = operands(tokens)
    out, last = quickly(kernels, given)
    assert errors(out, quickly(dual, given)[0])[0] < 1e-5
    jax.tree.map(np.testing.assert_array_equal, tuple(last), tuple(given.state))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_they_lower_for_a_gpu(monkeypatch, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    given = operands(168, dtype=dtype, width=64, hidden=256)
    weights = weights_of(dual, given)
    text = lowered_for_gpu(with_gradients(kernels), given, weights)
    assert text.count("__gpu$xla.gpu.triton") == 3 and "stablehlo.while" not in text


def test_the_layers_form_is_the_kernels():
    """Tokens of 16 bits beside values of 32: operands of 32."""
    given = operands(20)
    tokens = given.tokens._replace(q=given.tokens.q.astype(jnp.bfloat16))
    given = given._replace(tokens=tokens)
    run = lambda g: layers.ttt_mlp(*arguments(g), form="kernel")  # noqa: E731
    out, last = quickly(run, given)
    due = quickly(dual, given)
    assert "pallas_call" in str(jax.make_jaxpr(run)(given))
    assert out.dtype == due[0].dtype == np.float32
    assert max(errors((out, last), (due[0], tuple(due[1])))) < 1e-5


def test_auto_takes_what_was_compared_on_a_card(monkeypatch):
    def runs(given, **options):
        call = lambda g: layers.ttt_mlp(*arguments(g), **options)  # noqa: E731
        return "pallas_call" in str(jax.make_jaxpr(call)(given))

    given = operands(20)
    monkeypatch.setattr(limits, "COMPARED", frozenset({(WIDTH, HIDDEN, CHUNK, "float32")}))
    assert not runs(given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ttt_mlp.supported(WIDTH, HIDDEN, CHUNK, jnp.float32) and runs(given)
    assert not runs(given, form="dual")
    assert not runs(given, segments=jnp.zeros(20, jnp.int32))
    assert not runs(operands(20, dtype=jnp.bfloat16)) and not runs(operands(20, hidden=128))


WRONG = {
    "a width": (dict(width=24), {}, r"d among 16, .*; got d = 24, a hidden width of 64"),
    "a hidden width": (dict(hidden=48), {}, r"a hidden width among 64, .*width of 48"),
    "both of the largest": (
        dict(width=64, hidden=256),
        {},
        r"d = 64 with 256 in bfloat16 alone.*got d = 64, a hidden width of 256",
    ),
    "segments": ({}, dict(segments=jnp.zeros(20, jnp.int32)), r"no segments; got .* and segments"),
    "a dtype": (dict(dtype=jnp.float16), {}, "float16 and no segments. Use form='dual'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_form_refuses_what_the_kernels_do_not_take(case):
    changes, options, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        layers.ttt_mlp(*arguments(operands(20, **changes)), form="kernel", **options)


def test_what_the_kernels_are_given_is_checked():
    given = list(arguments(operands(20)))
    for place, value, error, words in (
        (5, given[5][:3], TypeError, "state must be 4 arrays, W1, b1, W2, b2; got tuple of 3"),
        (5, (*given[5][:2], given[5][0], given[5][3]), ValueError, r"W2 must have shape \(64, 16"),
        (1, given[1][:5], ValueError, "k must have the shape and dtype of q"),
        (4, given[4][:5], ValueError, "chunk_size = 5 and float32"),
    ):
        with pytest.raises(error, match=words):
            ttt_mlp.ttt_mlp(*given[:place], value, *given[place + 1 :])


@pytest.mark.parametrize(
    "setting", [("jax_numpy_dtype_promotion", "strict"), ("jax_enable_x64", True)]
)
def test_settings_of_jax(setting):
    """The kernels are traced under them, forward and backward."""
    given = operands(40, dtype=jnp.bfloat16)
    weights = weights_of(dual, given)
    plain = jax.eval_shape(with_gradients(kernels), given, weights)
    name, value = setting
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        under = jax.eval_shape(with_gradients(kernels), given, weights)
    finally:
        jax.config.update(name, before)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), under) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), plain
    )

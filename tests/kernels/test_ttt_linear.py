"""TTT-Linear in kernels against its form in XLA: outputs, states and all nine gradients.

On a CPU the kernels are interpreted; on a GPU they are compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec as P

from tests.core.compiling import quickly
from tests.kernels.lowering import lowered_for_gpu
from ttt_jax import layers
from ttt_jax.kernels import ttt_linear
from ttt_jax.kernels.ttt_linear import layer, limits, programs

WIDTH, CHUNK = 16, 16
NAMES = layer.Operands._fields
# Sequences and heads; the scale is of all, weights and norm are of a head.
AXES = (
    layer.Operands(0, 0, 0, 0, None, None, None, None, None),
    layer.Operands(0, 0, 0, 0, None, 0, 0, 0, 0),
)


def operands(tokens, lead=(), heads=(), dtype=jnp.float32, width=WIDTH):
    """Random arrays: tokens ``[*lead, *heads, T, d]``, weights and norm ``[*heads, d, d]``."""
    rng = np.random.default_rng(tokens)
    draw = lambda size, *shape: size * rng.normal(size=shape)  # noqa: E731
    rows = [draw(0.3, *lead, *heads, tokens, width) for _ in range(3)]
    gate = 1 / (1 + np.exp(-draw(1.0, *lead, *heads, tokens))) / width
    scale = (1 + draw(0.1, CHUNK)) / np.arange(1, CHUNK + 1)
    state = draw(0.1, *heads, width, width), draw(0.1, *heads, width)
    norm = 1 + draw(0.1, *heads, width), draw(0.1, *heads, width)
    narrow = [jnp.asarray(row, dtype) for row in rows]
    rest = [jnp.asarray(leaf, jnp.float32) for leaf in (gate, scale, *state, *norm)]
    return layer.Operands(*narrow, *rest)


def kernels(given, spacing=4, name=None):
    configuration = None if name is None else limits.CONFIGURATIONS[name]
    return layer.run(given, spacing=spacing, configuration=configuration)


def dual(given):
    q, k, v, gate, scale, weight, bias, gamma, beta = given
    out, last = layers.ttt_linear(q, k, v, gate, scale, (weight, bias), (gamma, beta), form="dual")
    return out, layer.State(*last)


def mapped(function):
    """Over sequences and heads."""
    return jax.vmap(jax.vmap(function, (AXES[1],)), (AXES[0],))


def with_gradients(function):
    """Of a weighed sum of outputs and states: the results, and the gradients of all operands."""

    def run(given, weights):
        out, backward = jax.vjp(function, given)
        return out, *backward(jax.tree.map(lambda w, o: w.astype(o.dtype), weights, out))

    return run


def weights_of(function, given):
    rng = np.random.default_rng(9)
    shapes = jax.eval_shape(function, given)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


def errors(found, due):
    """Relative, by leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True)
    wide = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in wide]


@functools.cache
def reference(tokens, dtype):
    """Arrays, weights of the sum, and what XLA makes of them in float32."""
    given = operands(tokens, (2,), (3,), dtype)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), given)
    weights = weights_of(mapped(dual), wide)
    return given, weights, quickly(with_gradients(mapped(dual)), wide, weights)


# Each way through the kernels: steps of one and two chunks, whole and in parts, states that are
# all kept and not, with and without prefetch, one program and two for the same chunks.
CASES = [
    ("one", 4, jnp.float32),
    ("one_2warps", 1, jnp.float32),
    ("parts", 3, jnp.bfloat16),
    ("shared", 2, jnp.float32),
]


@pytest.mark.parametrize(("name", "spacing", "dtype"), CASES)
def test_outputs_states_and_nine_gradients(name, spacing, dtype):
    """Over sequences and heads, with a rest of a chunk."""
    given, weights, due = reference(72, dtype)
    run = mapped(functools.partial(kernels, spacing=spacing, name=name))
    found = quickly(with_gradients(run), given, weights)
    assert len(jax.tree.leaves(found)) == 3 + len(NAMES)
    assert found[0][0].dtype == dtype and found[1].gate.dtype == np.float32
    limit = 1e-5 if dtype == jnp.float32 else 1.5e-2
    assert max(errors(found, due)) < limit, dict(zip(NAMES, errors(found[1], due[1]), strict=True))
    if dtype == jnp.bfloat16:
        assert max(errors(found, due)) > 1e-4


@pytest.mark.parametrize("name", ["one", "shared"])
def test_outputs_where_no_gradient_follows(name):
    """Then no state is kept, whatever the spacing."""
    given = operands(72)
    due = quickly(dual, given)
    for spacing in (1, 4):
        found = quickly(functools.partial(kernels, spacing=spacing, name=name), given)
        assert max(errors(found, due)) < 1e-5


@pytest.fixture(scope="module")
def whole():
    """A layer's call of the default configuration and its gradients, compiled, and its results."""
    given = operands(1000)
    weights = weights_of(dual, given)
    compiled = jax.jit(with_gradients(kernels)).lower(given, weights).compile()
    return compiled, given, weights, jax.device_get(compiled(given, weights))


def test_errors_do_not_grow_along_a_thousand_tokens(whole):
    _, given, weights, found = whole
    due = quickly(with_gradients(dual), given, weights)
    assert max(errors(found, due)) < 2e-5
    assert errors(found[0][0][-64:], due[0][0][-64:])[0] < 5e-6


def test_two_calls_are_equal_bit_for_bit(whole):
    compiled, given, weights, found = whole
    again = jax.device_get(compiled(given, weights))
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_a_map_makes_programs_and_no_loop(monkeypatch):
    seen = []
    chosen = limits.chosen
    monkeypatch.setattr(
        limits, "chosen", lambda programs: seen.append(programs) or chosen(programs)
    )
    given = operands(48, (2,), (3,))
    jaxpr = jax.make_jaxpr(with_gradients(mapped(kernels)))(given, weights_of(mapped(dual), given))
    grids = [eqn.params["grid_mapping"].grid for eqn in equations(jaxpr.jaxpr, "pallas_call")]
    assert all(grid[:2] in ((2, 3), (3, 2)) for grid in grids)
    assert not list(equations(jaxpr.jaxpr, "while")) + list(equations(jaxpr.jaxpr, "scan"))
    # Six heads of sequences in all, in either pass.
    assert seen.count(6) >= 2
    configuration = limits.CONFIGURATIONS[chosen(6)]
    assert len(grids) == 3 + 2 * configuration.parts


def equations(jaxpr, name):
    """Of a primitive, in a jaxpr and all inside it but the kernels."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        elif eqn.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
                # From jax 0.12 on a function with a rule of its own is held as it was traced.
                inner = getattr(inner, "traced", inner)
                inner = getattr(inner, "jaxpr", inner)
                if _is_jaxpr(inner):
                    yield from equations(inner, name)


def _is_jaxpr(value):
    return hasattr(value, "eqns")


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
    rows = [leaf[sequence, head] for leaf in given[:4]]
    return layer.Operands(*rows, given.scale, *[leaf[head] for leaf in given[5:]])


def test_means_over_the_outputs_features_are_of_no_consequence():
    """Means of a hundred times the weights: the sums of squares would cancel."""
    given = operands(40)
    weights = weights_of(dual, given)
    moved = lambda g: g._replace(weight=g.weight + 10, bias=g.bias - 10)  # noqa: E731
    run = jax.jit(with_gradients(kernels)).lower(given, weights).compile()
    (found, last), grads = run(moved(given), weights)
    due = run(given, weights)
    assert max(errors((found, grads), (due[0][0], due[1]))) < 2e-5
    assert max(errors(last, moved(due[0][1]))) < 1e-6


@pytest.mark.parametrize("name", ["one", "shared"])
def test_means_over_the_outputs_features_do_not_change(name):
    """Rounding of 16 bits gives those of the learned weights and of the gradients no other mean."""
    given = operands(72, dtype=jnp.bfloat16)
    weights = weights_of(dual, given)
    run = with_gradients(functools.partial(kernels, name=name))
    (_, last), grads = quickly(run, given, weights)
    for found, due in ((last, given), (grads, weights[1])):
        for leaf, start in ((found.weight, due.weight), (found.bias, due.bias)):
            np.testing.assert_allclose(leaf.mean(-1), start.mean(-1), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 15])
def test_less_than_a_chunk_is_read_and_not_learned(tokens):
    given = operands(tokens)
    out, last = quickly(kernels, given)
    due = quickly(dual, given)
    assert errors(out, due[0])[0] < 1e-5
    np.testing.assert_allclose(last.weight, given.weight, atol=1e-7)
    np.testing.assert_allclose(last.bias, given.bias, atol=1e-7)


def test_programs_with_the_same_blocks_store_by_turns():
    """Two for each of two blocks: an entry that both stored would have the later one's number."""
    tiles = limits.Tiles(shares=2)

    def kernel(refs):
        number, stored = programs.shared_by(tiles)
        both = jnp.stack([number, pl.program_id(0)])

        def store(index):
            refs.found[index, :] = both

        for index in range(3):
            stored(np.int32(index), functools.partial(store, index))

    blocks = {}, {"found": programs.rows(jax.ShapeDtypeStruct((6, 2), jnp.int32), 3)}
    made = programs.call(kernel, "stores", tiles, 2, blocks)["found"]
    np.testing.assert_array_equal(made, [[0, 0], [0, 1], [0, 0], [1, 2], [1, 3], [1, 2]])


LOWERED = [
    *[(name, jnp.bfloat16) for name in limits.CONFIGURATIONS],
    ("shared", jnp.float32),
]


@pytest.mark.parametrize(("name", "dtype"), LOWERED)
def test_every_configuration_lowers_for_a_gpu(monkeypatch, name, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    given = operands(168, dtype=dtype, width=64)
    run = functools.partial(kernels, name=name)
    weights = weights_of(dual, given)
    text = lowered_for_gpu(with_gradients(run), given, weights)
    configuration = limits.CONFIGURATIONS[name]
    assert text.count("__gpu$xla.gpu.triton") == 3 + 2 * configuration.parts
    assert "stablehlo.while" not in text


def arguments(given):
    q, k, v, gate, scale, weight, bias, gamma, beta = given
    return q, k, v, gate, scale, (weight, bias), (gamma, beta)


def test_the_layers_form_is_the_kernels():
    """Tokens of 16 bits beside values of 32: operands of 32."""
    given = operands(20)
    given = given._replace(q=given.q.astype(jnp.bfloat16))
    out, last = quickly(lambda g: layers.ttt_linear(*arguments(g), form="kernel"), given)
    due = quickly(dual, given)
    assert out.dtype == due[0].dtype == np.float32
    assert max(errors((out, last), (due[0], tuple(due[1])))) < 1e-5


def compared(monkeypatch):
    sizes = {(WIDTH, CHUNK, dtype) for dtype in ("float32", "bfloat16", "float16")}
    monkeypatch.setattr(limits, "COMPARED", frozenset(sizes))


def test_auto_takes_the_kernels_on_a_gpu_for_what_they_take(monkeypatch):
    def runs(given, **options):
        call = lambda g: layers.ttt_linear(*arguments(g), **options)  # noqa: E731
        return "pallas_call" in str(jax.make_jaxpr(call)(given))

    given = operands(20)
    assert not runs(given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # What was not compared on a card is not taken.
    assert runs(given) and not runs(operands(20, dtype=jnp.bfloat16, width=32))
    compared(monkeypatch)
    assert ttt_linear.supported(WIDTH, CHUNK, jnp.float32)
    assert runs(given) and runs(operands(20, dtype=jnp.bfloat16))
    assert not runs(given, form="dual")
    assert not runs(given, segments=jnp.zeros(20, jnp.int32))
    assert not runs(operands(20, width=24))
    assert not runs(operands(20, dtype=jnp.float16))
    assert not runs(given._replace(scale=given.scale[:5]), chunk_size=5)


WRONG = {
    "a width": (dict(width=24), {}, r"d among 16, .*; got d = 24"),
    "segments": ({}, dict(segments=jnp.zeros(20, jnp.int32)), r"no segments; got .* and segments"),
    "a dtype": (dict(dtype=jnp.float16), {}, "float16 and no segments. Use form='dual'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_form_refuses_what_the_kernels_do_not_take(case):
    changes, options, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        layers.ttt_linear(*arguments(operands(20, **changes)), form="kernel", **options)


@pytest.mark.parametrize(
    "setting", [("jax_numpy_dtype_promotion", "strict"), ("jax_enable_x64", True)]
)
def test_settings_of_jax(setting):
    """The kernels are traced under them, forward and backward."""
    given = operands(40, dtype=jnp.bfloat16)
    weights = weights_of(dual, given)
    for name in ("one", "shared"):
        run = with_gradients(functools.partial(kernels, name=name))
        plain = jax.eval_shape(run, given, weights)
        before = getattr(jax.config, setting[0])
        jax.config.update(*setting)
        try:
            assert jax.eval_shape(run, given, weights) == plain
        finally:
            jax.config.update(setting[0], before)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_a_shard_map_of_the_callers_own(monkeypatch):
    """Without its checks the kernels run there; with them Pallas refuses, and auto is dual."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    given = arguments(operands(20, (2,)))

    def spread(form, check):
        one = lambda *a: layers.ttt_linear(*a, form=form)  # noqa: E731
        run = jax.vmap(one, (0, 0, 0, 0, None, None, None))
        specs = (*(P("d"),) * 4, P(), P(), P())
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=check)

    found = quickly(spread("kernel", False), *given)
    due = quickly(spread("dual", True), *given)
    assert max(errors(found, due)) < 1e-5
    with pytest.raises(NotImplementedError, match=r"shard_map\(check_vma=False\)"):
        jax.eval_shape(spread("kernel", True), *given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compared(monkeypatch)
    assert "pallas_call" not in str(jax.make_jaxpr(spread("auto", True))(*given))
    assert "pallas_call" in str(jax.make_jaxpr(spread("auto", False))(*given))

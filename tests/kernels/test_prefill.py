"""Reading on from a cache: in kernels between two chunks, as XLA does it.

On a CPU the kernels are interpreted; on a GPU they are compiled.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.kernels.test_ttt_linear import equations
from ttt_jax import layers

WIDTH, HIDDEN, CHUNK, TOKENS = 16, 64, 16, 40
DEPTHS = {"linear": 1, "mlp": 2}
every_layer = pytest.mark.parametrize("name", DEPTHS)


@functools.cache
def case(name, tokens=TOKENS):
    """Rows, position factors, initial weights and norm of a head."""
    # Kept from test to test, so never of a trace that asks for it first.
    with jax.ensure_compile_time_eval():
        return drawn(name, tokens)


def drawn(name, tokens):
    rng = np.random.default_rng(tokens)
    draw = lambda size, *shape: jnp.asarray(size * rng.normal(size=shape), jnp.float32)  # noqa: E731
    rows = tuple(draw(0.3, tokens, WIDTH) for _ in range(3))
    gate = jax.nn.sigmoid(draw(1.0, tokens)) / WIDTH
    scale = (1 + draw(0.1, CHUNK)) / np.arange(1, CHUNK + 1, dtype=np.float32)
    sizes = (WIDTH, WIDTH) if name == "linear" else (WIDTH, HIDDEN, WIDTH)
    state = ()
    for inputs, outputs in itertools.pairwise(sizes):
        state += draw(0.1, inputs, outputs), draw(0.1, outputs)
    return (*rows, gate), scale, state, (1 + draw(0.1, WIDTH), draw(0.1, WIDTH))


def read(name, form, begin=0):
    """A function of the rows: outputs and cache from one that has read ``begin`` tokens."""
    rows, scale, state, norm = case(name)

    def run(*rows):
        cache = layers.ttt_cache(state)
        if begin:
            first = (leaf[:begin] for leaf in rows)
            _, cache = layers.ttt_prefill(*first, scale, cache, norm, form="dual")
        rest = (leaf[begin:] for leaf in rows)
        return layers.ttt_prefill(*rest, scale, cache, norm, form=form)

    return run, rows


def close(tree, other):
    for leaf, due in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, due, atol=4e-6 * max(float(jnp.abs(due).max()), 1))


@every_layer
@pytest.mark.parametrize("tokens", [3, 16, 32, 40])
def test_whole_chunks_and_the_rest(name, tokens):
    rows, scale, state, norm = case(name)

    def run(form):
        cache = layers.ttt_cache(state)
        part = (leaf[:tokens] for leaf in rows)
        return layers.ttt_prefill(*part, scale, cache, norm, form=form)

    out, cache = quickly(lambda: run("kernel"))
    due, after = quickly(lambda: run("dual"))
    close((out, cache.weights, cache.sums), (due, after.weights, after.sums))
    assert int(cache.position) == tokens % CHUNK


@every_layer
def test_padding_is_not_read_whatever_it_holds(name):
    lengths = jnp.array([0, 5, 16, 21, 40])

    def run(form, fill):
        def prompt(length):
            _, scale, state, norm = case(name)
            there = jnp.arange(TOKENS) < length
            rows = [
                jnp.where(there.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, fill)
                for leaf in case(name)[0]
            ]
            cache = layers.ttt_cache(state)
            out, cache = layers.ttt_prefill(*rows, scale, cache, norm, length=length, form=form)
            return jnp.where(there[:, None], out, 0), cache

        return quickly(jax.vmap(prompt), lengths)

    out, cache = run("kernel", jnp.nan)
    due, after = run("dual", 1.0)
    np.testing.assert_array_equal(cache.position, lengths % CHUNK)
    close((out, cache.weights, cache.sums), (due, after.weights, after.sums))


@every_layer
def test_from_the_middle_of_a_chunk_on_it_is_xla(name):
    run, rows = read(name, "kernel", begin=5)
    due, _ = read(name, "dual", begin=5)
    close(jax.jit(run)(*rows), jax.jit(due)(*rows))


@every_layer
@pytest.mark.parametrize("begin", [0, 5, 16])
def test_gradients_reach_every_token_and_the_initial_weights(name, begin):
    _, scale, state, norm = case(name)

    def gradient(form):
        def value(rows, state, norm):
            cache = layers.ttt_cache(state)
            if begin:
                first = (leaf[:begin] for leaf in rows)
                _, cache = layers.ttt_prefill(*first, scale, cache, norm, form="dual")
            rest = (leaf[begin:] for leaf in rows)
            out, cache = layers.ttt_prefill(*rest, scale, cache, norm, form=form)
            later = sum(jnp.sin(leaf).sum() for leaf in cache.weights)
            return jnp.sin(out).sum() + later + sum((leaf**2).sum() for leaf in cache.sums)

        return quickly(jax.grad(value, (0, 1, 2)), case(name)[0], state, norm)

    close(gradient("kernel"), gradient("dual"))


@pytest.mark.parametrize(("kind", "heads"), [(layers.TTTLinear, 2), (layers.TTTMLP, 2)])
def test_a_module_decides_once_for_all_its_sequences(kind, heads):
    """No select of two executions: the kernels' program is one branch of a condition."""
    sizes = {"width": heads * WIDTH, "heads": heads}
    x = jax.random.normal(jax.random.key(1), (3, 2 * CHUNK, heads * WIDTH))
    made = {}
    for form in ("kernel", "dual"):
        net = kind(**sizes, form=form)
        params = jax.jit(net.init)(jax.random.key(0), x)
        cache = net.apply(params, 3, method="empty_cache")

        def pages(params, x, cache, net=net):
            first, cache = net.apply(params, x[:, :CHUNK], cache=cache)
            # The second begins between two chunks, the third in the middle of one.
            second, cache = net.apply(params, x[:, CHUNK : CHUNK + 5], cache=cache)
            third, cache = net.apply(params, x[:, CHUNK + 5 :], cache=cache)
            return jnp.concatenate([first, second, third], 1), cache

        made[form] = quickly(pages, params, x, cache)
        if form == "kernel":
            program = jax.make_jaxpr(pages)(params, x, cache)
            for primitive in ("cond", "pallas_call"):
                assert len(list(equations(program.jaxpr, primitive))) == 3
    close(*made.values())
    whole = kind(**sizes, form="dual").apply(params, x)
    np.testing.assert_allclose(made["kernel"][0], whole, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_auto_takes_the_kernels_for_four_chunks_on_a_card(monkeypatch, dtype):
    rows, scale, state, norm = case("linear", 4 * CHUNK)

    def kernels(tokens):
        def run(*rows):
            return layers.ttt_prefill(*rows, scale, layers.ttt_cache(state), norm)

        part = (leaf[:tokens].astype(dtype) for leaf in rows)
        return len(list(equations(jax.make_jaxpr(run)(*part).jaxpr, "pallas_call")))

    assert kernels(4 * CHUNK) == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernels(4 * CHUNK - 1) == 0 and kernels(4 * CHUNK) == 1


@pytest.mark.parametrize("remat", [0, 1])
def test_gradients_of_padded_prompts(remat):
    """Padding that is no number has a gradient of zero, and none of its tokens spoils another's."""
    rows, scale, state, norm = case("linear")
    lengths = jnp.array([0, 5, 16, 21, 40])

    def gradient(form, fill):
        def value(state, rows, length):
            there = jnp.arange(TOKENS) < length
            rows = [
                jnp.where(there.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, fill) for leaf in rows
            ]
            out, cache = layers.ttt_prefill(
                *rows, scale, layers.ttt_cache(state), norm, length=length, form=form, remat=remat
            )
            later = sum(jnp.sin(leaf).sum() for leaf in (*cache.weights, *cache.sums))
            return jnp.where(there[:, None], jnp.sin(out), 0).sum() + later

        each = jax.vmap(jax.grad(value, (0, 1)), (None, None, 0))
        return quickly(each, state, rows, lengths)

    made = gradient("kernel", jnp.nan)
    close(made, gradient("dual", 1.0))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(made))


def test_gradients_reach_a_module_from_page_to_page():
    """A cache that a loop carries, between two chunks in some pages and in the middle in others."""
    x = jax.random.normal(jax.random.key(1), (3, 2, 24, 2 * WIDTH))

    def gradient(form):
        net = layers.TTTLinear(width=2 * WIDTH, heads=2, backbone="mamba", form=form)
        params = jax.jit(net.init)(jax.random.key(0), x[0])

        def value(params, x):
            def page(cache, tokens):
                out, cache = net.apply(params, tokens, cache=cache)
                return cache, jnp.sin(out).sum()

            empty = net.apply(params, 2, method="empty_cache")
            return jax.lax.scan(page, empty, x)[1].sum()

        return quickly(jax.grad(value, (0, 1)), params, x)

    close(gradient("kernel"), gradient("dual"))


def test_what_the_kernels_do_not_take_is_said():
    run, rows = read("linear", "primal")
    with pytest.raises(ValueError, match="form of ttt_prefill must be one of"):
        run(*rows)
    run, rows = read("linear", "kernel")
    with pytest.raises(ValueError, match="form='kernel' takes d among"):
        odd = [leaf[:, :10] if leaf.ndim == 2 else leaf for leaf in rows]
        norm = jnp.ones(10), jnp.zeros(10)
        cache = layers.ttt_cache((jnp.zeros((10, 10)), jnp.zeros(10)))
        layers.ttt_prefill(*odd, jnp.ones(CHUNK), cache, norm, form="kernel")


@every_layer
def test_one_answer_for_all_that_are_mapped_over(name):
    """Between two chunks in all, or XLA for all; derivatives of each, and of all, too."""
    rows, scale, state, norm = case(name)

    def caches(begin):
        first = (leaf[:16] for leaf in rows)
        read = functools.partial(layers.ttt_prefill, form="dual")
        return read(*first, scale, layers.ttt_cache(state), norm, length=begin)[1]

    for begins in (jnp.array([0, 16]), jnp.array([0, 5])):
        held = jax.vmap(caches)(begins)

        def value(weights, position, form, held=held):
            cache = held._replace(weights=weights, position=position)
            part = (leaf[:32] for leaf in rows)
            out, cache = layers.ttt_prefill(*part, scale, cache, norm, form=form)
            return jnp.sin(out).sum() + sum(jnp.sin(leaf).sum() for leaf in cache.weights)

        def each(weights, position, sums, form, value=value, held=held):
            def one(weights, position, sums):
                return value(weights, position, form, held._replace(sums=sums))

            return jax.vmap(jax.grad(one))(weights, position, sums)

        def together(weights, position, sums, form, value=value, held=held):
            def all_of(weights):
                return jax.vmap(lambda w, p, s: value(w, p, form, held._replace(sums=s)))(
                    weights, position, sums
                ).sum()

            return jax.grad(all_of)(weights)

        given = held.weights, held.position, held.sums
        due = quickly(functools.partial(each, form="dual"), *given)
        for way in (each, together):
            close(quickly(functools.partial(way, form="kernel"), *given), due)
        program = jax.make_jaxpr(functools.partial(each, form="kernel"))(*given)
        assert list(equations(program.jaxpr, "cond"))

"""The Linen modules of the TTT layers: against NumPy, their gradients and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from tests.core.compiling import quickly
from tests.layers import formulas
from tests.layers.test_ttt import relative, to
from ttt_jax import layers

KINDS = {"linear": layers.TTTLinear, "mlp": layers.TTTMLP}
BACKBONES = ("transformer", "mamba")
BATCH, WIDTH, HEADS, CHUNK = 2, 8, 2, 4
TOKENS = 22

every_kind = pytest.mark.parametrize("kind", KINDS)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def module(kind, backbone, dtype=jnp.float64, chunk=CHUNK, **settings):
    sizes = {"width": WIDTH, "heads": HEADS, "head_size": 6, "chunk_size": chunk}
    return KINDS[kind](**sizes, backbone=backbone, dtype=dtype, **settings)


@functools.cache
def parameters(kind, backbone, chunk=CHUNK):
    """Float64, all of them away from the values that they begin with."""
    net = module(kind, backbone, jnp.float32, chunk)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)))
    random = np.random.default_rng(0)
    size = {"gamma": 1.0, "scale": 1.0}

    def draw(path, leaf):
        return size.get(path[-1].key, 0.0) + 0.3 * random.normal(size=leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def tokens(count=TOKENS, batch=BATCH, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, count, WIDTH))


def in_numpy(kind, backbone, x, chunk=CHUNK):
    """One sequence ``[T, width]`` from the parameters, head by head."""
    p = parameters(kind, backbone, chunk)["params"]
    count = len(x)

    def dense(name):
        return x @ p[name]["kernel"] + p[name].get("bias", 0)

    if backbone == "mamba":
        shared = np.concatenate([np.zeros((3, 12)), dense("query_key")])
        q, k = (
            np.array([(shared[t : t + 4] * p[f"{name}_conv"]).sum(0) for t in range(count)])
            + p[f"{name}_conv_bias"]
            for name in ("query", "key")
        )
    else:
        q, k = dense("query"), dense("key")
    v, rates = dense("value"), dense("rate")
    names = ("weight", "bias") if kind == "linear" else ("weight_1", "bias_1", "weight_2", "bias_2")
    base = 1.0 if kind == "linear" else 0.1
    scale = np.maximum(1 / np.arange(1, chunk + 1) + p["position"], 0)
    outs = []
    for h in range(HEADS):
        own = slice(6 * h, 6 * h + 6)
        heads = [rotated(part[:, own], chunk) for part in (q, k)]
        gate = base / 6 / (1 + np.exp(-rates[:, h]))
        state, norm = [p[n][h] for n in names], (p["gamma"][h], p["beta"][h])
        outs.append(formulas.ttt(*heads, v[:, own], gate, scale, state, norm)[0])
    mixed = np.concatenate(outs, -1)
    mixed = np.stack([formulas.norm(row, p["norm"]["scale"], p["norm"]["bias"]) for row in mixed])
    if backbone == "mamba":
        mixed = formulas.gelu(dense("gate")) * mixed
    return mixed @ p["out"]["kernel"]


def rotated(x, chunk):
    """Pairs as complex numbers, by their position in the chunk."""
    pairs = x[:, 0::2] + 1j * x[:, 1::2]
    speed = 1e4 ** (-np.arange(0, 6, 2) / 6)
    pairs = pairs * np.exp(1j * np.outer(np.arange(len(x)) % chunk, speed))
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def applied(kind, backbone, *args, **kwargs):
    with jax.enable_x64(True):
        return quickly(
            lambda p, *a: module(kind, backbone).apply(p, *a, **kwargs),
            parameters(kind, backbone),
            *args,
        )


@every_kind
@every_backbone
@pytest.mark.parametrize("count", [1, 5, TOKENS])
def test_a_layer_is_its_formula(kind, backbone, count):
    x = tokens(count)
    out = applied(kind, backbone, x)
    assert out.shape == x.shape
    due = np.stack([in_numpy(kind, backbone, row) for row in x])
    assert relative(out, due) < 1e-12


@every_kind
@every_backbone
def test_a_layer_is_its_formula_over_a_thousand_tokens(kind, backbone):
    x = tokens(1000, 1)
    assert relative(applied(kind, backbone, x)[0], in_numpy(kind, backbone, x[0])) < 1e-11


@every_kind
@every_backbone
@pytest.mark.parametrize("count", [15, 16, 17, 100])
def test_a_layer_of_chunks_of_sixteen_is_its_formula(kind, backbone, count):
    """Around a whole chunk of the published size, in every form that runs here."""
    x, params = tokens(count, 1), parameters(kind, backbone, 16)
    due = in_numpy(kind, backbone, x[0], 16)
    with jax.enable_x64(True):
        for form in ("dual", "primal"):
            net = module(kind, backbone, chunk=16, form=form)
            assert relative(quickly(net.apply, params, x)[0], due) < 1e-12


@every_kind
@every_backbone
def test_no_token_of_a_layer_sees_a_later_one(kind, backbone):
    x, params = to(np.float32, tokens()), to(np.float32, parameters(kind, backbone))
    run = jax.jit(module(kind, backbone, jnp.float32).apply)
    due = np.asarray(run(params, x))
    for token in (0, 3, 9, TOKENS - 1):
        actual = np.asarray(run(params, x.at[:, token].add(0.5)))
        np.testing.assert_array_equal(actual[:, :token], due[:, :token])
        assert (actual[:, token] != due[:, token]).any()


@every_kind
@every_backbone
def test_in_single_and_half_precision(kind, backbone):
    x = tokens(128, 1)
    due = in_numpy(kind, backbone, x[0])
    single = to(np.float32, parameters(kind, backbone))
    for dtype, least in ((jnp.float32, 3e-6), (jnp.bfloat16, 4e-2)):
        net = module(kind, backbone, dtype)
        out = quickly(net.apply, single, x.astype(np.float32))
        assert out.dtype == dtype
        assert relative(out[0].astype(np.float32), due) < least


@pytest.mark.parametrize(("kind", "backbone"), [("linear", "transformer"), ("mlp", "mamba")])
def test_every_parameter_has_a_gradient(kind, backbone):
    """The step sizes, initial weights and position factors among them; of v through inner steps."""
    net = module(kind, backbone, jnp.float32)
    params, x = to(np.float32, parameters(kind, backbone)), to(np.float32, tokens())
    made = quickly(jax.grad(lambda p: (net.apply(p, x) ** 2).sum()), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, path


def test_initial_weights_are_as_published():
    net = layers.TTTMLP(width=32, heads=2, backbone="mamba")
    params = quickly(net.init, jax.random.key(0), jnp.zeros((1, 1, 32)))["params"]
    assert params["weight_1"].shape == (2, 16, 64) and params["weight_2"].shape == (2, 64, 16)
    for name in ("weight_1", "weight_2"):
        np.testing.assert_allclose(params[name].std(), 0.02, rtol=0.1)
    for name in ("bias_1", "bias_2", "position", "beta"):
        assert not params[name].any()
    assert (params["gamma"] == 1).all()
    assert net.base_rate == 0.1 and layers.TTTLinear(width=8, heads=2).base_rate == 1.0


def test_a_layer_is_a_model_function():
    net = module("linear", "transformer", jnp.float32)
    params, x = to(np.float32, parameters("linear", "transformer")), to(np.float32, tokens())
    apply = ttt.models.from_linen(net)
    np.testing.assert_array_equal(quickly(apply, params, x), quickly(net.apply, params, x))


WRONG = {
    "backbone": (dict(backbone="rnn"), "backbone must be one of ('transformer', 'mamba')"),
    "heads": (dict(heads=3), "width must be a multiple of heads"),
    "odd": (dict(head_size=5), "head_size must be even"),
    "count": (dict(chunk_size=0), "chunk_size must be an integer of at least 1, got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sizes_that_do_not_fit_are_refused(case):
    changes, words = WRONG[case]
    with pytest.raises(ValueError) as caught:
        layers.TTTLinear(**{"width": 8, "heads": 2, **changes})
    assert words in str(caught.value)


def test_tokens_that_do_not_fit_are_refused():
    net, params = module("linear", "mamba", jnp.float32), parameters("linear", "mamba")
    params, x = to(np.float32, params), to(np.float32, tokens(3))
    with pytest.raises(ValueError, match=r"A TTT layer takes x \[N, T, width\]"):
        net.apply(params, x[0])
    with pytest.raises(ValueError, match=r"takes mask of shape \(2, 3\)"):
        net.apply(params, x, mask=np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="segments or a cache, got both"):
        cache = jax.eval_shape(lambda: net.apply(params, BATCH, method="empty_cache"))
        net.apply(params, x, segments=np.zeros((2, 3), np.int32), cache=cache)

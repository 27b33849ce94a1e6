"""The convolution before a TTT layer of a decoder: formulas, caches, segments, gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.models.test_decoder import random_variables
from ttt_jax import layers, models
from ttt_jax.models import cache as caches

VOCABULARY, WIDTH, HEADS, DEPTH, EPSILON = 12, 8, 2, 2, 1e-5
SIZES = dict(vocabulary=VOCABULARY, width=WIDTH, depth=DEPTH, heads=HEADS, mlp_width=12)
LAYERS = {"ttt_linear": layers.TTTLinear, "ttt_mlp": layers.TTTMLP}
BACKBONES = ("transformer", "mamba")
every_mixer = pytest.mark.parametrize("mixer", LAYERS)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, (2, 102)).astype(np.int32)


def net(mixer="ttt_linear", backbone="transformer", dtype=jnp.float64, **more):
    settings = dict(mixer=mixer, backbone=backbone, dtype=dtype, pre_convolution=True)
    return models.Decoder(**SIZES | settings | more)


@functools.cache
def _drawn(mixer, backbone, chunk_size):
    drawn = random_variables(net(mixer, backbone, jnp.float32, chunk_size=chunk_size))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn)


def variables(module):
    """Float64, all of them away from the values that they begin with."""
    return _drawn(module.mixer, module.backbone, module.chunk_size)


def logits_of(module, inputs, cache=None, params=None):
    params = variables(module) if params is None else params
    with jax.enable_x64(module.dtype == jnp.float64):
        return quickly(module.apply, params, inputs, cache)


def rows_of(module, batch=2):
    with jax.enable_x64(module.dtype == jnp.float64):
        return jax.tree.map(np.asarray, module.empty_cache(batch, 1))


def normed(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale


def convolution(x, parameters):
    """``[T, c]``, channel by channel; NumPy's kernel begins with the token itself."""
    parts = [
        np.convolve(x[:, c], parameters["kernel"][::-1, c])[: len(x)] for c in range(x.shape[1])
    ]
    return np.stack(parts, -1) + parameters["bias"]


def in_numpy(mixer, backbone, tokens):
    """``[T] -> [T, V]``, but for the TTT layer itself."""
    params = variables(net(mixer, backbone))["params"]
    layer = LAYERS[mixer](width=WIDTH, heads=HEADS, backbone=backbone, dtype=jnp.float64)
    x = params["embedding"][tokens]
    for place in range(DEPTH):
        own = jax.tree.map(lambda leaf, place=place: leaf[place], params["layers"])
        x = x + convolution(normed(x, own["pre_conv_norm"]["scale"]), own["pre_conv"])
        with jax.enable_x64(True):
            given = normed(x, own["ttt_norm"]["scale"])[None]
            x = x + quickly(layer.apply, {"params": own["ttt"]}, given)[0]
        gate, up, down = (own["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        given = normed(x, own["mlp_norm"]["scale"])
        x = x + (given @ gate / (1 + np.exp(-given @ gate)) * (given @ up)) @ down
    return normed(x, params["norm"]["scale"]) @ params["embedding"].T


@every_mixer
@every_backbone
def test_a_decoder_is_its_formula(mixer, backbone):
    made = logits_of(net(mixer, backbone), TOKENS[:, :21])
    assert made.dtype == np.float64
    for row, tokens in zip(made, TOKENS[:, :21], strict=True):
        np.testing.assert_allclose(row, in_numpy(mixer, backbone, tokens), rtol=1e-11, atol=1e-11)


@every_mixer
@every_backbone
def test_reading_in_parts_is_reading_at_once(mixer, backbone):
    """A prompt of any length, then token by token over the end of a chunk."""
    module = net(mixer, backbone)
    document = logits_of(module, TOKENS)
    with jax.enable_x64(True):
        step = jax.jit(module.apply)
        for length in (1, 15, 16, 17, 100):
            whole = document[:, : length + 2]
            first, held = logits_of(module, TOKENS[:, :length], rows_of(module))
            parts = [first]
            for place in range(length, length + 2):
                row, held = step(variables(module), TOKENS[:, place : place + 1], held)
                parts.append(row)
            read = np.concatenate(parts, 1)
            np.testing.assert_allclose(read, whole, rtol=0, atol=1e-11 * np.abs(whole).max())
            assert held.taps.shape == (DEPTH, 2, 3, WIDTH) and held.taps.dtype == np.float64
            assert held.length.tolist() == [length + 2] * 2


def test_token_by_token_from_the_first_on():
    module = net("ttt_mlp", "mamba", chunk_size=4)
    whole = logits_of(module, TOKENS[:, :11])
    held, parts = rows_of(module), []
    with jax.enable_x64(True):
        step = jax.jit(module.apply)
        for place in range(11):
            row, held = step(variables(module), TOKENS[:, place : place + 1], held)
            parts.append(row)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=0, atol=1e-11)


def test_a_token_reaches_three_after_it_and_none_before():
    """Without the TTT layers' outputs the convolutions alone mix tokens: three a layer."""
    module = net(chunk_size=4)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "out" in [key.key for key in path] else leaf,
        variables(module),
    )
    changed = TOKENS[:, :21].copy()
    changed[:, 9] = (changed[:, 9] + 1) % VOCABULARY
    for params, last in ((silent, 9 + 3 * DEPTH), (variables(module), 20)):
        first, second = (logits_of(module, x, params=params) for x in (TOKENS[:, :21], changed))
        differs = (first != second).any(-1)
        assert differs[:, 9 : last + 1].all() and not differs[:, :9].any()
        assert not differs[:, last + 1 :].any()


@every_mixer
def test_packed_segments_are_each_alone(mixer):
    """Also those that are shorter than the convolution, forward and backward."""
    module, lengths = net(mixer, "mamba", chunk_size=4), (1, 7, 2, 3, 8)
    segments = np.repeat([[3, 1, 3, 4, 0]], lengths, axis=1).repeat(2, 0)
    tokens = TOKENS[:, : sum(lengths)]
    weights = np.random.default_rng(2).normal(size=(*tokens.shape, VOCABULARY))
    bounds = list(itertools.pairwise(np.cumsum((0, *lengths))))
    # Sequences of their own, in one batch: what fills them up comes last, where none sees it.
    alone = np.concatenate([np.pad(tokens[:, a:b], [(0, 0), (0, 8 - b + a)]) for a, b in bounds])

    def packed(params):
        out = module.apply(params, {"tokens": tokens, "segments": segments})
        return (out * weights).sum(), out

    def separate(params):
        rows = module.apply(params, alone).reshape(len(lengths), 2, 8, VOCABULARY)
        out = jnp.concatenate([row[:, :n] for row, n in zip(rows, lengths, strict=True)], 1)
        return (out * weights).sum(), out

    with jax.enable_x64(True):
        (gradient, out), (due, other) = (
            quickly(jax.grad(loss, has_aux=True), variables(module)) for loss in (packed, separate)
        )
    np.testing.assert_allclose(out, other, rtol=0, atol=1e-11)
    assert np.abs(due["params"]["layers"]["pre_conv"]["kernel"]).min() > 1e-3
    for actual, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(actual, leaf, rtol=0, atol=1e-10 * np.abs(leaf).max())


@pytest.mark.parametrize("places", [(0, 12), (9, 21), (4, 16)], ids=["right", "left", "both"])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_changes_nothing(places, cached):
    """Where it stands in the first sequence; the second has none before its last tokens."""
    module = net(backbone="mamba", chunk_size=4)
    tokens, positions = np.full((2, 21), 5, np.int32), np.full((2, 21), -1, np.int32)
    for row, start in enumerate((places[0], 0)):
        tokens[row, start : start + 12] = TOKENS[row, :12]
        positions[row, start : start + 12] = np.arange(12)
    held = rows_of(module) if cached else None
    made = logits_of(module, {"tokens": tokens, "positions": positions}, held)
    logits, held = made if cached else (made, None)
    whole = logits_of(module, TOKENS[:, :18])
    np.testing.assert_allclose(logits[0, slice(*places)], whole[0, :12], rtol=0, atol=1e-11)
    np.testing.assert_allclose(logits[1, :12], whole[1, :12], rtol=0, atol=1e-11)
    if cached:
        rest, _ = logits_of(module, TOKENS[:, 12:18], held)
        np.testing.assert_allclose(rest, whole[:, 12:], rtol=0, atol=1e-11)


def test_a_fresh_sequence_beside_an_old_one():
    """What its row of the cache holds is of no meaning, and reading nothing leaves it fresh."""
    module = net("ttt_mlp", chunk_size=4)
    whole = logits_of(module, TOKENS[:, :9])
    empty = rows_of(module)
    filled = jax.tree.map(lambda leaf: leaf + 7, (empty.layers, empty.taps))
    held = caches.States(filled[0], empty.length, filled[1])
    positions = np.stack([np.arange(5), np.full(5, -1)]).astype(np.int32)
    _, held = logits_of(module, {"tokens": TOKENS[:, :5], "positions": positions}, held)
    assert held.length.tolist() == [5, 0]
    rest, held = logits_of(module, np.stack([TOKENS[0, 5:9], TOKENS[1, :4]]), held)
    np.testing.assert_allclose(rest[0], whole[0, 5:9], rtol=0, atol=1e-11)
    np.testing.assert_allclose(rest[1], whole[1, :4], rtol=0, atol=1e-11)
    # The inputs of the first layer's convolution, newest last.
    params = variables(module)["params"]
    last = np.stack([TOKENS[0, 6:9], TOKENS[1, 1:4]])
    due = normed(params["embedding"][last], params["layers"]["pre_conv_norm"]["scale"][0])
    np.testing.assert_allclose(held.taps[0], due, rtol=0, atol=1e-12)


def test_what_was_read_is_put_or_not():
    module = net(chunk_size=4)
    before = rows_of(module)
    logits, after = logits_of(module, TOKENS[:, :5], before)
    with jax.enable_x64(True):
        again, rows = quickly(
            lambda params: module.apply(params, TOKENS[:, :5], before, write=False),
            variables(module),
        )
        kept, left = (caches.put(before, rows, kept) for kept in (True, False))
    np.testing.assert_array_equal(again, logits)
    for actual, due in ((rows, after), (kept, after), (left, before)):
        jax.tree.map(np.testing.assert_array_equal, actual, due)
    assert np.abs(after.taps).min() > 0 and not before.taps.any()


def test_gradients_through_a_cache():
    """Of what later tokens say, as of one call, where they are asked for."""

    def gradient(module, parts):
        def loss(params):
            held = module.empty_cache(2, 1)
            _, held = module.apply(params, TOKENS[:, :7], held)
            return jnp.square(module.apply(params, TOKENS[:, 7:12], held)[0]).sum()

        def at_once(params):
            return jnp.square(module.apply(params, TOKENS[:, :12])[:, 7:]).sum()

        with jax.enable_x64(True):
            return quickly(jax.grad(loss if parts else at_once), variables(module))

    module = net(chunk_size=4, cache_gradients=True, remat=True)
    due, through = gradient(module, False), gradient(module, True)
    held = gradient(module.clone(cache_gradients=False), True)
    for actual, other in zip(jax.tree.leaves(through), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(actual, other, rtol=0, atol=1e-10 * np.abs(other).max())
    kernels = (tree["params"]["layers"]["pre_conv"]["kernel"] for tree in (held, due))
    assert np.abs(np.subtract(*kernels)).max() > 1e-2


def test_stages_and_recomputation_change_nothing():
    module = net(backbone="mamba", chunk_size=4)
    due, states = logits_of(module, TOKENS[:, :9], rows_of(module))
    again = module.clone(remat=True, stages=(1, 1), unroll=2)
    leaves = dict(variables(module)["params"])
    shared = leaves.pop("layers")
    for place in range(2):
        part = slice(place, place + 1)
        leaves[f"layers_{place}"] = jax.tree.map(lambda leaf, part=part: leaf[part], shared)
    made, other = logits_of(again, TOKENS[:, :9], rows_of(again), {"params": leaves})
    np.testing.assert_allclose(made, due, rtol=0, atol=1e-11)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), other, states)


@every_mixer
def test_in_half_precision(mixer):
    """Logits of the same parameters, whole and from a cache, near those in double precision."""
    due = logits_of(net(mixer), TOKENS[:, :20])
    module = net(mixer, dtype=jnp.bfloat16)
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), variables(module))
    whole = logits_of(module, TOKENS[:, :20], params=single)
    first, held = logits_of(module, TOKENS[:, :17], rows_of(module), single)
    assert held.taps.dtype == jnp.bfloat16
    rest, _ = logits_of(module, TOKENS[:, 17:20], held, single)
    for made in (whole, np.concatenate([first, rest], 1)):
        assert made.dtype == np.float32
        assert np.linalg.norm(made - due) < 0.05 * np.linalg.norm(due)


def test_it_begins_as_the_convolutions_of_a_layer_do():
    module = net(dtype=jnp.float32, width=256, depth=1)
    params = quickly(module.init, jax.random.key(0), TOKENS[:1, :2])["params"]["layers"]
    kernel = params["pre_conv"]["kernel"][0]
    assert kernel.shape == (4, 256) and kernel.dtype == np.float32
    # 0.5 is 4 ** -0.5; of 1024 numbers.
    assert abs(kernel.std() - 0.5) < 0.05 and abs(kernel.mean()) < 0.05
    assert not params["pre_conv"]["bias"].any() and (params["pre_conv_norm"]["scale"] == 1).all()
    plain = module.clone(pre_convolution=False)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), TOKENS[:1, :2])["params"]["layers"]
    assert set(params) - set(shapes) == {"pre_conv", "pre_conv_norm"}
    assert plain.empty_cache(2, 1).taps is None


def test_with_attention_it_is_refused():
    with pytest.raises(ValueError) as error:
        net(mixer="attention")
    assert str(error.value) == (
        "pre_convolution is of TTT layers, and mixer='attention' has none; got "
        "pre_convolution=True: leave it out, or choose mixer='ttt_linear' or 'ttt_mlp'."
    )

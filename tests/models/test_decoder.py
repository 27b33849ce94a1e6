"""Decoders: packed and padded sequences, caches, stages, recomputed activations, constants."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import ttt_jax as ttt
from ttt_jax import losses, methods, models

VOCABULARY, TOKENS = 32, 22
SIZES = dict(
    vocabulary=VOCABULARY, width=16, depth=3, heads=4, kv_heads=2, mlp_width=24, attention="xla"
)
GEMMA = dict(
    head_size=8,
    local_window=4,
    global_every=3,
    local_rope_base=30.0,
    query_key_norm=True,
    post_norms=True,
    scaled_embedding=True,
    activation="gelu",
)
LLAMA = models.Decoder(**SIZES, interleaved=True, biases=True, tied=False)
WINDOWED = models.Decoder(**SIZES, window=7, sinks=2)
LOCAL = models.Decoder(**SIZES, **GEMMA, window=9, sinks=2)
MODULES = {"llama": LLAMA, "windowed": WINDOWED, "local": LOCAL}
EVERY = pytest.mark.parametrize("name", MODULES)


def random_variables(module, seed=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(scale=0.3, size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + values if path[-1].key == "scale" else values)

    return jax.tree_util.tree_map_with_path(draw, shapes)


VARIABLES = {name: random_variables(module) for name, module in MODULES.items()}
DOCUMENT = np.random.default_rng(5).integers(0, VOCABULARY, (2, TOKENS)).astype(np.int32)
APPLY = {name: jax.jit(module.apply) for name, module in MODULES.items()}


def logits_of(name, inputs, cache=None):
    return APPLY[name](VARIABLES[name], inputs, cache)


@pytest.fixture(scope="module")
def whole():
    """Logits of the document in one call, by module."""
    return {name: np.asarray(logits_of(name, DOCUMENT)) for name in MODULES}


@EVERY
def test_packed_documents_do_not_see_each_other(whole, name):
    """Rows hold 9 and 13 tokens of two documents."""
    segments = np.repeat([[3, 1]], [9, 13], axis=1).repeat(2, 0)
    tokens = np.concatenate([DOCUMENT[:, :9], DOCUMENT[:, :13]], 1)
    packed = logits_of(name, {"tokens": tokens, "segments": segments})
    # Each is what it is alone: positions begin anew.
    np.testing.assert_allclose(packed[:, :9], whole[name][:, :9], atol=2e-5)
    np.testing.assert_allclose(packed[:, 9:], whole[name][:, :13], atol=2e-5)
    for place, own, other in ((0, slice(9), slice(9, None)), (9, slice(9, None), slice(9))):
        changed = tokens.copy()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        again = logits_of(name, {"tokens": changed, "segments": segments})
        np.testing.assert_array_equal(again[:, other], packed[:, other])
        assert (np.asarray(again[:, own]) != np.asarray(packed[:, own])).all(-1).any()


def test_a_number_that_comes_again_is_another_segment():
    again = logits_of(
        "llama", {"tokens": DOCUMENT, "segments": np.arange(TOKENS) % 8 // 4 + 0 * DOCUMENT}
    )
    apart = logits_of(
        "llama", {"tokens": DOCUMENT, "segments": np.arange(TOKENS) // 4 + 0 * DOCUMENT}
    )
    np.testing.assert_array_equal(again, apart)


@EVERY
@pytest.mark.parametrize("before", [0, 5])
def test_padding_changes_nothing(whole, name, before):
    """Before or after the tokens, whatever it holds."""
    place = slice(before, before + TOKENS - 5)
    positions = np.full((2, TOKENS), -1, np.int32)
    positions[:, place] = np.arange(TOKENS - 5)
    tokens = np.zeros_like(DOCUMENT)
    tokens[:, place] = DOCUMENT[:, : TOKENS - 5]
    padded = logits_of(name, {"tokens": tokens, "positions": positions})
    np.testing.assert_allclose(padded[:, place], whole[name][:, : TOKENS - 5], atol=2e-5)
    other = np.where(positions < 0, 7, tokens)
    again = logits_of(name, {"tokens": other, "positions": positions})
    np.testing.assert_array_equal(again[:, place], padded[:, place])
    assert np.isfinite(padded).all()


@EVERY
def test_a_token_sees_none_after_it(whole, name):
    changed = DOCUMENT.copy()
    changed[:, 15] = (changed[:, 15] + 1) % VOCABULARY
    again = logits_of(name, changed)
    np.testing.assert_array_equal(again[:, :15], whole[name][:, :15])
    assert (again[:, 15] != whole[name][:, 15]).any()


@pytest.mark.parametrize(
    ("name", "chunk"), [("llama", 5), ("windowed", 1), ("windowed", 5), ("local", 5)]
)
def test_a_cache_changes_no_logits(whole, name, chunk):
    module = MODULES[name]
    cache = module.empty_cache(2, TOKENS, chunk)
    # With a window, early tokens have been forgotten at the end.
    assert (cache.slots < TOKENS) == (module.window is not None)
    # What is left over comes in a call with padding.
    pad = -TOKENS % chunk
    tokens = np.pad(DOCUMENT, [(0, 0), (0, pad)])
    positions = np.pad(np.arange(TOKENS, dtype=np.int32), (0, pad), constant_values=-1)
    rows = []
    for start in range(0, TOKENS, chunk):
        part = slice(start, start + chunk)
        given = {"tokens": tokens[:, part], "positions": np.stack([positions[part]] * 2)}
        logits, cache = logits_of(name, given, cache)
        rows.append(logits)
    rows = np.concatenate(rows, 1)[:, :TOKENS]
    np.testing.assert_allclose(rows, whole[name], atol=1e-4)
    assert cache.length.tolist() == [TOKENS, TOKENS]


def test_positions_follow_those_of_the_cache(whole):
    cache = LOCAL.empty_cache(2, TOKENS, 11)
    first, cache = logits_of("local", DOCUMENT[:, :11], cache)
    # The second half twice: what is read again replaces itself.
    again = {"tokens": DOCUMENT[:, 11:], "positions": np.arange(11, 22, dtype=np.int32)[None]}
    again["positions"] = again["positions"].repeat(2, 0)
    second, read = logits_of("local", DOCUMENT[:, 11:], cache)
    third, read = logits_of("local", again, read)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole["local"], atol=1e-4)
    np.testing.assert_allclose(third, second, atol=1e-6)
    np.testing.assert_array_equal(read.positions, np.arange(22)[None].repeat(2, 0))


def test_a_window_sees_its_tokens_and_the_sinks():
    """The last logits depend on the sinks and on what layers of windows reach, on no other."""
    shallow = WINDOWED.clone(depth=1)
    variables = random_variables(shallow)
    apply = jax.jit(lambda tokens: shallow.apply(variables, tokens)[:, -1])
    last, seen = apply(DOCUMENT), []
    for place in range(TOKENS):
        changed = DOCUMENT.copy()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        seen.append(bool((apply(changed) != last).any()))
    assert [place for place, hit in enumerate(seen) if hit] == [0, 1, *range(15, 22)]


def test_moved_positions_change_nothing_without_sinks():
    module = WINDOWED.clone(sinks=0)
    moved = module.clone(context=8)
    variables = VARIABLES["windowed"]
    due, out = (jax.jit(each.apply)(variables, DOCUMENT) for each in (module, moved))
    np.testing.assert_allclose(out, due, atol=1e-4)


def test_stages_are_one_scan(whole):
    """Local, because a stage has to know which layers it holds."""
    name = "local"
    staged = MODULES[name].clone(stages=(2, 1))
    flat = traverse_util.flatten_dict(VARIABLES[name]["params"], sep="/")
    cut = {path: leaf for path, leaf in flat.items() if not path.startswith("layers/")}
    for path, leaf in flat.items():
        if path.startswith("layers/"):
            rest = path.removeprefix("layers")
            cut[f"layers_0{rest}"], cut[f"layers_1{rest}"] = leaf[:2], leaf[2:]
    variables = {"params": traverse_util.unflatten_dict(cut, sep="/")}
    np.testing.assert_allclose(jax.jit(staged.apply)(variables, DOCUMENT), whole[name], atol=1e-5)


def test_recomputed_activations_change_no_score_and_no_cache():
    """A checkpoint that appended to the cache again would show in the second chunk."""
    document = {"tokens": DOCUMENT[0, :20].reshape(4, 5), "mask": np.ones((4, 5), bool)}
    select = ttt.select.paths(".*/query/kernel", ".*/down/kernel")
    runs = []
    for module in (WINDOWED, WINDOWED.clone(remat=True)):
        adapt = methods.document_ttt(models.reader(module), select=select, num_steps=1)
        nats, info = jax.jit(adapt)(VARIABLES["windowed"], document, jax.random.key(0))
        cache = module.empty_cache(2, TOKENS, TOKENS)

        def loss(variables, module=module, cache=cache):
            logits, cache = module.apply(variables, DOCUMENT, cache)
            return jax.nn.logsumexp(logits, -1).mean(), cache

        gradient, cache = jax.jit(jax.grad(loss, has_aux=True))(VARIABLES["windowed"])
        runs.append((nats, info.loss, gradient, cache))
    assert bool(info.ok) and bool(info.updated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *runs)


def test_sequences_at_once_are_each_alone(whole):
    alone = np.concatenate([logits_of("local", row[None]) for row in DOCUMENT])
    np.testing.assert_allclose(alone, whole["local"], atol=2e-5)


def test_logits_are_float32_whatever_the_compute_dtype(whole):
    narrow = LLAMA.clone(dtype=jnp.bfloat16)
    logits = jax.jit(narrow.apply)(VARIABLES["llama"], DOCUMENT)
    assert logits.dtype == jnp.float32
    assert narrow.empty_cache(1, 4).keys.dtype == jnp.bfloat16
    assert 0 < np.abs(logits - whole["llama"]).max() < 0.2


def test_logits_of_another_dtype_are_those_rounded():
    """So are their gradients, which come through products in the compute dtype either way."""
    variables, tokens = VARIABLES["llama"], DOCUMENT[:, :8]
    wide, narrow = (
        LLAMA.clone(dtype=jnp.bfloat16, logits_dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    logits, rounded = (jax.jit(net.apply)(variables, tokens) for net in (wide, narrow))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(logits.astype(jnp.bfloat16), rounded)

    def gradient(net):
        loss = losses.next_token(models.decoder_function(net), batch=True)
        return jax.jit(jax.grad(loss))(variables, tokens, jax.random.key(0))

    leaves = zip(jax.tree.leaves(gradient(wide)), jax.tree.leaves(gradient(narrow)), strict=True)
    for due, made in leaves:
        assert made.dtype == due.dtype
        assert jnp.abs(made - due).max() < 0.03 * jnp.abs(due).max()
    assert LLAMA.clone(logits_dtype=jnp.bfloat16).empty_cache(1, 4).keys.dtype == jnp.float32


LARGEST_CONSTANT = 1 << 20


def constants_of(text):
    """Bytes of each array that a lowered program holds; a splat, ``dense<0.0>``, is no array."""
    arrays = re.findall(r'dense<["\[][^>]*> : tensor<([\dx]+)x[a-z]+(\d+)', text)
    return [
        math.prod(map(int, shape.split("x"))) * max(1, int(bits) // 8) for shape, bits in arrays
    ]


def test_base_weights_are_no_constants():
    """The one leaf over a mebibyte is an argument; captured, it would be in the program."""
    module = models.Decoder(**{**SIZES, "mlp_width": 20_000, "depth": 1, "attention": "xla"})
    variables = random_variables(module)
    assert max(leaf.nbytes for leaf in jax.tree.leaves(variables)) > LARGEST_CONSTANT
    document = {"tokens": DOCUMENT[0, :20].reshape(4, 5), "mask": np.ones((4, 5), bool)}
    adapt = methods.document_ttt(models.reader(module), select=ttt.select.paths(".*/query/kernel"))
    key = jax.random.key(0)
    text = jax.jit(adapt).lower(variables, document, key).as_text()
    assert max(constants_of(text), default=0) < LARGEST_CONSTANT
    captured = jax.jit(lambda document, key: adapt(variables, document, key))
    assert max(constants_of(captured.lower(document, key).as_text())) > LARGEST_CONSTANT


def refusal(inputs, cache=None):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(LLAMA.init, jax.random.key(0), inputs, cache)
    return str(error.value)


def test_bad_inputs_are_refused():
    cache = LLAMA.empty_cache(2, TOKENS)
    assert "got shape (22,)" in refusal(DOCUMENT[0])
    assert "float32" in refusal(DOCUMENT.astype(np.float32))
    packed = {"tokens": DOCUMENT, "segments": DOCUMENT}
    assert "segments or a cache, got both" in refusal(packed, cache)
    for changes, words in (
        ({"kv_heads": 3}, "kv_heads=3 and heads=4"),
        ({"heads": 3, "kv_heads": 3}, "heads=3 and width=16"),
        ({"head_size": 5}, "head_size=5"),
        ({"activation": "relu"}, "got 'relu'"),
        ({"attention": "flash"}, "got 'flash'"),
        ({"stages": (2, 2)}, "stages=(2, 2) and depth=3"),
        ({"stages": (3, 0)}, "stages=(3, 0) and depth=3"),
    ):
        with pytest.raises(ValueError) as error:
            LLAMA.clone(**changes)
        assert words in str(error.value)


def test_rows_that_were_not_read_are_shaped_as_those_that_were():
    """The guard of a document chooses between the two."""
    net = models.Decoder(
        vocabulary=8, width=16, depth=3, heads=2, kv_heads=1, mlp_width=8, window=6, sinks=1
    )
    tokens = jnp.zeros((2, 4), jnp.int32)
    params = jax.jit(net.init)(jax.random.key(0), tokens)
    read = models.reader(net)
    memory = read.init(2, 12, 4)
    inputs = {"tokens": tokens, "positions": jnp.broadcast_to(jnp.arange(4)[None], (2, 4))}
    _, rows = jax.jit(read.parts.ahead)(params, memory, inputs)
    nothing = read.parts.nothing(memory, inputs)
    for made, none in zip(rows, nothing, strict=True):
        assert (made.shape, made.dtype) == (none.shape, none.dtype)
        assert not none.any()
    kept = read.parts.keep(memory, rows, jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, kept, memory)
    whole = jax.jit(read.read)(params, memory, inputs)[1]
    taken = jax.jit(read.parts.keep)(memory, rows, jnp.bool_(True))
    jax.tree.map(np.testing.assert_array_equal, taken, whole)

"""Decoders of layers that learn: caches, causality, packed and padded sequences, generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util

import ttt_jax as ttt
from tests.models.test_decoder import random_variables
from ttt_jax import generation, methods, models

VOCABULARY, TOKENS, WIDTH, DEPTH, HEADS = 24, 21, 16, 2, 2
SIZES = dict(vocabulary=VOCABULARY, width=WIDTH, depth=DEPTH, heads=HEADS, mlp_width=24)
MODULES = {
    "linear": models.Decoder(**SIZES, mixer="ttt_linear", chunk_size=4),
    "linear mamba": models.Decoder(**SIZES, mixer="ttt_linear", backbone="mamba", chunk_size=4),
    "mlp": models.Decoder(
        **SIZES, mixer="ttt_mlp", backbone="mamba", chunk_size=4, pre_convolution=True
    ),
}
EVERY = pytest.mark.parametrize("name", MODULES)
DOCUMENT = np.random.default_rng(5).integers(0, VOCABULARY, (2, TOKENS)).astype(np.int32)
VARIABLES = {name: random_variables(module) for name, module in MODULES.items()}
APPLY = {name: jax.jit(module.apply) for name, module in MODULES.items()}


def logits_of(name, inputs, cache=None):
    return APPLY[name](VARIABLES[name], inputs, cache)


@pytest.fixture(scope="module")
def whole():
    return {name: np.asarray(logits_of(name, DOCUMENT)) for name in MODULES}


@EVERY
def test_a_cache_changes_no_logits(whole, name):
    """In calls of 5, which is no multiple of the chunk, then token by token."""
    cache = MODULES[name].empty_cache(2, TOKENS, 5)
    rows = []
    for start, stop in [(0, 5), (5, 10), (10, 15), *((at, at + 1) for at in range(15, TOKENS))]:
        logits, cache = logits_of(name, DOCUMENT[:, start:stop], cache)
        rows.append(logits)
    np.testing.assert_allclose(np.concatenate(rows, 1), whole[name], atol=1e-4)
    assert cache.length.tolist() == [TOKENS, TOKENS]
    sizes = {leaf.shape for leaf in jax.tree.leaves(MODULES[name].empty_cache(2, 1000, 500))}
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == sizes


@EVERY
def test_a_token_sees_none_after_it(whole, name):
    changed = DOCUMENT.copy()
    changed[:, 14] = (changed[:, 14] + 1) % VOCABULARY
    again = np.asarray(logits_of(name, changed))
    np.testing.assert_array_equal(again[:, :14], whole[name][:, :14])
    assert (again[:, 14:] != whole[name][:, 14:]).any(-1).all()


@EVERY
def test_packed_documents_are_each_alone(whole, name):
    segments = np.repeat([[3, 1]], [9, 13], axis=1).repeat(2, 0)
    tokens = np.concatenate([DOCUMENT[:, :9], DOCUMENT[:, :13]], 1)
    packed = logits_of(name, {"tokens": tokens, "segments": segments})
    np.testing.assert_allclose(packed[:, :9], whole[name][:, :9], atol=2e-5)
    np.testing.assert_allclose(packed[:, 9:], whole[name][:, :13], atol=2e-5)


@EVERY
@pytest.mark.parametrize("cached", [False, True])
def test_padding_changes_nothing_wherever_it_is(whole, name, cached):
    """Before, between and after the tokens, another place in each sequence, then they go on."""
    places = np.stack([[*range(2, 9), *range(11, 21)], [*range(12), *range(15, 20)]])
    positions = np.full((2, TOKENS), -1, np.int32)
    tokens = np.full((2, TOKENS), 7, np.int32)
    for row, place in enumerate(places):
        positions[row, place] = np.arange(17)
        tokens[row, place] = DOCUMENT[row, :17]
    cache = MODULES[name].empty_cache(2, TOKENS) if cached else None
    padded = logits_of(name, {"tokens": tokens, "positions": positions}, cache)
    logits, cache = padded if cached else (padded, None)
    for row, place in enumerate(places):
        np.testing.assert_allclose(logits[row, place], whole[name][row, :17], atol=1e-4)
    if cached:
        assert cache.length.tolist() == [17, 17]
        rest, after = logits_of(name, DOCUMENT[:, 17:], cache)
        np.testing.assert_allclose(rest, whole[name][:, 17:], atol=1e-4)
        # One token that is padding leaves the state as it is.
        nothing = {"tokens": tokens[:, :1], "positions": np.full((2, 1), -1, np.int32)}
        _, same = logits_of(name, nothing, after)
        jax.tree.map(np.testing.assert_array_equal, same, after)


def test_each_sequence_of_a_batch_may_have_read_its_own_number(whole):
    """Where the first has read five tokens, the second none."""
    name = "linear mamba"
    positions = np.stack([np.arange(5), np.full(5, -1)]).astype(np.int32)
    cache = MODULES[name].empty_cache(2, TOKENS)
    _, cache = logits_of(name, {"tokens": DOCUMENT[:, :5], "positions": positions}, cache)
    assert cache.length.tolist() == [5, 0]
    tokens = np.stack([DOCUMENT[0, 5:10], DOCUMENT[1, :5]])
    logits, cache = logits_of(name, tokens, cache)
    np.testing.assert_allclose(logits[0], whole[name][0, 5:10], atol=1e-4)
    np.testing.assert_allclose(logits[1], whole[name][1, :5], atol=1e-4)


@EVERY
def test_generation_goes_on_as_without_a_cache(name):
    """Greedy continuations, by reading all anew for every token."""
    prompt, count = DOCUMENT[0, :6], 4
    predict = generation.generate(models.reader(MODULES[name]), num_tokens=count, chunk=4)
    made, info = jax.jit(predict)(VARIABLES[name], prompt, jax.random.key(0))
    sequence, nats = list(prompt), []
    for _ in range(count):
        padded = np.zeros((2, TOKENS), np.int32)
        padded[:, : len(sequence)] = sequence
        scores = jax.nn.log_softmax(logits_of(name, padded)[0, len(sequence) - 1])
        sequence.append(int(scores.argmax()))
        nats.append(-float(scores.max()))
    assert made.tokens.tolist() == sequence[len(prompt) :] and bool(info.ok)
    np.testing.assert_allclose(made.nats, nats, atol=1e-4)


def test_documents_are_scored_and_learned_from(whole):
    """Without updates the scores are those of the whole; a chunk is read into the state once."""
    name = "mlp"
    read = models.reader(MODULES[name])
    x = {"tokens": DOCUMENT[0, :20].reshape(4, 5), "mask": np.ones((4, 5), bool)}
    score = jax.jit(methods.document_ttt(read, num_steps=0))
    nats, _ = score(VARIABLES[name], x, jax.random.key(0))
    log_probs = jax.nn.log_softmax(whole[name][0])
    due = -np.take_along_axis(np.asarray(log_probs)[:19], DOCUMENT[0, 1:20, None], 1)[:, 0]
    np.testing.assert_allclose(nats.reshape(-1)[1:], due, atol=1e-4)
    select = ttt.select.paths(".*/down/kernel")
    adapt = jax.jit(methods.document_ttt(read, select=select, num_steps=2))
    learned, info = adapt(VARIABLES[name], x, jax.random.key(0))
    assert bool(info.ok)
    np.testing.assert_allclose(learned[0], nats[0], atol=1e-5)
    assert (np.asarray(learned[1:]) != np.asarray(nats[1:])).any()


def test_low_rank_leaves_go_onto_the_projections():
    pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")
    net, params = models.low_rank(
        MODULES["linear mamba"],
        VARIABLES["linear mamba"],
        jax.random.key(1),
        DOCUMENT[:1, :2],
        rank=2,
        alpha=2.0,
        paths=[".*ttt/.*"],
    )
    paths = set(ttt.select.describe(ttt.select.lora(), params).paths)
    names = ("gate", "out", "query_key", "rate", "value")
    assert paths == {
        f"params/layers/ttt/{name}/kernel_lora_{side}" for name in names for side in "ab"
    }
    due = logits_of("linear mamba", DOCUMENT)
    np.testing.assert_allclose(net.apply(params, DOCUMENT), due, atol=1e-5)


def test_parameters_are_as_many_as_the_formulas_say():
    inner = WIDTH * WIDTH
    block = 3 * WIDTH * 24 + 2 * WIDTH
    rate, norms, size = WIDTH * HEADS + HEADS, 2 * WIDTH + 2 * WIDTH, WIDTH // HEADS
    taps = {"transformer": 0, "mamba": 2 * 5 * WIDTH}
    fast = {
        "ttt_linear": HEADS * (size * size + size),
        "ttt_mlp": HEADS * (8 * size * size + 5 * size),
    }
    for name, module in MODULES.items():
        mixing = 4 * inner + rate + norms + 4 + taps[module.backbone] + fast[module.mixer]
        before = 6 * WIDTH if module.pre_convolution else 0
        total = VOCABULARY * WIDTH + WIDTH + DEPTH * (block + before + mixing)
        assert sum(leaf.size for leaf in jax.tree.leaves(VARIABLES[name])) == total


def test_every_parameter_has_a_gradient():
    name = "mlp"

    def loss(variables):
        log_probs = jax.nn.log_softmax(MODULES[name].apply(variables, DOCUMENT)[:, :-1])
        return -jnp.take_along_axis(log_probs, DOCUMENT[:, 1:, None], -1).mean()

    gradient = jax.jit(jax.grad(loss))(VARIABLES[name])
    for path, leaf in tree_util.tree_leaves_with_path(gradient):
        assert leaf.any() and np.isfinite(leaf).all(), path


def test_stages_and_recomputation_change_nothing(whole):
    name = "linear"
    again = MODULES[name].clone(remat=True)
    np.testing.assert_allclose(
        jax.jit(again.apply)(VARIABLES[name], DOCUMENT), whole[name], atol=1e-5
    )
    staged = MODULES[name].clone(stages=(1, 1))
    leaves = dict(VARIABLES[name]["params"])
    layers = leaves.pop("layers")
    for place in range(2):
        part = slice(place, place + 1)
        leaves[f"layers_{place}"] = jax.tree.map(lambda leaf, part=part: leaf[part], layers)
    cache = staged.empty_cache(2, TOKENS)
    logits, _ = jax.jit(staged.apply)({"params": leaves}, DOCUMENT, cache)
    np.testing.assert_allclose(logits, whole[name], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixer": "mamba"}, "mixer must be one of ('attention', 'ttt_linear', 'ttt_mlp')"),
        ({"window": 4}, "window is of attention, and mixer='ttt_linear' has none; got window=4"),
        ({"sinks": 2}, "got sinks=2: leave it out"),
        ({"backbone": "rwkv"}, "got 'rwkv'"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"form": "fast"}, "form must be one of"),
    ],
)
def test_attributes_that_are_refused(changes, words):
    with pytest.raises(ValueError) as error:
        MODULES["linear"].clone(**changes)
    assert words in str(error.value)

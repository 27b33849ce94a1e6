"""Generation with a cache against a loop without one; padding, samplers, stops, own adapters."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from tests.models import small_decoder as small
from ttt_jax import generation, models, readers, select

pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

PROMPT, TOKENS, NUM = 5, 6, 3
KEYS = ttt.sample_keys(jax.random.key(3), np.arange(NUM))
PROMPTS = small.draw_tokens(NUM, PROMPT)


@pytest.fixture(scope="module")
def model():
    return small.with_factors()


@pytest.fixture(scope="module")
def adapters(model):
    return small.drawn_adapters(model[1], NUM)


def slow_greedy(net, params, prompt, num_tokens):
    """The whole sequence read anew for every token; no cache, no padding."""
    sequence = list(map(int, prompt))
    nats = []
    length = len(sequence) + num_tokens
    apply = jax.jit(net.apply)
    for _ in range(num_tokens):
        # Later tokens are not seen, so one shape serves all lengths.
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(sequence)] = sequence
        scores = np.asarray(jax.nn.log_softmax(apply(params, padded)[0, len(sequence) - 1]))
        sequence.append(int(scores.argmax()))
        nats.append(-scores.max())
    return np.array(sequence[len(prompt) :]), np.array(nats)


@pytest.fixture(scope="module")
def run(model):
    """All prompts, each with its own adapter, in one compiled program."""
    predict = generation.generate(models.reader(model[0]), num_tokens=TOKENS, chunk=2)
    return jax.jit(ttt.batched(ttt.adapted(predict, select=select.lora())))


@pytest.fixture(scope="module")
def together(model, adapters, run):
    return run(model[1], (adapters, {"tokens": PROMPTS}), KEYS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_continuations_are_scored_as_they_were_drawn(model, side):
    net, params = model
    read = models.reader(net)
    pad = ((2, 0) if side == "left" else (0, 2),)
    prompt = {
        "tokens": np.pad(PROMPTS[0], pad),
        "mask": np.pad(np.ones(PROMPT, bool), pad),
    }
    draw = generation.generate(
        read, num_tokens=TOKENS, sampler=generation.sample(), stop=tuple(range(8))
    )
    made, _ = jax.jit(jax.vmap(draw, (None, None, 0)))(params, prompt, KEYS)
    assert made.mask[:, 0].all() and not made.mask.all()
    log_probs = jax.jit(generation.log_probs(read))(params, prompt, made)
    np.testing.assert_allclose(log_probs, -made.nats, atol=1e-4)
    grads = jax.grad(lambda p: generation.log_probs(read)(p, prompt, made).sum())(params)
    assert any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_every_prompt_goes_on_as_without_a_cache_and_alone(model, adapters, together):
    net, params = model
    made, info = together
    frozen = select.lora().split(params)[1]
    found = []
    for place in range(NUM):
        own = select.lora().merge(small.row_of(adapters, place), frozen)
        tokens, nats = slow_greedy(net, own, PROMPTS[place], TOKENS)
        np.testing.assert_array_equal(made.tokens[place], tokens)
        np.testing.assert_allclose(made.nats[place], nats, rtol=1e-4, atol=1e-5)
        found.append(tuple(tokens))
    assert made.mask.all() and info.ok.all() and not info.updated.any()
    assert len(set(found)) == NUM and info.loss.shape == (NUM, 0)


def test_another_adapter_changes_its_own_row_alone(model, adapters, run, together):
    changed = jax.tree.map(lambda leaf: leaf.at[1].multiply(-2.0), adapters)
    made, _ = run(model[1], (changed, {"tokens": PROMPTS}), KEYS)
    for place in (0, 2):
        np.testing.assert_array_equal(made.nats[place], together[0].nats[place])
    assert (made.nats[1] != together[0].nats[1]).any()


def test_a_broken_adapter_breaks_its_own_row_alone(model, adapters, run, together):
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), adapters)
    made, info = run(model[1], (broken, {"tokens": PROMPTS}), KEYS)
    np.testing.assert_array_equal(info.ok, [False, True, True])
    np.testing.assert_array_equal(made.nats[1:], together[0].nats[1:])


def test_results_follow_their_rows(model, adapters, run, together):
    order = np.array([2, 0, 1])
    moved = jax.tree.map(lambda leaf: leaf[order], adapters)
    made, _ = run(model[1], (moved, {"tokens": PROMPTS[order]}), KEYS[order])
    np.testing.assert_array_equal(made.tokens, together[0].tokens[order])
    np.testing.assert_allclose(made.nats, together[0].nats[order], rtol=1e-5)


def test_padding_on_either_side_is_never_seen():
    net, params = small.NET, small.base()
    predict = generation.generate(models.reader(net), num_tokens=TOKENS)
    run = jax.jit(ttt.batched(predict))
    wide = np.full((3, PROMPT + 3), 7, np.int32)
    mask = np.zeros_like(wide, bool)
    for row, first in enumerate((0, 2, 3)):
        wide[row, first : first + PROMPT], mask[row, first : first + PROMPT] = PROMPTS[0], True
    made, _ = run(params, {"tokens": wide, "mask": mask}, KEYS)
    tokens, nats = slow_greedy(net, params, PROMPTS[0], TOKENS)
    for row in range(3):
        np.testing.assert_array_equal(made.tokens[row], tokens)
        np.testing.assert_allclose(made.nats[row], nats, rtol=1e-4, atol=1e-5)
    other, _ = run(params, {"tokens": np.where(mask, wide, 3), "mask": mask}, KEYS)
    np.testing.assert_array_equal(other.nats, made.nats)


def test_a_model_function_without_a_cache_generates_the_same():
    net, params = small.NET, small.base()
    read = readers.recomputed(net.apply, context=PROMPT + TOKENS)
    wide = np.concatenate([PROMPTS, np.full((NUM, 2), 7, np.int32)], 1)
    mask = np.arange(PROMPT + 2) < PROMPT
    x = {"tokens": wide, "mask": np.broadcast_to(mask, wide.shape)}
    predict = generation.generate(read, num_tokens=TOKENS, chunk=3)
    made, _ = jax.jit(ttt.batched(predict))(params, x, KEYS)
    for place in range(NUM):
        tokens, nats = slow_greedy(net, params, PROMPTS[place], TOKENS)
        np.testing.assert_array_equal(made.tokens[place], tokens)
        np.testing.assert_allclose(made.nats[place], nats, rtol=1e-4, atol=1e-5)


def test_a_window_with_sinks_is_kept_while_generating():
    """A ring of few slots generates what a memory of all tokens under the same window does."""
    net, params = small.NET.clone(window=3, sinks=1), small.base()
    cached = generation.generate(models.reader(net), num_tokens=TOKENS, chunk=2)
    whole = generation.generate(
        readers.recomputed(net.apply, context=PROMPT + TOKENS), num_tokens=TOKENS
    )
    made, _ = jax.jit(cached)(params, PROMPTS[0], KEYS[0])
    due, _ = jax.jit(whole)(params, PROMPTS[0], KEYS[0])
    np.testing.assert_array_equal(made.tokens, due.tokens)
    np.testing.assert_allclose(made.nats, due.nats, rtol=1e-4, atol=1e-5)
    assert net.empty_cache(1, PROMPT + TOKENS, 2).slots < PROMPT + TOKENS


def test_a_stop_token_ends_its_row():
    net, params = small.NET, small.base()
    free, _ = slow_greedy(net, params, PROMPTS[0], TOKENS)
    place = int(np.argmax(free == free[2]))
    predict = generation.generate(models.reader(net), num_tokens=TOKENS, stop=[int(free[2])])
    made, info = jax.jit(predict)(params, PROMPTS[0], KEYS[0])
    np.testing.assert_array_equal(made.mask, np.arange(TOKENS) <= place)
    np.testing.assert_array_equal(made.tokens, np.where(made.mask, free, 0))
    assert (made.nats[place + 1 :] == 0).all() and info.ok


def counts(sampler, logits, draws=4000):
    keys = jax.random.split(jax.random.key(0), draws)
    return collections.Counter(np.asarray(jax.vmap(sampler, (None, 0))(logits, keys)).tolist())


def test_samples_have_the_probabilities_of_the_temperature():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    due = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    found = counts(generation.sample(0.5), logits)
    shares = np.array([found[token] / 4000 for token in range(4)])
    np.testing.assert_allclose(shares, due / due.sum(), atol=0.03)


@pytest.mark.parametrize(
    "top_p, kept", [(0.49, {1}), (0.51, {1, 3}), (0.81, {1, 3, 0}), (1.0, {0, 1, 2, 3})]
)
def test_the_token_that_crosses_top_p_is_kept(top_p, kept):
    logits = jnp.log(jnp.array([0.15, 0.5, 0.05, 0.3]))
    assert set(counts(generation.sample(top_p=top_p), logits)) == kept


def test_settings_of_a_sampler_may_be_traced():
    logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    keys = jax.random.split(jax.random.key(0), 50)

    def draw(temperature, top_p, key):
        return generation.sample(temperature, top_p)(logits, key)

    for settings in ((0.0, 1.0), (1.0, 0.4)):
        drawn = jax.vmap(draw, (None, None, 0))(*map(jnp.asarray, settings), keys)
        assert (drawn == generation.greedy()(logits, keys[0])).all()
    free = jax.vmap(draw, (None, None, 0))(1.0, 1.0, keys)
    assert len(set(free.tolist())) == 3
    # The literal default takes a shorter way to the same tokens.
    assert (free == jax.vmap(generation.sample(), (None, 0))(logits, keys)).all()


def test_token_t_is_drawn_with_the_key_of_t():
    """A longer continuation begins with the shorter one, and another key gives another."""
    params = small.base()
    read = models.reader(small.NET)

    def run(num_tokens, key):
        predict = generation.generate(read, num_tokens=num_tokens, sampler=generation.sample(2.0))
        return np.asarray(jax.jit(predict)(params, PROMPTS[0], key)[0].tokens)

    long = run(12, KEYS[0])
    np.testing.assert_array_equal(run(4, KEYS[0]), long[:4])
    assert (run(12, KEYS[1]) != long).any()


@pytest.mark.parametrize(
    "x, sentence",
    [
        (np.zeros(0, np.int32), "at least one of them; got shape"),
        (PROMPTS, r"one prompt \[P\].*batched"),
        (np.zeros(3), "float32"),
        ({"mask": np.ones(3)}, "leaf 'tokens'; got \\['mask'\\]"),
        ({"tokens": PROMPTS[0], "mask": np.ones(2)}, "mask of the tokens' shape"),
    ],
)
def test_prompts_that_are_none(x, sentence):
    predict = generation.generate(models.reader(small.NET), num_tokens=2)
    with pytest.raises(ValueError, match=sentence):
        predict(small.base(), x, KEYS[0])


def test_a_prompt_of_which_the_mask_leaves_nothing_is_not_ok():
    predict = jax.jit(ttt.batched(generation.generate(models.reader(small.NET), num_tokens=2)))
    prompts = {"tokens": PROMPTS[:2], "mask": np.zeros_like(PROMPTS[:2], bool)}
    prompts["mask"][1, -1] = True
    _, info = predict(small.base(), prompts, KEYS[:2])
    assert info.ok.tolist() == [False, True]


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("wrong", [-1, small.NET.vocabulary])
def test_a_prompt_with_a_token_outside_the_vocabulary_is_not_ok(wrong, place):
    """Wherever it stands, and unless the mask leaves it out."""
    run = jax.jit(ttt.batched(generation.generate(models.reader(small.NET), num_tokens=2)))
    prompts = {"tokens": PROMPTS[[0, 0, 0]].copy(), "mask": np.ones_like(PROMPTS[:3], bool)}
    prompts["tokens"][:2, place] = wrong
    prompts["mask"][1, place] = False
    made, info = run(small.base(), prompts, KEYS[np.zeros(3, int)])
    assert info.ok.tolist() == [False, True, True] and np.isnan(made.nats[0]).any()


def test_arguments_out_of_range():
    read = models.reader(small.NET)
    for settings, sentence in (
        ({"num_tokens": 0}, "num_tokens must be an integer of at least 1"),
        ({"num_tokens": 2, "stop": [-1]}, "stop, each token of it, must be"),
        ({"num_tokens": 2, "chunk": 0}, "chunk, unless None, must be"),
    ):
        with pytest.raises(ValueError, match=sentence):
            generation.generate(read, **settings)
    for settings in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 90.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a number"):
            generation.sample(**settings)
    odd = generation.generate(read, num_tokens=2, sampler=lambda logits, key: logits)
    with pytest.raises(ValueError, match="must return one integer token"):
        odd(small.base(), PROMPTS[0], KEYS[0])


def test_an_adapter_of_another_layout_is_refused(model, adapters):
    params = model[1]
    own = ttt.adapted(ttt.source(lambda params, x: x), select=select.lora())
    with pytest.raises(ValueError, match=r"instance \(fast, x\)"):
        own(params, jnp.ones(3), KEYS[0])
    with pytest.raises(ValueError, match="differ at 'params/layers/attention/query/kernel_lora_a'"):
        own(params, (adapters, jnp.ones(3)), KEYS[0])

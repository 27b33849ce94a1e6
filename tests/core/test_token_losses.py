"""The losses over tokens against NumPy: masks, padding, segments, hidden tokens, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses
from ttt_jax.losses import tokens

from .compiling import quickly

VOCABULARY, LENGTH, COUNT = 7, 6, 3
KEY = jax.random.key(1)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(VOCABULARY, size=(COUNT, LENGTH)).astype(np.int32)
WEIGHTS = np.array([[0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], np.float32)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5]], np.int32)
PARAMS = {
    "own": jnp.asarray(RNG.normal(size=(VOCABULARY, VOCABULARY)), jnp.float32),
    "past": jnp.asarray(RNG.normal(size=(VOCABULARY, VOCABULARY)), jnp.float32),
}


def model(params, inputs):
    """Causal: the token's own row, and the running mean of the rows so far."""
    tokens = inputs["tokens"] if isinstance(inputs, dict) else inputs
    counts = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)[None, :, None]
    return params["own"][tokens] + params["past"][tokens].cumsum(1) / counts


def log_probabilities(tokens):
    """The same model and its log-softmax in float64, token by token."""
    own, past = (np.asarray(PARAMS[name], np.float64) for name in ("own", "past"))
    rows = []
    for place, token in enumerate(tokens):
        logits = own[token] + np.mean([past[other] for other in tokens[: place + 1]], axis=0)
        rows.append(logits - np.log(np.exp(logits).sum()))
    return np.array(rows)


def nats_of_next(tokens):
    """Nats of tokens 1 to T - 1."""
    rows = log_probabilities(tokens)
    return np.array([-rows[place - 1, tokens[place]] for place in range(1, len(tokens))])


def sequence(index, **more):
    return {"tokens": TOKENS[index], "mask": WEIGHTS[index], **more}


class TestNextToken:
    def test_mean_over_all_tokens_after_the_first(self):
        loss = losses.next_token(model)
        values = quickly(jax.vmap(lambda tokens: loss(PARAMS, tokens, KEY)), TOKENS)
        expected = [nats_of_next(tokens).mean() for tokens in TOKENS]
        np.testing.assert_allclose(values, expected, rtol=1e-5)

    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_weights_and_flags_of_a_mask(self, scale):
        """Flags are weights of 1; the divisor is their sum, and 1 where that is less."""

        def each(mask):
            def one(tokens, mask):
                return losses.next_token(model)(PARAMS, {"tokens": tokens, "mask": mask}, KEY)

            return jax.vmap(one)(TOKENS, mask)

        values = quickly(each, scale * WEIGHTS)
        expected = [
            scale * (nats_of_next(tokens) @ mask[1:]) / max(scale * mask[1:].sum(), 1)
            for tokens, mask in zip(TOKENS, WEIGHTS, strict=True)
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        if scale == 1.0:
            np.testing.assert_array_equal(quickly(each, WEIGHTS != 0), values)

    def test_first_token_of_a_segment_is_no_target(self):
        seen = []

        def watched(params, inputs):
            seen.append(sorted(inputs))
            return model(params, inputs)

        loss = losses.next_token(watched)

        def value(tokens, segments):
            return loss(PARAMS, {"tokens": tokens, "segments": segments}, KEY)

        values = quickly(jax.vmap(value), TOKENS, SEGMENTS)
        expected = [
            nats_of_next(tokens)[parts[1:] == parts[:-1]].mean()
            for tokens, parts in zip(TOKENS, SEGMENTS, strict=True)
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert seen[0] == ["segments", "tokens"], "the mask is the loss's own"

    def test_padding_before_a_text_predicts_nothing(self):
        positions = np.array([-1, -1, 0, 1, 2, 3], np.int32)
        mask = (positions >= 0).astype(np.float32)
        value = quickly(
            lambda x: losses.next_token(model)(PARAMS, x, KEY),
            {"tokens": TOKENS[0], "mask": mask, "positions": positions},
        )
        np.testing.assert_allclose(value, nats_of_next(TOKENS[0])[2:].mean(), rtol=1e-5)

    def test_a_batch_counts_by_its_tokens(self):
        batch = {"tokens": TOKENS, "mask": WEIGHTS}
        value = quickly(lambda x: losses.next_token(model, batch=True)(PARAMS, x, KEY), batch)
        total = sum(nats_of_next(TOKENS[i]) @ WEIGHTS[i, 1:] for i in range(COUNT))
        np.testing.assert_allclose(value, total / WEIGHTS[:, 1:].sum(), rtol=1e-5)

    def test_stochastic_model_gets_the_key(self):
        def noisy(params, tokens, key):
            return model(params, tokens) + jax.random.normal(key, (1, LENGTH, VOCABULARY))

        loss = losses.next_token(noisy, stochastic=True)
        first, second = quickly(
            lambda key: (loss(PARAMS, TOKENS[0], key), loss(PARAMS, TOKENS[0], KEY)),
            jax.random.key(2),
        )
        assert first != second

    def test_padding_to_twice_the_length_changes_no_bit(self):
        """Score, gradient and adapter, whatever the padding holds."""
        adapter = ttt.gradient_adapter(
            losses.next_token(model), optax.adam(0.1), select=ttt.select.paths("own", "past")
        )

        def stepped(x):
            state, info = adapter.step(PARAMS, adapter.init(PARAMS), x, KEY)
            return state, info

        plain = quickly(stepped, sequence(0))
        for filler in (0, VOCABULARY - 1):
            padded = {
                "tokens": np.concatenate([TOKENS[0], np.full(LENGTH, filler, np.int32)]),
                "mask": np.concatenate([WEIGHTS[0], np.zeros(LENGTH, np.float32)]),
            }
            jax.tree.map(np.testing.assert_array_equal, quickly(stepped, padded), plain)
        assert plain[1].loss > 0 and plain[0].count == 1

    def test_a_masked_nan_is_no_part_of_the_value(self):
        def broken(params, tokens):
            return model(params, tokens).at[:, 2].set(jnp.nan)  # of token 3, whose mask is 0

        value, expected = quickly(
            lambda x: [losses.next_token(apply)(PARAMS, x, KEY) for apply in (broken, model)],
            sequence(0),
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)

    def test_an_empty_mask_asks_for_no_step(self):
        adapter = ttt.gradient_adapter(
            losses.next_token(model),
            optax.adamw(0.1, weight_decay=0.5),
            select=ttt.select.everything(),
        )

        def steps(x, empty):
            state, _ = adapter.step(PARAMS, adapter.init(PARAMS), x, KEY)
            after, info = adapter.step(PARAMS, state, empty, KEY)
            return state, after, info

        before, after, info = quickly(steps, sequence(0), sequence(2))
        assert info.loss == 0 and info.grad_norm == 0 and info.finite
        jax.tree.map(np.testing.assert_array_equal, after, before)


class TestMaskedToken:
    @staticmethod
    def flat(params, tokens):
        """Logits of the tokens themselves, from the tokens that are seen."""
        return params["own"][tokens] + params["past"][tokens].mean(1, keepdims=True)

    def test_hidden_tokens_against_numpy(self):
        """With a ratio of 1 every token of the mask is hidden, and no other."""
        loss = losses.masked_token(self.flat, mask_id=6, mask_ratio=1.0)
        value = quickly(lambda x: loss(PARAMS, x, KEY), sequence(0))
        own, past = (np.asarray(PARAMS[name], np.float64) for name in ("own", "past"))
        seen = np.where(WEIGHTS[0] != 0, 6, TOKENS[0])
        logits = own[seen] + past[seen].mean(0)
        rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = -rows[np.arange(LENGTH), TOKENS[0]][WEIGHTS[0] != 0].mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_share_of_hidden_tokens_and_their_independence(self):
        seen = []

        def watched(params, tokens):
            seen.append(tokens)
            return self.flat(params, tokens)

        def run(key):
            seen.clear()
            loss = losses.masked_token(watched, mask_id=6, mask_ratio=0.3, num_masks=40, batch=True)
            loss(PARAMS, {"tokens": np.tile(TOKENS % 6, (1, 20))}, key)
            return seen[0]

        hidden = quickly(run, KEY).reshape(COUNT, 40, 20 * LENGTH) == 6
        np.testing.assert_allclose(hidden.mean(), 0.3, atol=0.02)
        assert hidden.mean((0, 1)).std() < 0.1, "no place is preferred"
        assert hidden.std(1).min() > 0, "every mask is another"

    def test_nothing_hidden_is_zero_with_gradient_zero(self):
        loss = losses.masked_token(self.flat, mask_id=6, mask_ratio=0.0)
        value, grads = quickly(jax.value_and_grad(lambda p: loss(p, TOKENS[0], KEY)), PARAMS)
        assert value == 0 and all((leaf == 0).all() for leaf in grads.values())

    def test_a_ratio_may_be_traced(self):
        def both(ratio):
            traced = losses.masked_token(self.flat, mask_id=6, mask_ratio=ratio)
            fixed = losses.masked_token(self.flat, mask_id=6, mask_ratio=0.5)
            return traced(PARAMS, TOKENS[0], KEY), fixed(PARAMS, TOKENS[0], KEY)

        traced, fixed = quickly(both, 0.5)
        assert traced == fixed > 0


BAD = {
    "rank": (lambda loss: loss(PARAMS, TOKENS, KEY), r"shape '?\[T\]'?; got shape \(3, 6\)"),
    "dtype": (lambda loss: loss(PARAMS, WEIGHTS[0], KEY), "integer tokens.*float32"),
    "short": (lambda loss: loss(PARAMS, TOKENS[0, :1], KEY), "at least two tokens; got 1"),
    "mask": (
        lambda loss: loss(PARAMS, {"tokens": TOKENS[0], "mask": WEIGHTS}, KEY),
        r"shaped as its tokens.*'mask' of shape \(3, 6\)",
    ),
    "leaf": (lambda loss: loss(PARAMS, {"ids": TOKENS[0]}, KEY), "leaf 'tokens'; got"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["next_token", "masked_token"])
def test_bad_input(name, case):
    more = {"mask_id": 0} if name == "masked_token" else {}
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call(getattr(losses, name)(model, **more))


@pytest.mark.parametrize("name", ["next_token", "masked_token"])
def test_logits_of_another_shape(name):
    more = {"mask_id": 0} if name == "masked_token" else {}
    loss = getattr(losses, name)(lambda params, tokens: params["own"][tokens][0], **more)
    with pytest.raises(ValueError, match=r"logits \[N, T, V\].*returned shape \(6, 7\)"):
        loss(PARAMS, TOKENS[0], KEY)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"mask_id": -1}, "mask_id"), ({"mask_id": 0, "num_masks": 0}, "num_masks")],
)
def test_settings_out_of_range(given, words):
    with pytest.raises(ValueError, match=words):
        losses.masked_token(model, **given)


@pytest.mark.parametrize(("dtype", "vocabulary"), [(np.uint8, 256), (np.int8, 300)])
def test_tokens_of_narrow_integers_do_not_wrap(dtype, vocabulary):
    """Bytes beside a vocabulary as large as they reach, and larger."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, vocabulary)).astype(np.float32)
    targets = rng.integers(0, 100, 5).astype(dtype)

    def total(logits, targets):
        return losses.tokens.token_nats(logits, targets).sum()

    narrow, wide = (
        jax.value_and_grad(total)(logits, kind) for kind in (targets, targets.astype(np.int32))
    )
    assert np.isfinite(narrow[0])
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


def test_one_pass_over_the_logits_is_two():
    """Of any size, infinite ones and none among them; and so are the gradients of either."""
    rows = 10 * jax.random.normal(jax.random.key(0), (6, 5))
    rows = rows.at[0, 1].set(jnp.inf).at[1].set(-jnp.inf).at[2, 3].set(-jnp.inf)
    rows = rows.at[3, 0].set(jnp.nan).at[4].set(jnp.array([1e30, 1e30, -1e30, 0.0, 1e29]))
    for made, due in zip(
        jax.jit(tokens.in_one_pass)(rows), tokens.in_two_passes(rows), strict=True
    ):
        np.testing.assert_allclose(made, due, rtol=1e-6)
    for row in rows:
        total, gradient = jax.value_and_grad(tokens.log_sum_exp)(row)
        due, expected = jax.value_and_grad(jax.nn.logsumexp)(row)
        np.testing.assert_allclose(total, due, rtol=1e-6)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    second = jax.hessian(tokens.log_sum_exp)(rows[5])
    np.testing.assert_allclose(second, jax.hessian(jax.nn.logsumexp)(rows[5]), atol=1e-6)


def test_one_pass_is_mapped_and_differentiated(monkeypatch):
    rows = 10 * jax.random.normal(jax.random.key(0), (3, 2, 7))
    targets = jnp.array([[0, 6], [3, 3], [1, 5]])

    def nats(rows, targets):
        return jnp.sin(tokens.token_nats(rows, targets)).sum()

    due = jax.vmap(jax.grad(nats))(rows, targets), jax.hessian(nats)(rows[0], targets[0])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    program = str(jax.make_jaxpr(jax.vmap(jax.grad(nats)))(rows, targets))
    assert "reduce_max" not in program
    made = jax.vmap(jax.grad(nats))(rows, targets), jax.hessian(nats)(rows[0], targets[0])
    for leaf, expected in zip(made, due, strict=True):
        np.testing.assert_allclose(leaf, expected, atol=1e-5)

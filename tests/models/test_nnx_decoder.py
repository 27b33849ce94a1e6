"""Decoders of NNX go through the bridge and adapt to documents: one of our own, one of tunix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ttt_jax as ttt
from ttt_jax import methods, models, readers

VOCABULARY, WIDTH, CHUNK, BOS = 24, 16, 5, 1
RATE = 0.5


class NnxDecoder(nnx.Module):
    """A layer of causal attention and an MLP."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        mask = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1]), bool))
        x = x + self.attention(self.norm(x), mask=mask)
        return self.embed.attend(x + self.down(jax.nn.gelu(self.up(x))))


def own():
    apply, params = models.from_nnx(NnxDecoder(nnx.Rngs(0)))
    return apply, params, ".*/down/kernel"


def with_factors():
    """Low-rank leaves of qwix, which alone adapt; qwix names them as in Linen."""
    qwix = pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")
    provider = qwix.LoraProvider(module_path="down", rank=2, alpha=2.0)
    net = NnxDecoder(nnx.Rngs(0))
    with jax.numpy_rank_promotion("allow"):
        net = qwix.apply_lora_to_model(
            net, provider, jnp.zeros((1, 2), jnp.int32), rngs=nnx.Rngs(1)
        )
    whole, params = models.from_nnx(net)

    def apply(params, tokens):
        with jax.numpy_rank_promotion("allow"):
            return whole(params, tokens)

    assert len(jax.tree.leaves(ttt.select.lora().split(params)[0])) == 2
    return apply, params, ".*/down/kernel_lora_[ab]"


def of_tunix():
    module = pytest.importorskip("tunix.models.llama3.model", reason="needs google-tunix")
    config = module.ModelConfig(
        num_layers=1,
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        hidden_dim=2 * WIDTH,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    whole, params = models.from_nnx(module.Llama3(config, rngs=nnx.Rngs(0)))

    def apply(params, tokens):
        """Of what its call takes and returns, tokens and logits."""
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        with jax.numpy_rank_promotion("allow"):
            return whole(params, tokens, positions, None, mask)[0]

    # Its MLP starts at zero, where it has no gradient.
    return apply, params, ".*/o_proj/w"


# tunix itself uses what jax and flax are leaving behind.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", [own, with_factors, of_tunix])
def test_a_document_is_scored_and_learned_from(build):
    apply, params, path = build()
    select = ttt.select.paths(path)
    adapt = methods.document_ttt(
        readers.isolated(apply), optimizer=optax.sgd(RATE), select=select, bos=BOS
    )
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, CHUNK)).astype(np.int32)
    document = {"tokens": tokens, "mask": np.ones_like(tokens, bool)}
    nats, info = jax.jit(adapt)(params, document, jax.random.key(0))
    assert bool(info.ok) and bool(info.updated)

    def score(fast, frozen, given, targets):
        logits = apply(select.merge(fast, frozen), given[None])[0]
        own = -jax.nn.log_softmax(logits)[jnp.arange(CHUNK), targets]
        return own.mean(), own

    step = jax.jit(jax.value_and_grad(score, has_aux=True))
    before = np.concatenate([[BOS], tokens.reshape(-1)[:-1]]).reshape(tokens.shape)
    fast, frozen = select.split(params)
    for given, targets, row in zip(before, tokens, nats, strict=True):
        (_, due), gradient = step(fast, frozen, given, targets)
        np.testing.assert_allclose(row, due, atol=1e-5)
        fast = jax.tree.map(lambda leaf, slope: leaf - RATE * slope, fast, gradient)
    # What was learned shows.
    still = methods.document_ttt(readers.isolated(apply), select=select, num_steps=0, bos=BOS)
    control, _ = jax.jit(still)(params, document, jax.random.key(0))
    np.testing.assert_array_equal(control[0], nats[0])
    assert np.abs(control[1:] - nats[1:]).max() > 1e-3

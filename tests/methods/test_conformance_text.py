"""Every method over documents keeps the promises of the library, and scores before it learns.

Parallel equals the loop, in any order and company; a document with a nan weight leaves the others
bitwise alone; the parameters stay what they were.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import models as core_models
from tests.methods import tiny_decoder as tiny
from ttt_jax import audit, methods, readers

KEY = jax.random.key(0)
KEYS = ttt.sample_keys(KEY, np.arange(3))
PRISTINE = core_models.snapshot(tiny.PARAMS)
RNG = np.random.default_rng(9)
POOL = {
    "tokens": RNG.integers(tiny.VOCABULARY, size=(6, 5)).astype(np.int32),
    "mask": np.ones((6, 5), np.float32),
}
ADAPTERS = jax.tree.map(
    lambda leaf: leaf[None] + jnp.arange(3.0)[:, None, None] / 10, tiny.DOWN.split(tiny.PARAMS)[0]
)
CENTERS = np.abs(RNG.normal(size=(3, 1024))).astype(np.float32)
CHOSEN = {"select": tiny.DOWN, "optimizer": optax.adam(0.1)}
WINDOW = readers.recomputed(tiny.decode, context=8)


def read_with_hidden(params, memory, inputs):
    logits, hidden = tiny.decode_with_hidden(params, inputs["tokens"])
    return logits, memory, {"params/down/kernel": hidden}


def aims(params, x):
    return params["params"]["embedding"][x["targets"]]


HIDDEN = readers.HiddenReader(lambda batch, tokens, chunk: (), read_with_hidden)


def neighbors(*args, **options):
    method = methods.neighbors_ttt(*args, k=2, **options)

    def predict(params, x, key):
        return method.build(method.measure(params, POOL))(params, x, key)

    return predict


# Method, and its arguments by position and by name.
METHODS = {
    "document_ttt": (methods.document_ttt, (WINDOW,), CHOSEN),
    "end_to_end": (methods.end_to_end, (WINDOW,), {"select": tiny.DOWN}),
    "in_place": (methods.in_place, (WINDOW,), CHOSEN),
    "in_place_targets": (
        methods.in_place_targets,
        (HIDDEN, aims),
        {"select": tiny.DOWN, "max_norm": 0.5},
    ),
    "neighbors_ttt": (neighbors, (WINDOW,), CHOSEN),
    "passages_adapter": (methods.passages_adapter, (WINDOW,), CHOSEN),
    "merged_adapters": (
        methods.merged_adapters,
        (WINDOW, ADAPTERS, CENTERS),
        {"select": tiny.DOWN, "k": 2},
    ),
}


def make(name, **options):
    method, args, settings = METHODS[name]
    return method(*args, **{**settings, **options})


@pytest.mark.parametrize("name", METHODS)
def test_promises(name):
    steps = 2 if name == "neighbors_ttt" else tiny.CHUNKS
    found = audit.check(make(name), tiny.PARAMS, tiny.DOCUMENTS, KEYS, num_steps=steps)
    # Without steps there is no loss that could tell.
    due = 5 if name == "merged_adapters" else 6
    assert len(found) == due and all(finding.passed for finding in found)
    assert core_models.snapshot(tiny.PARAMS) == PRISTINE


@pytest.mark.parametrize("name", [name for name in METHODS if name != "passages_adapter"])
def test_scored_before_learned_from(name):
    audit.score_before_update(jax.jit(make(name)), tiny.PARAMS, tiny.document(0), KEY)


def test_every_method_over_documents_has_a_row():
    over_documents = {
        name
        for name in methods.__all__
        if "read" in getattr(methods, name).__wrapped__.__code__.co_varnames
    }
    # What continues a document, and what takes prompts, have their own tests
    # (tests/methods/test_continue_document.py, test_ttrl.py and test_discover.py).
    others = {"continue_document", "document_adapter", "few_shot_adapter", "ttrl", "discover"}
    assert over_documents - others == set(METHODS)

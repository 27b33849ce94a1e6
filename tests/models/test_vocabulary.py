"""A reader that knows its model's vocabulary has tokens refused that a model would cut."""

import functools

import jax
import numpy as np
import pytest

import ttt_jax as ttt
from tests.core import small_reader
from tests.models import small_decoder as small
from ttt_jax import methods, models, readers, serving

SIZE = small.NET.vocabulary
READ, HIDDEN = models.reader(small.NET), models.hidden_reader(small.NET)
LIKE = ttt.select.paths(".*/down/kernel")
METHODS = {
    "document_ttt": functools.partial(methods.document_ttt, READ, select=LIKE),
    "end_to_end": functools.partial(methods.end_to_end, READ, select=LIKE),
    "document_adapter": functools.partial(methods.document_adapter, READ, select=LIKE),
    "continue_document": functools.partial(methods.continue_document, READ, num_tokens=1),
    "in_place": functools.partial(methods.in_place, READ, select=LIKE),
    "in_place_targets": functools.partial(
        methods.in_place_targets, HIDDEN, lambda params, pair: {}, rate=0.1, select=LIKE
    ),
    "neighbors_ttt": functools.partial(methods.neighbors_ttt, READ),
    "passages_adapter": functools.partial(methods.passages_adapter, READ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_bos_that_the_model_does_not_know(name):
    with pytest.raises(ValueError, match=rf"bos must be .* from 0 to {SIZE - 1}; got {SIZE}"):
        METHODS[name](bos=SIZE)
    METHODS[name](bos=SIZE - 1)


def test_a_model_may_know_more_tokens_than_it_has_logits_for():
    """As where a first token is read and never written; nothing is refused then."""

    def read(params, memory, inputs):
        known = inputs["tokens"] % small_reader.VOCABULARY
        return small_reader.read(params, memory, {**inputs, "tokens": known})

    own = readers.Reader(small_reader.init, read)
    predict = methods.document_ttt(own, bos=small_reader.VOCABULARY)
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    nats, info = jax.jit(predict)(small_reader.draw_params(), tokens, jax.random.key(0))
    assert info.ok and (nats > 0).all()


@pytest.mark.parametrize("wrong", [-1, SIZE])
def test_a_served_prompt_that_the_model_does_not_know(wrong):
    serve = serving.server(READ, rows=1, context=8, chunk=4)
    keys = jax.random.split(jax.random.key(0), 2)
    requests = [serving.Request([1, 2], keys[0], 2), serving.Request([1, wrong, 2], keys[1], 2)]
    made = []
    with pytest.raises(ValueError, match=rf"Request 1 .* from 0 to {SIZE - 1}; got {wrong}"):
        made.extend(serve(small.base(), requests))

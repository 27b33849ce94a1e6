"""More prompts than rows: what comes out is what each gives alone, whatever the rows do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax as ttt
from tests.models import small_decoder as small
from ttt_jax import generation, models, select, serving

pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

LENGTHS = (5, 1, 9, 3, 6)
LIMITS = (4, 7, 2, 5, 3)
CONTEXT, STOP = 16, 17
KEYS = ttt.sample_keys(jax.random.key(5), np.arange(len(LENGTHS)))
PROMPTS = [small.draw_tokens(length, seed=length) for length in LENGTHS]
SAMPLER = generation.sample(0.7, 0.95)


@pytest.fixture(scope="module")
def model():
    return small.with_factors()


@pytest.fixture(scope="module")
def requests(model):
    adapters = small.drawn_adapters(model[1], len(LENGTHS))
    return [
        serving.Request(prompt, key, limit, small.row_of(adapters, place))
        for place, (prompt, key, limit) in enumerate(zip(PROMPTS, KEYS, LIMITS, strict=True))
    ]


@pytest.fixture(scope="module")
def two_rows(model):
    return serving.server(
        models.reader(model[0]), rows=2, context=CONTEXT, chunk=2, tokens_per_call=3,
        sampler=SAMPLER, stop=[STOP], select=select.lora(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(model, requests):
    """Each by itself, its prompt padded to one shape, cut to what it asked for."""
    most = max(LENGTHS)
    predict = ttt.adapted(
        generation.generate(
            models.reader(model[0]), num_tokens=max(LIMITS), sampler=SAMPLER, stop=[STOP]
        ),
        select=select.lora(),
    )
    run = jax.jit(predict)
    found = []
    for request in requests:
        tokens = np.zeros(most, np.int32)
        tokens[: len(request.tokens)] = request.tokens
        x = {"tokens": tokens, "mask": np.arange(most) < len(request.tokens)}
        made, _ = jax.device_get(run(model[1], (request.fast, x), request.key))
        mask = made.mask & (np.arange(max(LIMITS)) < request.num_tokens)
        found.append((made.tokens[mask], made.nats[mask]))
    return found


def test_each_request_gets_what_it_gets_alone(model, requests, two_rows, alone):
    served = dict(two_rows(model[1], iter(requests)))
    assert sorted(served) == list(range(len(requests)))
    for index, (tokens, nats) in enumerate(alone):
        np.testing.assert_array_equal(served[index].tokens, tokens)
        np.testing.assert_allclose(served[index].nats, nats, rtol=1e-4, atol=1e-5)
        assert served[index].mask.all()
    lengths = [len(tokens) for tokens, _ in alone]
    assert any(n < limit for n, limit in zip(lengths, LIMITS, strict=True)), "none was stopped"
    assert len({tuple(tokens) for tokens, _ in alone}) > 1


def test_the_order_of_requests_is_of_no_consequence(model, requests, two_rows, alone):
    order = [3, 0, 4, 2, 1]
    served = dict(two_rows(model[1], [requests[place] for place in order]))
    for index, place in enumerate(order):
        np.testing.assert_array_equal(served[index].tokens, alone[place][0])
        np.testing.assert_allclose(served[index].nats, alone[place][1], rtol=1e-4, atol=1e-5)


def test_another_adapter_changes_its_own_request_alone(model, requests, two_rows):
    before = dict(two_rows(model[1], requests))
    turned = jax.tree.map(lambda leaf: -2 * leaf, requests[1].fast)
    changed = [*requests]
    # Asked for one token, it ends in the first call with either adapter, so that no row moves.
    short = requests[1]._replace(num_tokens=1)
    changed[1] = short._replace(fast=turned)
    first = dict(two_rows(model[1], [requests[0], short, *requests[2:]]))
    second = dict(two_rows(model[1], changed))
    for index in (0, 2, 3, 4):
        np.testing.assert_array_equal(first[index].nats, second[index].nats)
        np.testing.assert_array_equal(first[index].tokens, before[index].tokens)
    assert (first[1].nats != second[1].nats).any()


def test_a_row_that_broke_is_emptied_for_the_next_request(model, requests, two_rows, alone):
    """NaN among the keys of a row would spoil even what does not see them."""
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), requests[2].fast)
    both = [requests[2]._replace(fast=broken, num_tokens=1)] * 2
    served = dict(two_rows(model[1], [*both, *requests[:2]]))
    for index in (0, 1):
        assert np.isnan(served[index].nats).all()
        np.testing.assert_array_equal(served[index + 2].tokens, alone[index][0])
        np.testing.assert_allclose(served[index + 2].nats, alone[index][1], rtol=1e-4, atol=1e-5)


def test_a_request_without_an_adapter_has_the_leaves_of_the_parameters(model, requests, two_rows):
    """``b`` is zero in them, so it gets what the base gives; the one beside it, its own."""
    bare = requests[0]._replace(fast=None)
    served = dict(two_rows(model[1], [bare, requests[0]]))
    serve = serving.server(
        models.reader(small.NET), rows=1, context=CONTEXT, sampler=SAMPLER, stop=[STOP]
    )
    [(_, due)] = serve(small.base(), [bare])
    np.testing.assert_array_equal(served[0].tokens, due.tokens)
    np.testing.assert_allclose(served[0].nats, due.nats, rtol=1e-4, atol=1e-5)
    assert served[0].nats[0] != served[1].nats[0]


def test_without_adapters_and_with_more_rows_than_requests(model):
    net, params = small.NET, small.base()
    serve = serving.server(models.reader(net), rows=3, context=CONTEXT)
    request = serving.Request(PROMPTS[0], KEYS[0], 4)
    predict = generation.generate(models.reader(net), num_tokens=4)
    made, _ = jax.jit(predict)(params, PROMPTS[0], KEYS[0])
    before = jax.tree.map(np.array, params)
    for _ in range(2):
        [(index, served)] = serve(params, [request])
        assert index == 0
        np.testing.assert_array_equal(served.tokens, made.tokens)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert list(serve(params, [])) == []


def test_requests_that_cannot_be_served(model, requests, two_rows):
    good, params = requests[0], model[1]
    other = jax.tree.map(lambda leaf: leaf[..., :1], good.fast)
    for request, sentence in (
        (good._replace(num_tokens=40), "needs 5 . 40 tokens.*context is 16"),
        (good._replace(num_tokens=0), "num_tokens of request 1 must be"),
        (good._replace(tokens=[]), "at least one; got shape"),
        (good._replace(tokens=[0.5]), "needs integer tokens"),
        (good._replace(fast=other), "layout of the server.*kernel_lora_a', float32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            list(two_rows(params, [good, request]))
    plain = serving.server(models.reader(small.NET), rows=1, context=CONTEXT)
    with pytest.raises(ValueError, match=r"Build the server with select="):
        list(plain(params, [good]))
    with pytest.raises(TypeError, match="Request 0 must be a Request"):
        list(two_rows(params, [PROMPTS[0]]))
    with pytest.raises(ValueError, match="tokens_per_call must be"):
        serving.server(models.reader(small.NET), rows=1, context=4, tokens_per_call=0)

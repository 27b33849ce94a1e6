"""What a loss reports of its own: through steps, predictors, streams and filters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import resets, select

from .compiling import quickly

PARAMS = {"w": np.array([1.0, 2.0], np.float32)}
KEY = jax.random.key(0)


def loss(params, x, key):
    return jnp.sum((params["w"] * x) ** 2), {"sum": params["w"].sum(), "count": jnp.int32(3)}


def adapter(**options):
    return ttt.gradient_adapter(
        loss, optax.sgd(0.1), select=select.everything(), has_aux=True, **options
    )


def test_each_step_reports_what_held_before_it():
    predict = ttt.episodic(adapter(), lambda params, x: params["w"], num_steps=3)
    output, info = quickly(predict, PARAMS, 1.0, KEY)
    weights = np.array([1.0, 2.0]) * 0.8 ** np.arange(4)[:, None]
    np.testing.assert_allclose(info.aux["sum"], weights[:3].sum(1), rtol=1e-6)
    assert info.aux["count"].tolist() == [3, 3, 3]
    np.testing.assert_allclose(output, weights[3], rtol=1e-6)


def test_a_plain_loss_has_none():
    plain = ttt.gradient_adapter(
        lambda params, x, key: loss(params, x, key)[0], optax.sgd(0.1), select=select.everything()
    )
    predict = ttt.episodic(plain, lambda params, x: x, num_steps=1)
    _, info = jax.eval_shape(predict, PARAMS, 1.0, KEY)
    assert info.aux == {}


def test_streams_votes_and_batches_carry_it():
    stream = ttt.online(adapter(), lambda params, x: x, reset=resets.never())
    _, (_, info) = quickly(stream.step, PARAMS, stream.init(PARAMS), 1.0, KEY)
    assert info.aux["sum"].tolist() == [3.0]
    predict = ttt.episodic(adapter(), lambda params, x: x, num_steps=2)
    voted = ttt.vote(predict, 4, combine=lambda outputs: outputs[0])
    _, info = quickly(voted, PARAMS, 1.0, KEY)
    assert info.aux["count"].tolist() == [3.0, 3.0]
    keys = ttt.sample_keys(KEY, np.arange(3))
    batched = ttt.batched(predict, chunk_size=2)
    _, info = quickly(batched, PARAMS, np.ones(3, np.float32), keys)
    assert info.aux["sum"].shape == (3, 2)


def test_a_skipped_instance_reports_zeros():
    skipping = ttt.filtered(adapter(), lambda params, x, key: x > 0)
    step = jax.vmap(skipping.step, in_axes=(None, None, 0, None))
    xs = np.array([1.0, -1.0], np.float32)
    _, info = quickly(step, PARAMS, skipping.init(PARAMS), xs, KEY)
    assert info.aux["sum"].tolist() == [3.0, 0.0]


def test_sharpness_aware_steps_report_it_at_the_point_of_their_loss():
    options = {"select": select.everything(), "rho": 0.05, "has_aux": True}
    plain = ttt.sharpness_aware_adapter(loss, optax.sgd(0.1), **options)
    _, info = quickly(plain.step, PARAMS, plain.init(PARAMS), 1.0, KEY)
    assert float(info.aux["sum"]) == 3.0
    peak = ttt.sharpness_aware_adapter(
        loss, optax.sgd(0.1), peak_loss=lambda params: loss, **options
    )
    _, info = quickly(peak.step, PARAMS, peak.init(PARAMS), 1.0, KEY)
    direction = np.array([1.0, 2.0]) / np.sqrt(5)
    np.testing.assert_allclose(info.aux["sum"], 3 + 0.05 * direction.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "has_aux", "message"),
    [
        (loss, False, "Give has_aux=True"),
        (lambda params, x, key: params["w"].sum(), True, "must return .scalar, .name: array"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused(value, has_aux, message):
    built = ttt.gradient_adapter(value, optax.sgd(0.1), select=select.everything(), has_aux=has_aux)
    with pytest.raises(ValueError, match=message):
        built.step(PARAMS, built.init(PARAMS), 1.0, KEY)

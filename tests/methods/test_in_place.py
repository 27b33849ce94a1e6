"""in_place: gradient steps on the second matrices, clipped one by one, and scored before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.core.compiling import quickly
from tests.methods import tiny_decoder as tiny
from ttt_jax import audit, methods, models, select

KEY = jax.random.key(0)
STAGED = tiny.MODULE.clone(stages=(1, 1))
MODULE_PARAMS = {
    "params": {
        name: leaf for name, leaf in tiny.MODULE_PARAMS["params"].items() if name != "layers"
    }
    | {
        f"layers_{stage}": jax.tree.map(
            lambda leaf, stage=stage: leaf[stage : stage + 1],
            tiny.MODULE_PARAMS["params"]["layers"],
        )
        for stage in (0, 1)
    }
}
RATE, NORM = 2.0, 1.0


def test_equals_a_loop_with_a_clip_by_hand():
    """Two steps of clipped SGD on the plain model's matrix, the scores taken before each."""
    document = tiny.document(0)
    flat = document["tokens"].reshape(-1)

    def mean_of(kernel, chunk):
        params = {"params": tiny.PARAMS["params"] | {"down": {"kernel": kernel}}}
        logits = jax.nn.log_softmax(tiny.decode(params, flat[None])[0])
        nats = -jnp.take_along_axis(logits[:-1], flat[1:, None], 1)[:, 0]
        inside = (jnp.arange(1, flat.size) // tiny.LENGTH == chunk).astype(jnp.float32)
        return (nats * inside).sum() / inside.sum()

    step = jax.jit(jax.value_and_grad(mean_of))
    kernel, expected, norms = tiny.PARAMS["params"]["down"]["kernel"], [], []
    for chunk in range(tiny.CHUNKS):
        loss, grad = step(kernel, chunk)
        expected.append(loss)
        update = -RATE * np.asarray(grad, np.float64)
        norms.append(np.sqrt((update**2).sum()))
        kernel = kernel + jnp.asarray(update * min(1, NORM / norms[-1]), jnp.float32)
    assert min(norms) < NORM < max(norms), "some updates are clipped, and some are not"
    predict = methods.in_place(
        tiny.PLAIN, optimizer=optax.sgd(RATE), max_norm=NORM, select=tiny.DOWN
    )
    _, info = quickly(lambda x: predict(tiny.PARAMS, x, KEY), document)
    np.testing.assert_allclose(info.loss, expected, rtol=2e-4)


def test_the_clip_is_of_each_matrix_and_not_of_a_stack():
    from ttt_jax.methods.in_place import clip_matrices

    stack = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    stack *= np.array([0.01, 1.0, 0.0], np.float32)[:, None, None]
    clip = clip_matrices(0.5)
    clipped, _ = clip.update({"kernel": stack}, clip.init({}))
    norms = np.sqrt(np.square(np.asarray(clipped["kernel"], np.float64)).sum((1, 2)))
    np.testing.assert_array_equal(clipped["kernel"][0], stack[0])
    np.testing.assert_allclose(norms[1:], [0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(
        clipped["kernel"][1] / stack[1], 0.5 / np.linalg.norm(stack[1]), rtol=1e-5
    )


@pytest.fixture(scope="module")
def last_layer():
    """A decoder in two stages, of which the second adapts, compiled."""
    chosen = select.paths(r".*layers_1/mlp/down/kernel")
    return jax.jit(methods.in_place(models.reader(STAGED), select=chosen, max_norm=1.0))


def test_scored_before_it_is_written(last_layer):
    audit.score_before_update(last_layer, MODULE_PARAMS, tiny.document(0), KEY)


def test_stages_name_the_last_layers(last_layer):
    """The same model as without stages, whose first layer does not adapt."""
    control = methods.in_place(tiny.READERS["cached"][0], num_steps=0)
    document = tiny.document(0)
    expected, _ = quickly(lambda x: control(tiny.MODULE_PARAMS, x, KEY), document)
    output, info = last_layer(MODULE_PARAMS, document, KEY)
    np.testing.assert_allclose(output[0], expected[0], rtol=1e-4, atol=1e-5)
    assert np.abs(output[1:] - expected[1:]).max() > 1e-3 and info.updated
    both = methods.in_place(tiny.READERS["cached"][0], max_norm=1.0)
    other, _ = quickly(lambda x: both(tiny.MODULE_PARAMS, x, KEY), document)
    assert np.abs(output[1] - other[1]).max() > 1e-3


def test_a_norm_may_be_traced_and_left_out():
    make = functools.partial(
        methods.in_place, tiny.PLAIN, select=tiny.DOWN, optimizer=optax.sgd(RATE)
    )

    def run(norm):
        losses = [
            make(max_norm=value)(tiny.PARAMS, tiny.document(0), KEY)[1].loss
            for value in (norm, 0.3, 1e9, None)
        ]
        return losses

    traced, fixed, large, none = quickly(run, 0.3)
    np.testing.assert_allclose(traced, fixed, rtol=1e-6)
    np.testing.assert_allclose(large, none, rtol=1e-6)
    assert np.abs(fixed - none).max() > 1e-3


def test_bad_input():
    with pytest.raises(ValueError, match="max_norm"):
        methods.in_place(tiny.PLAIN, max_norm=-1.0)
    with pytest.raises(TypeError, match="read must be a Reader"):
        methods.in_place(tiny.decode)
    predict = methods.in_place(tiny.READERS["cached"][0], select=select.everything())
    with pytest.raises(ValueError, match=r"matrices \[..., F, D\].*shape \(8,\)"):
        predict(tiny.MODULE_PARAMS, tiny.document(0), KEY)

"""in_place_targets against sums written out in NumPy, and a decoder's inputs of its matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.compiling import quickly
from tests.methods import tiny_decoder as tiny
from ttt_jax import audit, methods, models, readers, select

KEY = jax.random.key(0)
RNG = np.random.default_rng(4)
TAPS = RNG.normal(size=(3, tiny.WIDTH)).astype(np.float32)
PROJECTION = RNG.normal(size=(tiny.WIDTH, tiny.WIDTH)).astype(np.float32)
PATH = "params/down/kernel"


def read_with_hidden(params, memory, inputs):
    """The plain reader, and the inputs of its matrix at the chunk's tokens, which come last."""
    kept = []

    def apply(params, joined):
        logits, hidden = tiny.decode_with_hidden(params, joined)
        kept.append(hidden[:, -inputs["tokens"].shape[1] :])
        return logits

    read = readers.recomputed(apply, context=tiny.CHUNKS * tiny.LENGTH)
    logits, memory = read.read(params, memory, inputs)
    return logits, memory, {PATH: kept[0]}


READ = readers.HiddenReader(tiny.PLAIN.init, read_with_hidden)
make = functools.partial(methods.in_place_targets, READ, select=tiny.DOWN)


def targets(params, x):
    """A causal convolution of width 3 over embeddings, then a projection."""
    rows = params["params"]["embedding"][x["tokens"]]
    length = rows.shape[1]
    padded = jnp.pad(rows, ((0, 0), (2, 0), (0, 0)))
    taken = sum(TAPS[k][None, None] * padded[:, 2 - k : 2 - k + length] for k in range(3))
    return taken @ PROJECTION


@pytest.mark.parametrize(("rate", "norm"), [(0.05, 1e9), (0.05, 0.4)])
def test_equals_sums_by_hand(rate, norm):
    document = tiny.document(0)
    flat = document["tokens"].reshape(-1)
    embedding = np.asarray(tiny.PARAMS["params"]["embedding"], np.float64)
    kernel = np.asarray(tiny.PARAMS["params"]["down"]["kernel"], np.float64)
    forward = jax.jit(tiny.decode_with_hidden)
    expected, clipped = [], []
    inputs = np.concatenate([[0], flat[:-1]])
    for chunk in range(tiny.CHUNKS):
        down = {"kernel": jnp.asarray(kernel, jnp.float32)}
        logits, hidden = forward({"params": tiny.PARAMS["params"] | {"down": down}}, flat[None])
        nats = np.concatenate([[0], tiny.nats_of(logits[0, :-1], flat[1:])])
        expected.append(nats.reshape(tiny.CHUNKS, -1)[chunk])
        update = np.zeros_like(kernel)
        for place in range(chunk * tiny.LENGTH, (chunk + 1) * tiny.LENGTH):
            if place == 0:
                continue
            aim = sum(
                TAPS[k].astype(np.float64) * embedding[inputs[place - k]]
                for k in range(3)
                if place - k >= chunk * tiny.LENGTH
            )
            update += rate * np.outer(hidden[0, place - 1], aim @ PROJECTION)
        size = np.linalg.norm(update)
        clipped.append(size > norm)
        kernel = kernel + update * min(1, norm / size)
    assert all(clipped) == (norm == 0.4)
    predict = make(targets, rate=rate, max_norm=norm)
    output, info = quickly(lambda x: predict(tiny.PARAMS, x, KEY), document)
    np.testing.assert_allclose(output, expected, rtol=2e-3, atol=1e-4)
    assert info.ok and info.updated and info.loss.shape == (tiny.CHUNKS,)
    if norm == 0.4:
        np.testing.assert_allclose(info.grad_norm, norm, rtol=1e-5)


def test_scored_before_it_is_added():
    """Targets may look at a chunk's end: the chunk has been scored."""

    def ahead(params, x):
        return params["params"]["embedding"][x["targets"]][:, ::-1]

    predict = jax.jit(make(ahead, max_norm=1.0))
    audit.score_before_update(predict, tiny.PARAMS, tiny.document(0), KEY)


def test_the_published_clip_moves_next_to_nothing():
    def run(x):
        control = methods.document_ttt(tiny.PLAIN, num_steps=0)(tiny.PARAMS, x, KEY)[0]
        return make(targets)(tiny.PARAMS, x, KEY), control

    (output, info), control = quickly(run, tiny.document(0))
    np.testing.assert_allclose(output, control, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(info.grad_norm, 1e-5, rtol=1e-4)


class TestHiddenReader:
    def test_inputs_of_the_second_matrix(self):
        """Of one layer by its formula; in stages the same as in one scan; the logits stay."""
        from ttt_jax.models import _decoder_layer

        params = tiny.MODULE_PARAMS["params"]["layers"]["mlp"]
        layer = jax.tree.map(lambda leaf: leaf[1], params)
        sizes = tiny.MODULE._sizes()
        x = RNG.normal(size=(1, 5, tiny.WIDTH)).astype(np.float32)
        cache = tiny.MODULE.empty_cache(2, 6, 6)
        chunk = {"tokens": tiny.TOKENS[:2, 0], "positions": np.tile(np.arange(6), (2, 1))}

        def run(x):
            mlp = _decoder_layer.GatedMLP(sizes)
            _, kept = mlp.apply({"params": layer}, x, mutable=["intermediates"])
            plain = models.reader(tiny.MODULE).read(tiny.MODULE_PARAMS, cache, chunk)
            read = models.hidden_reader(tiny.MODULE).read
            return kept["intermediates"]["hidden"], plain, read(tiny.MODULE_PARAMS, cache, chunk)

        (hidden,), (logits, _), (other, _, by_path) = quickly(run, x)
        gate, up = (x @ np.asarray(layer[name]["kernel"]) for name in ("gate", "up"))
        np.testing.assert_allclose(hidden, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other, logits, rtol=1e-5, atol=1e-5)
        assert set(by_path) == {"params/layers/mlp/down/kernel"}
        assert by_path["params/layers/mlp/down/kernel"].shape == (2, 2, 6, 12)

    def test_a_decoder_is_written_to(self):
        read = models.hidden_reader(tiny.MODULE)

        def aims(params, x):
            return params["params"]["embedding"][x["targets"]]

        predict = methods.in_place_targets(read, aims, max_norm=0.5)
        control = methods.document_ttt(models.reader(tiny.MODULE), num_steps=0)

        def run(x):
            params = tiny.MODULE_PARAMS
            return predict(params, x, KEY), control(params, x, KEY)[0]

        (output, info), plain = quickly(run, tiny.document(0))
        np.testing.assert_allclose(output[0], plain[0], rtol=1e-5, atol=1e-6)
        assert np.abs(output[1:] - plain[1:]).max() > 1e-3
        # Two layers in one leaf, each clipped on its own.
        np.testing.assert_allclose(info.grad_norm, 0.5 * np.sqrt(2), rtol=1e-4)


def test_bad_input():
    with pytest.raises(TypeError, match="HiddenReader"):
        methods.in_place_targets(tiny.PLAIN, targets)
    with pytest.raises(ValueError, match="rate"):
        make(targets, rate=-1.0)
    with pytest.raises(ValueError, match=r"targets \[N, L, D\] = \(1, 6, 8\).*got shape \(6,\)"):
        make(lambda params, x: jnp.ones(6))(tiny.PARAMS, tiny.document(0), KEY)
    other = methods.in_place_targets(READ, targets, select=select.paths("params/up/kernel"))
    with pytest.raises(ValueError, match=r"whose inputs.*down/kernel.*got 'params/up/kernel'"):
        other(tiny.PARAMS, tiny.document(0), KEY)

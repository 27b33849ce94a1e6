"""What the methods over batches refuse, in one sentence that has the value and the fix."""

import jax
import pytest

from ttt_jax import methods

from . import linear_model as lab

KEY = jax.random.key(0)


def features(params, inputs):
    return inputs


def contrastive(**options):
    return methods.ttt_plus_plus(
        lab.classify, features, features, augment=lambda x, key: x, **options
    )


STREAMS = {
    "tent": lambda **options: methods.tent(lab.classify, **options),
    "pseudo_label": lambda **options: methods.pseudo_label(lab.classify, **options),
    "rpl": lambda **options: methods.rpl(lab.classify, **options),
    "sar": lambda **options: methods.sar(lab.classify, **options),
    "deyo": lambda **options: methods.deyo(lab.classify, **options),
    "rdumb": lambda **options: methods.rdumb(lab.classify, num_classes=3, **options),
    "eata": lambda **options: methods.eata(lab.classify, num_classes=3, **options).build({}),
    "cotta": lambda **options: methods.cotta(lab.classify, augment=lambda x, key: x, **options),
}


@pytest.mark.parametrize("name", STREAMS)
def test_steps_and_order(name):
    with pytest.raises(ValueError, match=r"num_steps must be an integer of at least 0, got -1"):
        STREAMS[name](num_steps=-1)
    with pytest.raises(ValueError, match=r"predict must be 'before' or 'after', got 'first'"):
        STREAMS[name](predict="first")


@pytest.mark.parametrize("name", ["tent", "pseudo_label", "rpl", "sar", "rdumb"])
def test_an_empty_batch(name):
    stream = STREAMS[name](select=lab.EVERYTHING)
    with pytest.raises(ValueError, match=r"needs at least one instance; got 0"):
        stream.step(lab.PARAMS, stream.init(lab.PARAMS), lab.BATCHES[0][:0], KEY)


@pytest.mark.parametrize("method", [methods.eata, methods.rdumb])
def test_number_of_classes(method):
    with pytest.raises(ValueError, match=r"num_classes .* at least 2, got 1"):
        method(lab.classify, num_classes=1)


def test_parameters_without_normalization():
    stream = methods.tent(lab.classify)
    with pytest.raises(ValueError, match=r"norm_affine.* matches none of the 2"):
        stream.init(lab.PARAMS)


def test_contrastive():
    with pytest.raises(ValueError, match="queue must be an integer of at least 2, got 1"):
        contrastive(queue=1)
    with pytest.raises(ValueError, match=r"needs negatives for one instance"):
        contrastive(batch=False)


def test_moments_of_another_layer():
    method = methods.actmad(lab.classify, features)
    moments = method.measure(lab.PARAMS, lab.BATCHES[0][:, :2])
    stream = method.build(moments)
    with pytest.raises(ValueError, match=r"activations differ from the source's"):
        stream.step(lab.PARAMS, stream.init(lab.PARAMS), lab.BATCHES[0], KEY)
    with pytest.raises(ValueError, match=r"needs source statistics with the fields"):
        method.build({"other": 1.0})


def test_one_instance_of_actmad_needs_views():
    method = methods.actmad(lab.classify, features, augment=lambda x, key: x, batch=False)
    moments = method.measure(lab.PARAMS, lab.BATCHES[0])
    with pytest.raises(ValueError, match=r"num_views must be an integer of at least 2, got 1"):
        method.build(moments)

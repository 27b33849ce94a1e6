"""What the methods for one instance refuse, in one sentence that has the value and the fix."""

import jax
import jax.numpy as jnp
import pytest

from tests.core import models
from ttt_jax import methods, select, unbatched

KEY = jax.random.key(0)
PARAMS = models.make_params()
IMAGES = models.make_images(3)


def keep_image(image, key):
    return image


def rotation(**options):
    return methods.ttt_rotation(models.classify, models.turn, **options)


def rotation_online(**options):
    return methods.ttt_rotation_online(models.classify, models.turn, **options)


def turn_statistics(params, images):
    return models.turn(params, images), models.batch_moments(params, images)


def statistics(**options):
    return methods.ttt_rotation_statistics(models.classify, turn_statistics, **options)


def mae(**options):
    settings = {"patch": models.PATCH, "select": select.everything(), **options}
    return methods.ttt_mae(models.classify, models.reconstruct, **settings)


def memo(**options):
    return methods.memo(models.classify, augment=keep_image, **options)


def rotation_memo(**options):
    return methods.rotation_memo(models.classify, models.turn, augment=keep_image, **options)


def rotation_memo_online(**options):
    return methods.rotation_memo_online(models.classify, models.turn, augment=keep_image, **options)


def denoising(**options):
    settings = {"noise": 0.1, "num_copies": 2, **options}
    return methods.ttt_denoising(models.classify, models.decode, **settings)


def neighbors(**options):
    return methods.neighbors(models.classify, models.turn, models.features, **options)


def with_pool(**options):
    method = neighbors(**options)
    return method.build(method.measure(PARAMS, IMAGES))


EPISODIC = [rotation, statistics, mae, memo, rotation_memo, denoising, with_pool]
STREAMS = [rotation_online, rotation_memo_online]


@pytest.mark.parametrize("make", EPISODIC + STREAMS)
def test_number_of_steps(make):
    with pytest.raises(ValueError, match=r"num_steps must be an integer of at least 0, got -1"):
        make(num_steps=-1)


@pytest.mark.parametrize("make", STREAMS)
def test_order(make):
    with pytest.raises(ValueError, match=r"predict must be 'before' or 'after', got 'first'"):
        make(predict="first")


@pytest.mark.parametrize(
    "make", [rotation, rotation_online, statistics, rotation_memo, rotation_memo_online, neighbors]
)
def test_copies(make):
    with pytest.raises(ValueError, match=r"copies must be None or an integer .* at least 1, got 0"):
        make(copies=0)


@pytest.mark.parametrize("make", [memo, rotation_memo, rotation_memo_online])
def test_views(make):
    with pytest.raises(ValueError, match=r"num_views must be an integer of at least 1, got 0"):
        make(num_views=0)


def test_augmentation():
    with pytest.raises(ValueError, match=r"mean must be 'probability' or 'logit', got 'median'"):
        methods.augmented(models.classify, augment=keep_image, mean="median")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0}, r"patch must be an integer of at least 1, got 0"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be between 0 and 1 .*, got 1.0"),
        ({"num_masks": 0}, r"num_masks must be an integer of at least 1, got 0"),
    ],
)
def test_masks(options, message):
    with pytest.raises(ValueError, match=message):
        mae(**options)


def test_masked_autoencoder_needs_a_selection():
    with pytest.raises(TypeError, match=r"required keyword-only argument: 'select'"):
        methods.ttt_mae(models.classify, models.reconstruct, patch=models.PATCH)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_weight_of_the_old_statistics(momentum):
    with pytest.raises(
        ValueError, match=rf"in \[0, 1\]; got {momentum}.*weight of the old statistics"
    ):
        statistics(statistics_momentum=momentum)


def test_a_model_without_running_statistics():
    with pytest.raises(ValueError, match=r"statistics\(\) \(the batch_stats collection\)"):
        statistics()({"params": PARAMS["params"]}, IMAGES[0], KEY)


def test_noise():
    with pytest.raises(ValueError, match=r"num_copies must be an integer of at least 1, got 0"):
        denoising(num_copies=0)
    with pytest.raises(ValueError, match=r"noise must be one standard deviation; got shape \(2,\)"):
        denoising(noise=jnp.ones(2))


def test_more_neighbors_than_the_pool_has():
    with pytest.raises(ValueError, match=r"k must be an integer from 1 to the 3 rows .*, got 20"):
        with_pool()(PARAMS, IMAGES[0], KEY)


@pytest.mark.parametrize(("make", "kind"), [(rotation, "one image"), (memo, "one instance")])
def test_a_batch_where_one_instance_is_due(make, kind):
    with pytest.raises(ValueError, match=rf"works on {kind}.*ttt_jax.batched"):
        make()(PARAMS, IMAGES, KEY)


@pytest.mark.parametrize("name", ["cotta", "deyo", "rpl", "lame", "t3a"])
def test_model_functions_of_one_array_over_a_batch(name):
    def build(model):
        return {
            "cotta": lambda: methods.cotta(model, augment=keep_image),
            "deyo": lambda: methods.deyo(model),
            "rpl": lambda: methods.rpl(model),
            "lame": lambda: methods.lame(model, models.features),
            "t3a": lambda: methods.t3a(model, linear=lambda p: (jnp.eye(5), jnp.zeros(5))),
        }[name]()

    with pytest.raises(TypeError, match=rf"methods.{name} .*got unbatched\(apply\)"):
        build(unbatched(models.classify))


def test_a_method_refuses_several_outputs():
    stream = methods.rpl(lambda params, x: {"logits": models.classify(params, x)})
    with pytest.raises(TypeError, match=r"methods.rpl .*\['logits'\]"):
        jax.eval_shape(lambda x: stream.step(PARAMS, stream.init(PARAMS), x, KEY), IMAGES)


def test_the_label_of_rpl_is_one_class_where_classes_tie():
    head = jax.tree.map(jnp.zeros_like, PARAMS["params"]["head"])
    params = {**PARAMS, "params": {**PARAMS["params"], "head": head}}
    stream = methods.rpl(models.classify, select=select.paths("params/head/.*"))
    _, (_, info) = stream.step(params, stream.init(params), IMAGES, KEY)
    assert info.grad_norm[0] > 0.1

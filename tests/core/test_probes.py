"""What the diagnostics of an instance compare and how far features move, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import diagnostics, losses, models, select
from ttt_jax.source import Moments

KEY = jax.random.key(0)


def test_smoothness_of_a_quadratic():
    """The curvature along the auxiliary gradient e_2 of 0.5 x'Ax is the norm of A e_2."""
    hessian = jnp.array([[2.0, 1.0], [1.0, 5.0]])

    def of(aux_loss):
        return diagnostics.secant_smoothness(
            lambda params, x, label, key: 0.5 * params @ hessian @ params,
            aux_loss,
            select=select.everything(),
        )(jnp.array([1.0, 2.0]), None, None, KEY)

    assert of(lambda params, x, key: 3 * params[1]) == pytest.approx(np.sqrt(26), rel=1e-4)
    assert of(lambda params, x, key: 0 * params[1]) == 0


def test_only_what_both_heads_read_is_compared():
    net = models.ResNet(num_classes=10, depth=8, width=8, groups=4)
    shapes = jax.eval_shape(lambda key: models.init(net, key, (8, 8, 1)), KEY)
    classify = ttt.unbatched(models.from_linen(net))
    instance = (shapes, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32), 0, KEY)

    def main(params, x, label, key):
        return optax.softmax_cross_entropy_with_integer_labels(classify(params, x), label)

    rotation = losses.rotation(models.from_linen(net, "rotation"))

    def shared(selection, aux=rotation):
        found = diagnostics.shared_parameters(main, aux, select=selection)(*instance)
        return ttt.select.describe(found, shapes).paths

    paths = shared(select.everything())
    assert {path.split("/")[1] for path in paths} == {"conv1", "layer1", "layer2"}
    assert set(shared(select.norm_affine())) < set(paths)
    with pytest.raises(ValueError, match=r"share no selected parameter.*got params/rotation_fc/"):
        shared(select.paths(".*rotation_fc.*"))
    paths = shared(select.everything(), lambda params, x, key: classify(params, x)[0])
    assert any(path.startswith("params/fc/") for path in paths)
    assert not any("rotation_" in path for path in paths)


def test_a_nan_is_an_error_and_left_out_of_the_alignment():
    """Of two instances of a linear model, one of whose inputs is not finite."""

    def classify(params, x):
        return params * x

    def make(learning_rate):
        return ttt.gradient_adapter(
            lambda params, x, key: jnp.sum(params * x),
            optax.sgd(learning_rate),
            select=select.everything(),
        )

    probe = diagnostics.probe(
        classify,
        lambda params, x, key: jnp.sum(params * x),
        make,
        select=select.everything(),
        learning_rates=[0.1, 1.0],
        num_steps=1,
    )
    x, labels = jnp.array([[2.0, 1.0], [jnp.nan, 1.0]]), jnp.array([0, 0])

    @jax.jit
    def measured(keys):
        probes, info = ttt.batched(probe)(jnp.ones(2), (x, labels), keys)
        return diagnostics.summary(probes, info, labels, rate_index=1)

    values = measured(jax.random.split(KEY, 2))
    # softmax(2, 1) is (0.731, 0.269); the gradients are (-0.538, 0.269) and (2, 1).
    assert values["inner_product"] == pytest.approx(-0.8068, abs=1e-4)
    assert values["aligned_share"] == 0 and jnp.isnan(values["guaranteed_step"])
    # One step of 1.0 leads to parameters (-1, 0), logits (-2, 0) and class 1.
    assert (values["source_error"], values["ttt_error"]) == (0.5, 1.0)
    np.testing.assert_array_equal(values["oracle_error_map"], [[0.5, 0.5], [0.5, 1.0]])
    assert values["non_finite"] == 1 and "auxiliary_accuracy_before" not in values


def test_as_many_source_inputs_are_one_unit_apart():
    """The mean over many draws of normal features; means by the law of large numbers."""
    count, width = 200, 3
    mix = jnp.array([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.0, -1.0, 0.3]])
    covariance, mean = mix @ mix.T, jnp.array([1.0, -2.0, 0.5])
    source = Moments(mean, covariance)

    def drawn(key):
        z = mean[None] + jax.random.normal(key, (count, width)) @ mix.T
        draw = Moments(z.mean(axis=0), jnp.cov(z.T, bias=True))
        return diagnostics.feature_shift(source, draw, count=count)

    found = jax.vmap(drawn)(jax.random.split(KEY, 300))
    np.testing.assert_allclose([leaf.mean() for leaf in found], 1.0, rtol=0.1)
    with pytest.raises(ValueError, match="count must be an integer of at least 2, got 1"):
        diagnostics.feature_shift(source, source, count=1)

"""A known number outside of its documented range is refused by name; a traced one is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import diagnostics, losses, methods, models as nets, resets, select, views
from ttt_jax.source import Moments

from . import models

CLASSIFY, SGD = models.classify, optax.sgd(0.1)
OPTIONS = {"select": select.everything()}
MOMENTS = Moments(np.zeros(3), np.eye(3))


def moments(**options):
    weights = {"mean_weight": 1.0, "covariance_weight": 1.0, **options}
    return losses.moment_matching(models.features, MOMENTS, batch=True, **weights)


def eata_loss(**options):
    given = {"num_classes": 3, "epsilon": 0.4, **options}
    return losses.sample_adaptive_entropy(CLASSIFY, **given)


def adapter(anchor):
    return ttt.gradient_adapter(losses.entropy(CLASSIFY), SGD, anchor=anchor, **OPTIONS)


def sharp(rho):
    return ttt.sharpness_aware_adapter(losses.entropy(CLASSIFY), SGD, rho=rho, **OPTIONS)


def follows(momentum):
    return ttt.statistics_adapter(models.batch_moments, momentum=momentum)


def on_collapse(threshold=0.2, decay=0.9):
    return resets.on_collapse(lambda output, info: info.loss.mean(), threshold, decay=decay)


def contrastive(temperature):
    return losses.contrastive(models.features, models.jitter, temperature=temperature, batch=True)


def remembers(name, **options):
    build = {"note": methods.note, "rotta": methods.rotta}[name]
    own = {"augment": models.jitter} if name == "rotta" else {}
    like = jnp.zeros((6, 6, 1))
    return build(CLASSIFY, CLASSIFY, like=like, num_classes=3, **own, **options)


def plus_plus(**options):
    return methods.ttt_plus_plus(
        CLASSIFY, models.features, models.features, augment=models.jitter, **options
    )


# name in the message, a builder, a value that is out of range, one that is in it
NUMBERS = {
    "momentum": (follows, 1.5, 0.9),
    "momentum in per cent": (follows, 90, 1),
    "rho": (sharp, -0.05, 0.0),
    "anchor": (adapter, -1.0, 2.0),
    "p": (resets.stochastic_restore, 1.01, 1.0),
    "decay": (lambda value: on_collapse(decay=value), -0.1, 0.0),
    "threshold": (on_collapse, float("nan"), -3.0),
    "weight 0": (
        lambda value: losses.weighted((value, losses.entropy(CLASSIFY))),
        float("nan"),
        -1.0,
    ),
    "threshold of pseudo labels": (
        lambda value: losses.pseudo_label(CLASSIFY, threshold=value),
        90.0,
        1.0,
    ),
    "temperature": (contrastive, 0.0, 0.1),
    "noise": (lambda value: losses.denoising(models.decode, noise=value), -1.0, 0.0),
    "margin": (lambda value: losses.reliable_entropy(CLASSIFY, margin=value), -0.4, jnp.inf),
    "margin of eata": (lambda value: eata_loss(margin=value), -0.4, 1.0),
    "epsilon": (lambda value: eata_loss(epsilon=value), -0.4, 2.0),
    "decay of eata": (lambda value: eata_loss(decay=value), 9.0, 0.9),
    "mean_weight": (lambda value: moments(mean_weight=value), -1.0, 0.0),
    "covariance_weight": (lambda value: moments(covariance_weight=value), -1.0, 0.0),
    "min_area": (views.image.resized_crop, 0.0, 1.0),
    "probability": (views.image.grayscale, 1.5, 0.5),
    "strength": (lambda value: views.image.color_jitter(value, 0.5), -0.1, 0.4),
    "threshold of a choice": (lambda v: diagnostics.largest_change(threshold=v), 90, 0.9),
    "floor": (lambda value: diagnostics.lowest_entropy(floor=value), -1.0, 2.0),
    "q": (lambda value: methods.rpl(CLASSIFY, q=value), 0.0, 1.0),
    "fisher_weight": (
        lambda value: methods.eata(CLASSIFY, num_classes=3, fisher_weight=value),
        -1.0,
        0.0,
    ),
    "threshold of cotta": (
        lambda value: methods.cotta(CLASSIFY, augment=models.jitter, threshold=value),
        92.0,
        0.92,
    ),
    "entropy_margin": (lambda value: methods.deyo(CLASSIFY, entropy_margin=value), -0.1, 0.5),
    "decay of rotta": (lambda value: remembers("rotta", decay=value), 1.1, 0.999),
    "momentum of note": (lambda value: remembers("note", momentum=value), -0.1, 0.01),
    "momentum of dua": (
        lambda value: methods.dua(
            CLASSIFY, models.batch_moments, augment=models.jitter, momentum=value
        ),
        1.5,
        0.1,
    ),
    "head_weight": (lambda value: plus_plus(head_weight=value), -1.0, 0.0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_range_is_refused_by_name_and_a_traced_one_is_taken(name):
    build, wrong, right = NUMBERS[name]
    argument = name.split(" of ")[0].split(" in ")[0]
    shown = r"-1(\.0)?\b" if wrong == -1 else str(wrong)
    for value in (wrong, np.float32(wrong), jnp.float32(wrong)):
        with pytest.raises(ValueError, match=rf"{argument}.* must be a number .*; got .*(\d|nan)"):
            build(value)
    with pytest.raises(ValueError, match=rf"{argument}.*; got {shown}"):
        build(wrong)
    build(right)

    def traced(value):
        build(value)
        return value

    jax.eval_shape(traced, jnp.float32(wrong))


def test_what_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"rho must be a number of at least 0; got '0.05' of type"):
        sharp("0.05")


COUNTS = {
    "num_steps": lambda n: ttt.episodic(sharp(0.1), CLASSIFY, num_steps=n),
    "num_views": lambda n: ttt.augmented(CLASSIFY, models.jitter, num_views=n),
    "num_votes": lambda n: ttt.vote(ttt.source(CLASSIFY), n, combine=lambda outputs: outputs),
    "chunk_size": lambda n: ttt.batched(ttt.source(CLASSIFY), chunk_size=n),
    "queue": lambda n: moments(queue=n),
    "capacity": lambda n: remembers("note", capacity=n),
    "update_every": lambda n: remembers("rotta", update_every=n),
    "max_steps": lambda n: methods.lame(CLASSIFY, models.features, max_steps=n),
    "num_supports": lambda n: methods.t3a(
        models.features, linear=lambda params: params, num_supports=n
    ),
    "count": lambda n: diagnostics.feature_shift(MOMENTS, MOMENTS, count=n),
    "padding": lambda n: views.image.shift(n),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("count", [-1, 2.5, True])
def test_a_count_that_is_none_is_refused_by_name(name, count):
    with pytest.raises(ValueError, match=rf"{name}.* an integer of at least \d, got {count}"):
        COUNTS[name](count)


@pytest.mark.parametrize("hold", [int, np.int64, jnp.int32])
def test_steps_between_resets_whatever_holds_them(hold):
    resets.every(hold(1))
    with pytest.raises(ValueError, match=r"resets.every .* at least 1, got .*0"):
        resets.every(hold(0))


@pytest.mark.parametrize("norm", [jnp.float32(-1.0), np.float32(-1.0), nets.InstanceAware(-4.0)])
def test_a_known_prior_or_width_below_zero(norm):
    with pytest.raises(ValueError, match=r"[pP]rior|InstanceAware.width.*; got -4.0"):
        nets.from_linen(nets.ResNet(), norm=norm)

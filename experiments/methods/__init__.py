"""The methods a config may name: each a predictor (or stream) over one problem.

A method is a family over a small grid of settings; which member is reported is chosen on
validation corruptions (:mod:`experiments.selection`). Every predictor's output is a dict with
``logits`` ``[classes]`` (``[num_steps + 1, classes]`` for a traced one, ``[N, classes]`` for a
whole batch) and, for adapting per-sample methods, ``aux`` of the same leading axes: a probe of
the auxiliary loss on views that are the same for every sample and step.
"""

from collections.abc import Sequence

import jax
import ml_collections

from experiments import problem as problem_lib
from experiments.methods import contrastive, nearby, online, per_sample, source_based, whole_batch
from experiments.methods.method import (
    TRACED as TRACED,
    Measurement as Measurement,
    Method as Method,
    grid_of,
)
from experiments.methods.outputs import probes as probes
from experiments.problem import Problem


def build(
    config: ml_collections.ConfigDict,
    problem: Problem,
    plain: Problem,
    names: Sequence[str] | None = None,
) -> dict[str, Method]:
    """The dict of methods that a config asks for, in its order.

    Args:
      config: its ``methods`` name them.
      problem: for methods whose kernels are private to each sample.
      plain: the same problem with shared kernels, for methods that adapt nothing, or one copy
        for a whole batch.
      names: some of them; None for all.

    Raises:
      ValueError: a name that is not a method, an option that is missing or impossible, or a
        model that the method does not fit.
    """
    makers = {
        "source": (per_sample.source, plain),
        # The same prediction of a model that was trained on both tasks.
        "joint": (per_sample.source, plain),
        "augmented": (per_sample.augmented, plain),
        "norm_prior": (per_sample.norm_prior, plain),
        "norm_prior_views": (per_sample.norm_prior_views, plain),
        "rotation": (per_sample.rotation, problem),
        # One large step instead of several small ones (Sun et al. 2020, appendix).
        "rotation_jump": (per_sample.rotation, problem),
        # Steps whose size the validation corruptions choose, beside the published one.
        "rotation_tuned": (per_sample.rotation, problem),
        # The same steps on few parameters: names for rows whose `select` differs.
        "rotation_norm": (per_sample.rotation, problem),
        "rotation_biases": (per_sample.rotation, problem),
        "rotation_blocks": (per_sample.rotation, problem),
        # Running statistics that follow the copies, without a gradient: a step size of 0.
        "rotation_statistics": (per_sample.rotation, problem),
        "rotation_neighbors": (nearby.rotation_neighbors, problem),
        "memo": (per_sample.memo, problem),
        # The same loss over other views: a name for a row whose `views` differ.
        "memo_augmix": (per_sample.memo, problem),
        "mae": (per_sample.mae, problem),
        "rotation_memo_augmented": (per_sample.rotation_memo_augmented, problem),
        "rotation_online": (online.rotation_online, problem),
        "rotation_online_tuned": (online.rotation_online, problem),
        "rotation_augmented_online": (online.rotation_augmented_online, problem),
        "rotation_memo_augmented_online": (online.rotation_memo_augmented_online, problem),
        "bn_adapt": (whole_batch.bn_adapt, plain),
        "tent": (whole_batch.tent, plain),
        "tent_online": (whole_batch.tent_online, plain),
        "pseudo_label": (whole_batch.pseudo_label, plain),
        "sar": (whole_batch.sar, plain),
        "eata": (source_based.eata, plain),
        "actmad": (source_based.actmad, plain),
        "ttt_plus": (contrastive.ttt_plus, plain),
    }
    for name in config.methods:
        if name not in makers:
            raise ValueError(f"methods.{name} is not a method; choose from {sorted(makers)}.")
    methods = {}
    for name in config.methods if names is None else names:
        make, of = makers[name]
        try:
            grid = grid_of(config.methods[name])
        except ValueError as error:
            raise ValueError(f"methods.{name}: {error}") from error
        methods[name] = make(grid, of)
        _try(name, methods[name], of)
    return methods


def _try(name: str, method: Method, problem: Problem) -> None:
    """Builds every candidate once: a bad option ends the run before it has written anything."""
    for settings in method.grid:
        try:
            if method.measurement is None:
                method.build(settings)
                continue
            # Only the layout of the statistics is needed.
            two = jax.ShapeDtypeStruct((2, *problem.image_shape), "float32")
            fn, params = method.measurement(settings).fn, problem_lib.shapes(problem)
            jax.eval_shape(
                lambda params, two, settings=settings, fn=fn: (
                    method.build(settings, fn(params, two)),
                    0,
                )[1],
                params,
                two,
            )
        except KeyError as error:
            raise ValueError(f"methods.{name} needs the option {error.args[0]!r}.") from error
        except ValueError as error:
            raise ValueError(f"methods.{name}: {error}") from error


def baseline(plain: Problem) -> Method:
    """The source model, against whose predictions right and wrong turns are counted."""
    return per_sample.source(({},), plain)

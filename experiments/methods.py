"""The methods a config may name: each a predictor (or stream) over one problem.

A method is a family over a small grid of settings; which member is reported is chosen on
validation corruptions (:mod:`experiments.selection`). Every predictor's output is a dict with
``logits`` ``[classes]`` (``[num_steps + 1, classes]`` for a traced one) and, for adapting
methods, ``aux`` of the same leading axes: a probe of the auxiliary loss on views that are the
same for every sample and step.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import optax

import ttt_jax as ttt
from experiments.problem import Model, Problem

# The views of the probes are fixed, so that the values before and after adapting differ by the
# adaptation alone.
_PROBE_KEY = 8
_PROBE_VIEWS = 8

# Settings that a program takes as arguments; all others are part of what is compiled.
TRACED = ("learning_rate", "memo_weight", "prior")

Apply = Callable[[Any, jax.Array], dict[str, jax.Array]]


class Method(NamedTuple):
    """One way to predict, over a grid of settings.

    Attributes:
      scope: ``per_sample`` or ``stream``.
      build: ``build(settings) -> Predictor`` (or ``Stream``); see :data:`TRACED`.
      grid: settings per candidate.
      cost: ``cost(settings) -> (forwards, backwards)`` per sample of the method itself, without
        probes.
      probe: the auxiliary loss of its ``aux`` output, a key of :func:`probes`, or None.
      traced: whether the logits have a leading axis over inner steps.
      reset: when a sample's or stream's state is dropped.
      predict: ``"before"`` or ``"after"`` the update; None where nothing adapts.
    """

    scope: str
    build: Callable[[dict[str, Any]], Any]
    grid: tuple[dict[str, Any], ...]
    cost: Callable[[dict[str, Any]], tuple[int, int]]
    probe: str | None = None
    traced: bool = False
    reset: str | None = None
    predict: str | None = None


def _grid(options: ml_collections.ConfigDict) -> tuple[dict[str, Any], ...]:
    """The product of the options that are tuples; the others are the same in every candidate."""
    names = list(options)
    values = [v if isinstance(v, tuple) else (v,) for v in (options[name] for name in names)]
    return tuple(dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values))


def build(config: ml_collections.ConfigDict, problem: Problem, plain: Problem) -> dict[str, Method]:
    """The dict of methods that a config asks for, in its order.

    Args:
      config: its ``methods`` name them.
      problem: for methods whose kernels are private to each sample.
      plain: the same problem with shared kernels, for methods that adapt nothing.

    Raises:
      ValueError: a name that is not a method.
    """
    makers = {
        "source": (_source, plain),
        "augmented": (_augmented, plain),
        "norm_prior": (_norm_prior, plain),
        "norm_prior_views": (_norm_prior_views, plain),
        "rotation": (_rotation, problem),
        "memo": (_memo, problem),
        "rotation_memo_augmented": (_composition, problem),
        "rotation_online": (_rotation_online, problem),
    }
    for name in config.methods:
        if name not in makers:
            raise ValueError(f"methods.{name} is not a method; choose from {sorted(makers)}.")
    methods = {}
    for name, options in config.methods.items():
        make, of = makers[name]
        methods[name] = make(_grid(options), of)
    return methods


def probes(problem: Problem) -> dict[str, Callable[[Any, jax.Array], jax.Array]]:
    """Deterministic readings ``(params, image) -> scalar`` of the auxiliary losses.

    They use running statistics, so that they move with the weights alone.
    """
    key = jax.random.key(_PROBE_KEY)
    model = problem.model()
    rotation = ttt.losses.rotation(model.rotation)
    memo = ttt.losses.marginal_entropy(model.classify, problem.view, num_views=_PROBE_VIEWS)
    return {
        "rotation": lambda params, image: rotation(params, image, key),
        "memo": lambda params, image: memo(params, image, key),
    }


def _model(problem: Problem, settings: dict[str, Any]) -> Model:
    """The model functions of a candidate: a ``prior`` blends source and test statistics."""
    return problem.model(settings.get("prior", "running"))


def _plain(problem: Problem, settings: dict[str, Any], probe: str | None = None) -> Apply:
    """Predicts the image as it is."""
    one = ttt.unbatched(_model(problem, settings).classify)
    if probe is None:
        return lambda params, image: {"logits": one(params, image)}
    read = probes(problem)[probe]
    return lambda params, image: {"logits": one(params, image), "aux": read(params, image)}


def _every_view(problem: Problem, settings: dict[str, Any], probe: str | None = None) -> Apply:
    """Predicts the mean probability over every view, all of them in one batch."""
    classify = _model(problem, settings).classify
    read = probes(problem)[probe] if probe else None

    def apply(params: Any, image: jax.Array) -> dict[str, jax.Array]:
        log_p = jax.nn.log_softmax(classify(params, problem.every_view(image)), axis=-1)
        # The logarithm of the mean but for a constant, which changes no prediction.
        output = {"logits": jax.nn.logsumexp(log_p, axis=0)}
        return output | ({"aux": read(params, image)} if read else {})

    return apply


def _num_views(problem: Problem) -> int:
    image = jax.ShapeDtypeStruct(problem.image_shape, "float32")
    return int(jax.eval_shape(problem.every_view, image).shape[0])


def _selection(settings: dict[str, Any]) -> ttt.Selection:
    """``all``, ``norm`` or a pattern for ``select.paths``."""
    if settings["select"] == "all":
        return ttt.select.everything()
    if settings["select"] == "norm":
        return ttt.select.norm_affine()
    return ttt.select.paths(settings["select"])


def describe(settings: dict[str, Any], params: Any) -> ttt.select.Description | None:
    """What a candidate's selection adapts; None where nothing adapts."""
    return ttt.select.describe(_selection(settings), params) if "select" in settings else None


def _adapter(loss: Any, settings: dict[str, Any]) -> ttt.Adapter:
    optimizer = optax.sgd(settings["learning_rate"])
    return ttt.gradient_adapter(loss, optimizer, select=_selection(settings))


def _rotation_loss(problem: Problem, settings: dict[str, Any]) -> ttt.AuxLoss:
    copies = settings["copies"]
    rotation = _model(problem, settings).rotation
    return ttt.losses.rotation(rotation, copies=copies, augment=problem.view)


def _memo_loss(problem: Problem, settings: dict[str, Any]) -> ttt.AuxLoss:
    views = settings["num_views"]
    classify = _model(problem, settings).classify
    return ttt.losses.marginal_entropy(classify, problem.view, num_views=views)


def _views(settings: dict[str, Any]) -> int:
    """Views that one inner step looks at."""
    copies = 4 if settings.get("copies", 0) is None else settings.get("copies", 0)
    return copies + settings.get("num_views", 0)


def _source(grid: Any, problem: Problem) -> Method:
    return Method("per_sample", lambda s: ttt.source(_plain(problem, s)), grid, lambda s: (1, 0))


def baseline(plain: Problem) -> Method:
    """The source model, against whose predictions right and wrong turns are counted."""
    return _source(({},), plain)


def _norm_prior(grid: Any, problem: Problem) -> Method:
    """Blends the statistics of the one image into those of the source; no gradient."""
    return _source(grid, problem)


def _norm_prior_views(grid: Any, problem: Problem) -> Method:
    """Every view in one batch with blended statistics: the composition without its gradient."""
    views = _num_views(problem)
    return Method(
        "per_sample", lambda s: ttt.source(_every_view(problem, s)), grid, lambda s: (views, 0)
    )


def _augmented(grid: Any, problem: Problem) -> Method:
    def make(settings: dict[str, Any]) -> ttt.Predictor:
        one = ttt.unbatched(_model(problem, settings).classify)
        predict = ttt.augmented(one, problem.view, num_views=settings["num_views"])

        def labelled(params: Any, image: jax.Array, key: jax.Array) -> Any:
            logits, info = predict(params, image, key)
            return {"logits": logits}, info

        return labelled

    return Method("per_sample", make, grid, lambda s: (s["num_views"], 0))


def _traced(grid: Any, problem: Problem, loss: Callable[..., Any], probe: str) -> Method:
    """An episodic method that predicts the plain image after every step."""

    def make(settings: dict[str, Any]) -> ttt.Predictor:
        adapter = _adapter(loss(problem, settings), settings)
        apply = _plain(problem, settings, probe)
        return ttt.episodic(adapter, apply, num_steps=settings["num_steps"], trace=True)

    def cost(settings: dict[str, Any]) -> tuple[int, int]:
        work = settings["num_steps"] * _views(settings)
        return work + 1, work

    return Method(
        "per_sample", make, grid, cost, probe, traced=True, reset="episodic", predict="after"
    )


def _rotation(grid: Any, problem: Problem) -> Method:
    return _traced(grid, problem, _rotation_loss, "rotation")


def _memo(grid: Any, problem: Problem) -> Method:
    return _traced(grid, problem, _memo_loss, "memo")


def _composition(grid: Any, problem: Problem) -> Method:
    """Adapts to rotation and marginal entropy together; predicts the mean over every view."""
    views = _num_views(problem)

    def make(settings: dict[str, Any]) -> ttt.Predictor:
        loss = ttt.losses.weighted(
            (1.0, _rotation_loss(problem, settings)),
            (settings["memo_weight"], _memo_loss(problem, settings)),
        )
        apply = _every_view(problem, settings, "rotation")
        return ttt.episodic(_adapter(loss, settings), apply, num_steps=settings["num_steps"])

    def cost(settings: dict[str, Any]) -> tuple[int, int]:
        work = settings["num_steps"] * _views(settings)
        return work + views, work

    return Method("per_sample", make, grid, cost, "rotation", reset="episodic", predict="after")


def _rotation_online(grid: Any, problem: Problem) -> Method:
    def make(settings: dict[str, Any]) -> ttt.Stream:
        return ttt.online(
            _adapter(_rotation_loss(problem, settings), settings),
            _plain(problem, settings, "rotation"),
            num_steps=settings["num_steps"],
            reset=ttt.resets.never(),
            predict="after",
        )

    def cost(settings: dict[str, Any]) -> tuple[int, int]:
        work = settings["num_steps"] * _views(settings)
        return work + 1, work

    return Method("stream", make, grid, cost, "rotation", reset="per_domain", predict="after")

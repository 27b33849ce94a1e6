"""From the entries of a config to optimizers, selections and methods: all that knows names.

``config.methods`` maps a label to settings. ``method`` names a function of ``ttt_jax.methods`` (the
label itself where it is left out) or a function of a user's own, ``package.module:name``. Its other
settings are arguments of that function, of the optimizer, or of ``Task.heads``. A tuple is a list
of candidates, and so is a list, among which validation chooses.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

import ttt_jax as ttt
from experiments import launch
from ttt_jax import evaluation, methods, training
from ttt_jax.task import Task

Settings = dict[str, Any]

# Of NT-Xent: that of SimCLR on CIFAR-10 (Chen et al. 2020, appendix B.9) and of TTT++.
CONTRASTIVE_TEMPERATURE = 0.5

# Settings that a program takes as arguments; all others are part of what is compiled.
TRACED = ("learning_rate", "memo_weight", "prior", "reset_below")

_OPTIMIZER = ("optimizer", "learning_rate", "momentum", "nesterov", "weight_decay", "b2", "eps")
# What only this file reads.
_OWN = ("method", "episodic", "augment", "source_examples", "source_batch", *_OPTIMIZER)

# Published rules that one number of a config cannot say: the optimizer whose learning rate it
# sets, statistics of BatchNorm, and the source data that is measured.
PUBLISHED: dict[str, Settings] = {
    "tent": {"optimizer": "adam"},
    "pseudo_label": {"optimizer": "adam"},
    "sar": {"momentum": 0.9},
    "eata": {"optimizer": "adam", "source_examples": 2000, "source_batch": 64},
    "actmad": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "norm": "running"},
    "ttt_plus_plus": {"momentum": 0.9},
    "document_ttt": {"optimizer": "adam", "b2": 0.95, "eps": 1e-10},
}


class Candidate(NamedTuple):
    """One setting of one method of a config.

    Attributes:
      label: of the method in the config and in rows.
      settings: as the config has them.
      scope: ``per_sample``, ``batch`` or ``stream``.
      facts: ``num_steps``, ``reset`` and ``predict`` of its rows.
      bind: ``bind(params, seed) -> Parametric``, which measures the source data where needed.
      select: the parameters that adapt; None where no gradient is taken.
    """

    label: str
    settings: Settings
    scope: str
    facts: Settings
    bind: Callable[[Any, int], evaluation.Parametric]
    select: ttt.Selection | None = None


def candidates(config: ml_collections.ConfigDict, task: Task) -> dict[str, list[Candidate]]:
    """All candidates of all methods of a config, each built once.

    Raises:
      ValueError: an unknown method, or a setting that is unknown, missing or impossible.
    """
    found, size = {}, config.adapt.batch_size
    for label in config.methods:
        try:
            grid = grid_of(config.methods[label])
            found[label] = [_candidate(label, options, task, size) for options in grid]
        except (ValueError, TypeError) as error:
            raise ValueError(f"methods.{label}: {error}") from error
    return found


def grid_of(options: Mapping[str, Any]) -> tuple[Settings, ...]:
    """The product of the settings that are tuples or lists; the others are in every candidate.

    Raises:
      ValueError: a tuple or list without values.
    """
    for name, value in options.items():
        if isinstance(value, tuple | list) and not value:
            raise ValueError(f"{name} lists no candidate; give it at least one value.")
    values = [value if isinstance(value, tuple | list) else (value,) for value in options.values()]
    return tuple(dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*values))


def imported(path: str, key: str) -> Any:
    """What an import path ``package.module:name`` names.

    Raises:
      ValueError: nothing there.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{key} must be PACKAGE.MODULE:NAME of something that can be imported here; got "
            f"{path!r} ({error})."
        ) from error


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """``sgd`` (the default), with ``momentum`` (and ``nesterov``) if there is one, or ``adam``.

    ``weight_decay`` adds to the gradient, as PyTorch's does.
    """
    name, momentum = settings.get("optimizer", "sgd"), settings.get("momentum")
    if "learning_rate" not in settings:
        raise ValueError("an optimizer needs the setting 'learning_rate'.")
    if name == "sgd":
        nesterov = settings.get("nesterov", False)
        base = optax.sgd(settings["learning_rate"], momentum=momentum, nesterov=nesterov)
    elif name == "adam" and momentum is None:
        given = {name: settings[name] for name in ("b2", "eps") if name in settings}
        base = optax.adam(settings["learning_rate"], **given)
    else:
        raise ValueError(
            "optimizer must be 'sgd', with or without momentum, or 'adam' without; got "
            f"{name!r} with momentum={momentum!r}."
        )
    decay = settings.get("weight_decay")
    return base if decay is None else optax.chain(optax.add_decayed_weights(decay), base)


def training_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The optimizer, the weight decay and the schedule of a training.

    Raises:
      ValueError: an unknown ``train.schedule`` or ``train.optimizer``, or a ``train.warmup_steps``
        that is not shorter than the training.
    """
    kinds = (("train.schedule", ("cosine", "step")), ("train.optimizer", ("sgd", "adamw")))
    for key, allowed in kinds:
        if (name := launch.setting(config, key)) not in allowed:
            raise ValueError(f"{key} must be one of {list(allowed)}; got {name!r}.")
    warmup = launch.setting(config, "train.warmup_steps")
    if not 0 <= warmup < max(config.train.num_steps, 1):
        raise ValueError(
            f"train.warmup_steps must lie between 0 and the {config.train.num_steps} of "
            f"train.num_steps; got {warmup}."
        )
    train = config.train
    steps = max(train.num_steps, 1) - warmup
    if launch.setting(config, "train.schedule") == "cosine":
        rate = optax.cosine_decay_schedule(train.learning_rate, steps)
    else:
        # A tenth at 1/2 and at 5/6 of the training: epochs 75 and 125 of 150 (Sun et al. 2020).
        rate = optax.piecewise_constant_schedule(
            train.learning_rate, {steps // 2: 0.1, steps * 5 // 6: 0.1}
        )
    if warmup:
        climb = optax.linear_schedule(0.0, train.learning_rate, warmup)
        rate = optax.join_schedules([climb, rate], [warmup])
    if launch.setting(config, "train.optimizer") == "adamw":
        # As for the MAE of He et al. 2022: the second moment forgets faster than by default, and
        # only matrices decay.
        return optax.adamw(
            rate,
            b2=0.95,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        )
    return optax.chain(
        optax.add_decayed_weights(train.weight_decay), optax.sgd(rate, momentum=train.momentum)
    )


def selection(chosen: str) -> ttt.Selection:
    """``all``, ``norm``, ``biases``, ``lora`` or a pattern for ``select.paths``."""
    named = {
        "all": ttt.select.everything,
        "norm": ttt.select.norm_affine,
        "biases": ttt.select.biases,
        "lora": ttt.select.lora,
    }
    return named[chosen]() if chosen in named else ttt.select.paths(chosen)


def reset(name: str | int) -> ttt.Reset:
    """``never``, or an integer n for every n-th instance."""
    if name == "never":
        return ttt.resets.never()
    return ttt.resets.every(name)


def auxiliary(config: ml_collections.ConfigDict, task: Task) -> training.Auxiliary | None:
    """The auxiliary task of training, ``train.aux``, with the weight ``train.aux_weight``.

    ``rotation``: all four rotations of every instance. ``mae``: one mask of ``train.mask_ratio``
    each. ``contrastive``: two views of every instance against those of all others. ``none``.
    Of a user's own, ``package.module:name``: a function of heads, as methods take them by the names
    of their arguments, to ``loss(params, x[N, ...], key)``.

    Raises:
      ValueError: an unknown one, or one whose head the model lacks.
    """
    name = launch.setting(config, "train.aux")
    if name == "none":
        return None
    allowed = inspect.signature(task.heads).parameters
    heads = task.heads(**({"norm": "batch"} if "norm" in allowed else {}))
    if ":" in name:
        factory = imported(name, "train.aux")
        needed = inspect.signature(factory).parameters.values()
        wanted = [p.name for p in needed if p.name in heads or p.default is p.empty]
        loss = factory(**{head: _head(heads, head, name, task) for head in wanted})
    elif name == "rotation":
        loss = ttt.losses.rotation(_head(heads, "rotation", "train.aux", task), batch=True)
    elif name == "mae":
        loss = ttt.losses.masked_reconstruction(
            _head(heads, "reconstruct", "train.aux='mae'", task),
            patch=heads["patch"],
            mask_ratio=launch.setting(config, "train.mask_ratio"),
            batch=True,
        )
    elif name == "contrastive":
        project = _head(heads, "project", "train.aux='contrastive'", task)
        loss = ttt.losses.contrastive(
            project, heads["simclr"], temperature=CONTRASTIVE_TEMPERATURE, batch=True
        )
    else:
        raise ValueError(
            "train.aux must be 'rotation', 'mae', 'contrastive', 'none' or PACKAGE.MODULE:NAME; "
            f"got {name!r}."
        )
    return training.Auxiliary(name.rpartition(":")[2], loss, config.train.get("aux_weight", 1.0))


def parameter_counts(select: ttt.Selection | None, shapes: Any) -> dict[str, int]:
    """How many parameters a selection has, 0 without one, and of how many."""
    learned = {"params": shapes["params"]} if "params" in shapes else shapes
    total = sum(leaf.size for leaf in jax.tree.leaves(learned))
    if select is None:
        return {"adapted_parameters": 0, "total_parameters": total}
    chosen = ttt.select.describe(select, learned)
    return {"adapted_parameters": chosen.num_elements, "total_parameters": chosen.total_elements}


def function_of(settings: Mapping[str, Any], label: str) -> tuple[str, Callable[..., Any]]:
    """The name and the function of a method.

    Raises:
      ValueError: there is none of the name.
    """
    name = settings.get("method", label)
    if ":" in name:
        return name, imported(name, "method")
    if name not in methods.__all__:
        known = ", ".join(sorted(methods.__all__))
        raise ValueError(
            f"method must be a function of ttt_jax.methods or PACKAGE.MODULE:NAME; got {name!r}"
            f"{launch.nearest(name, methods.__all__) or '.'} There are {known}."
        )
    return name, getattr(methods, name)


def _candidate(label: str, options: Settings, task: Task, batch_size: int) -> Candidate:
    name, function = function_of(options, label)
    settings = PUBLISHED.get(name, {}) | options
    if settings.get("optimizer") == "adam" and options.get("momentum") is None:
        settings.pop("momentum", None)
    parameters = inspect.signature(function).parameters
    in_batches = "batch" in parameters and parameters["batch"].default is True
    in_batches = settings.get("batch", in_batches)

    def method(settings: Settings) -> Any:
        return function(**_arguments(name, parameters, settings, task, in_batches))

    def build(values: Any, settings: Settings = settings) -> Any:
        built = method(settings | values["numbers"])
        if isinstance(built, ttt.FromSource):
            built = built.build(values["statistics"])
        if settings.get("episodic", False):
            built = ttt.episode(built)
        return evaluation.InBatches(built, batch_size) if in_batches else built

    numbers = {k: jnp.float32(v) for k, v in settings.items() if k in TRACED}
    static = tuple(sorted((k, v) for k, v in settings.items() if k not in TRACED))
    key = (task.name, label, static, tuple(sorted(numbers)), batch_size)

    def bind(params: Any, seed: int) -> evaluation.Parametric:
        statistics: Any = ()
        plain = method(settings)
        if isinstance(plain, ttt.FromSource):
            size, count = settings.get("source_batch", 500), settings.get("source_examples")
            statistics = evaluation.measured(plain, params, task, seed=seed, size=size, count=count)
        values = {"numbers": numbers, "statistics": statistics}
        return evaluation.Parametric(build, values, key)

    scope = _scope(method(settings), build, numbers, task)
    select = None
    if "select" in parameters:
        default = parameters["select"].default
        select = selection(settings["select"]) if "select" in settings else default
    return Candidate(label, options, scope, _facts(settings, parameters, scope), bind, select)


def _scope(plain: Any, build: Callable[[Any], Any], numbers: Any, task: Task) -> str:
    """The scope of a method, built once with statistics of the right layout."""
    if not isinstance(plain, ttt.FromSource):
        return evaluation.scope_of(build({"numbers": numbers, "statistics": ()}))
    x = next(iter(task.training(0))).x
    two = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), x)
    scopes = []

    def traced(params: Any, two: Any) -> int:
        statistics = plain.measure(params, two)
        scopes.append(evaluation.scope_of(build({"numbers": numbers, "statistics": statistics})))
        return 0

    jax.eval_shape(traced, jax.eval_shape(task.init, jax.random.key(0)), two)
    return scopes[0]


def _facts(settings: Settings, parameters: Mapping[str, inspect.Parameter], scope: str) -> Settings:
    def value(name: str, absent: Any) -> Any:
        default = parameters[name].default if name in parameters else absent
        return settings.get(name, absent if default is inspect.Parameter.empty else default)

    adapts = "optimizer" in parameters
    kept = {"stream": "per_stream"}.get(scope, "episodic")
    return {
        "num_steps": value("num_steps", 0),
        "reset": kept if adapts or scope == "stream" else None,
        "predict": value("predict", "after") if adapts else None,
    }


def _arguments(
    name: str,
    parameters: Mapping[str, inspect.Parameter],
    settings: Settings,
    task: Task,
    in_batches: bool,
) -> dict[str, Any]:
    """The arguments of a method: from settings, the optimizer, and the heads of the task."""
    # The task makes `serve`; a setting of that name says which.
    own = {*parameters, *_OWN} - {"serve"}
    serving = {k: v for k, v in settings.items() if k not in own}
    if "prior" in serving:
        serving["norm"] = serving.pop("prior")
    allowed = inspect.signature(task.heads).parameters
    if in_batches and "norm" in allowed:
        serving.setdefault("norm", "batch")
    if "private" in allowed and "optimizer" in parameters and not in_batches:
        serving["private"] = True
    known = {*parameters, *allowed, *_OPTIMIZER, "method", "prior"} - {"private"}
    launch.require_known(name, [k for k in serving if k not in allowed], known)
    heads = dict(task.heads(**serving))
    if name == "bn_adapt" and not heads.get("batch_norm", True):
        raise ValueError(
            f"bn_adapt needs a model with BatchNorm, and that of {task.name} has none; set "
            "model.norm='batch', or remove the method."
        )
    if name == "source":
        # Whatever a task predicts, it is its first head.
        heads.setdefault("classify", next(iter(heads.values())))
    if "augment" in settings:
        heads["augment"] = _head(heads, settings["augment"], name, task)
    arguments: dict[str, Any] = {}
    for parameter in parameters.values():
        key = parameter.name
        if key == "optimizer":
            if "learning_rate" in settings:
                arguments[key] = optimizer(settings)
        elif key == "select" and key in settings:
            arguments[key] = selection(settings[key])
        elif key == "reset" and key in settings:
            arguments[key] = reset(settings[key])
        elif key in settings and key not in ("augment", "serve"):
            arguments[key] = settings[key]
        elif key in heads:
            arguments[key] = heads[key]
        elif parameter.default is parameter.empty:
            arguments[key] = _head(heads, key, name, task)
    return arguments


def _head(heads: Mapping[str, Any], key: str, name: str, task: Task) -> Any:
    if ":" in key:
        return imported(key, "augment")
    if key not in heads:
        raise ValueError(
            f"{name} needs {key!r}; {task.name} has {', '.join(sorted(heads))}. Add a head of "
            "that name to the model, or give the setting."
        )
    return heads[key]

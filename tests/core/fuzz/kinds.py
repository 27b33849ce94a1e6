"""The kind of each parameter, read from its annotation and its name."""

import collections.abc
import inspect
import types
import typing

import jax
import numpy as np
import optax

from ttt_jax import base, data, evaluation, task, training

# What a factory is given as a model function over a batch [N, ...].
_MODELS = {
    *("classify", "rotation", "features", "project", "reconstruct", "denoise", "activations"),
    *("classify_statistics", "rotation_statistics", "collect"),
}
_OF_CLASS = {
    base.Adapter: "adapter",
    base.Selection: "selection",
    base.Stream: "stream",
    base.Reset: "reset",
    base.FromSource: "from_source",
    optax.GradientTransformation: "optimizer",
    task.Task: "task",
    task.Examples: "record",
    training.Auxiliary: "record",
    evaluation.Evaluation: "record",
    data.Source: "record",
    bool: "flag",
    int: "count",
    float: "number",
    str: "text",
    np.ndarray: "array",
    jax.sharding.Mesh: "record",
}
_OF_NAME = {
    "key": "key",
    "keys": "keys",
    "params": "params",
    "adapted": "params",
    "labels": "labels",
    "path": "path",
    "split": "text",
    **dict.fromkeys(("logits", "pristine_logits", "adapted_logits", "outputs"), "array"),
    **dict.fromkeys(("learning_rates", "ids", "weights"), "array"),
    **dict.fromkeys(("threshold", "floor", "smoothness"), "number"),
}


_CONTAINERS = (
    *(tuple, list, dict),
    *(collections.abc.Sequence, collections.abc.Mapping, collections.abc.MutableMapping),
)


def kind_of(parameter: inspect.Parameter) -> str:
    """One word for what a parameter takes; "tree" for what may be any pytree."""
    name, annotation = parameter.name, parameter.annotation
    if name in _OF_NAME:
        return _OF_NAME[name]
    if annotation is typing.Any:
        return "tree"
    members = (annotation,)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
    if base.Predictor in members:
        return "predictor"
    if base.AuxLoss in members:
        return "loss"
    for member in members:
        origin = typing.get_origin(member)
        if origin is collections.abc.Callable:
            if name == "apply" and typing.get_args(member)[0] is not ...:
                return "apply"
            return "model" if name in _MODELS or name == "apply" else "function"
        if origin in (
            tuple,
            collections.abc.Sequence,
            collections.abc.Mapping,
            collections.abc.MutableMapping,
            dict,
            list,
        ):
            return "record"
        if member in _OF_CLASS:
            return _OF_CLASS[member]
    if jax.Array in members:
        return "array"
    return "record" if isinstance(annotation, type) else "tree"


def optional(parameter: inspect.Parameter) -> bool:
    """Whether ``None`` is a value of its own."""
    return parameter.default is None or type(None) in typing.get_args(parameter.annotation)

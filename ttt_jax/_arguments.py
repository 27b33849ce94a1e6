"""Checks of what public functions are given, read from their signatures where they are called.

``@checked()`` compares each argument with its annotation: an ``Adapter``, a flag, an array, a
function of three arguments. What an annotation does not say (the least count, the rank of an
array) is given by name: ``@checked(image=array(3), k=count(1))``, and ``None`` leaves an argument
out. A default is never checked. All of it happens in Python, before the function itself: a
compiled program holds none of it, and traced values are asked for their shape alone.
"""

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import optax

from ttt_jax import base
from ttt_jax._rules import (
    Rule as Rule,
    array as array,
    count as count,
    count_or as count_or,
    flag as flag,
    function as function,
    having as having,
    instance as instance,
    integer as integer,
    iterable as iterable,
    loss as loss,
    many_keys as many_keys,
    mapping as mapping,
    model as model,
    named as named,
    number as number,
    one_key as one_key,
    optimizer as optimizer,
    params as params,
    params_or_function as params_or_function,
    path as path,
    plain_loss as plain_loss,
    plain_number as plain_number,
    predictor as predictor,
    sequence as sequence,
    text as text,
    tree as tree,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])

# What is given as a model function over a batch [N, ...], by the names of heads.
_MODELS = frozenset(
    (
        *("classify", "rotation", "features", "project", "reconstruct", "denoise", "activations"),
        *("classify_statistics", "rotation_statistics", "statistics"),
    )
)


def checked(**rules: Rule | None) -> Callable[[_Function], _Function]:
    """Decorates a public function so that its arguments are checked first; see the module."""

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        place = _place(function)
        by_name: dict[str, Rule] = {}
        for name, parameter in signature.parameters.items():
            rule = rules[name] if name in rules else _rule_of(parameter)
            if rule is not None and parameter.kind is parameter.VAR_POSITIONAL:
                rule = _of_each(rule)
            if rule is not None:
                by_name[name] = rule
        # A default, and None where the annotation has it.
        unchecked = {
            name: (p.default, None) if type(None) in typing.get_args(p.annotation) else (p.default,)
            for name, p in signature.parameters.items()
        }

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python's own words on missing arguments
            given = bound.arguments
            for name, rule in by_name.items():
                if name in given and not any(given[name] is free for free in unchecked[name]):
                    given[name] = rule(place, name, given[name])
            return function(*bound.args, **bound.kwargs)

        return typing.cast(_Function, call)

    return decorate


def _place(function: Callable[..., Any]) -> str:
    parts = function.__module__.split(".")[1:]
    name = function.__qualname__.removesuffix(".__init__")
    return f"{parts[0]}.{name}" if parts and parts[0] in ("losses", "methods") else name


def _of_each(rule: Rule) -> Rule:
    return lambda place, name, values: tuple(rule(place, name, value) for value in values)


def _rule_of(parameter: inspect.Parameter) -> Rule | None:
    """The rule that the annotation of a parameter states, or its name; ``None`` for none."""
    name, annotation = parameter.name, parameter.annotation
    if annotation is parameter.empty:
        return None
    members: tuple[Any, ...] = (annotation,)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
    if name in ("params", "adapted"):
        return params if annotation is Any else params_or_function
    if jax.Array in members and name in ("key", "keys"):
        return one_key if name == "key" else many_keys
    if jax.Array in members and (float in members or int in members):
        return plain_number
    if base.Predictor in members:
        return predictor
    if base.AuxLoss in members:
        return loss if base.StatefulLoss in members else plain_loss
    members = tuple(member for member in members if member is not type(None))
    if len(members) > 1:
        classes = [m for m in members if isinstance(m, type) and m.__module__ != "builtins"]
        return instance(*classes) if len(classes) == len(members) else None
    (member,) = members
    origin, inner = typing.get_origin(member), typing.get_args(member)
    if member is Any:
        return tree
    if origin is collections.abc.Callable:
        return _function_rule(name, inner[0])
    if origin in (tuple, collections.abc.Sequence, list):
        return sequence(*(kind for kind in inner[:1] if isinstance(kind, type)))
    if origin in (collections.abc.Mapping, collections.abc.MutableMapping, dict):
        return mapping
    return _of_class(member) if isinstance(member, type) else None


def _of_class(kind: type) -> Rule | None:
    if kind in (jax.Array, np.ndarray):
        return array(host=kind is np.ndarray)
    if kind is optax.GradientTransformation:
        return optimizer
    if kind in (bool, str):
        return flag if kind is bool else text
    if kind in (int, float):
        return plain_number
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return tree
    return instance(kind)


def _function_rule(name: str, arguments: Any) -> Rule | None:
    if arguments is ...:
        return None  # the function says it itself, as it knows whether a key comes last
    if name in _MODELS:
        return model
    return function(len(arguments))


def check_fields(owner: Any, **rules: Rule) -> None:
    """Checks the fields of a dataclass, as of a Linen module, where it is made."""
    for name, rule in rules.items():
        value = rule(type(owner).__name__, name, getattr(owner, name))
        object.__setattr__(owner, name, value)

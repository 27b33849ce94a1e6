"""Tasks: one file per kind of data, each with ``task(config) -> ttt_jax.task.Task``.

``config.task`` names the file (``images`` where it is left out) or a function of a user's own as
``package.module:name``. A file, and a user's own module, may have more, which the check of a
config takes (:mod:`experiments.config_check`):

- ``KEYS``: the keys that its task reads, as :mod:`experiments.config_keys` has them;
- ``HEAD_KEYS``: the settings of methods that are arguments of its heads;
- ``model_options(config)``: the options of the model, or :data:`ANY_OPTION`;
- ``stream_names(config)``: the names of its streams;
- ``check_config(config)``: refuses what no single key shows;
- ``fingerprint(config)``: what tells its data apart, by name, where ``config.data`` does not;
- ``at_hand(config)``: the same of what a work folder notes, where reading all takes too long.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import ml_collections

from experiments import settings
from ttt_jax.task import Task


def build(config: ml_collections.ConfigDict) -> Task:
    """The task that a config describes.

    Raises:
      ValueError: no such task.
    """
    name = config.get("task", "images")
    if ":" in name:
        return settings.imported(name, "task")(config)
    return _module(config).task(config)


def fingerprint(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What tells the data of a config apart, by name and as JSON has it.

    Raises:
      ValueError: no such task.
    """
    module = _module(config)
    if hasattr(module, "fingerprint"):
        return json.loads(json.dumps(module.fingerprint(config)))
    return {"config": json.loads(config.data.to_json())}


def at_hand(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fingerprints that a work folder notes; none where ``config.data`` says it all."""
    module = _module(config)
    found = getattr(module, "at_hand", getattr(module, "fingerprint", None))
    return {} if found is None else json.loads(json.dumps(found(config)))


# Of a model that says itself which options it has.
ANY_OPTION = ("*",)


def keys(config: ml_collections.ConfigDict) -> Mapping[str, Any] | None:
    """The keys that a task reads; None where it does not say them."""
    return getattr(_module(config), "KEYS", None)


def head_keys(config: ml_collections.ConfigDict) -> Mapping[str, Any] | None:
    """The settings of methods that are its heads'; None where a task does not say its keys."""
    none = None if keys(config) is None else {}
    return getattr(_module(config), "HEAD_KEYS", none)


def model_options(config: ml_collections.ConfigDict) -> Sequence[str] | None:
    """The options of a config's model; None where the task's keys have them."""
    found = getattr(_module(config), "model_options", None)
    return None if found is None else found(config)


def stream_names(config: ml_collections.ConfigDict) -> Sequence[str] | None:
    """The names of all streams of a task, without its data; None where it does not say them."""
    found = getattr(_module(config), "stream_names", None)
    return None if found is None else found(config)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Refuses what a task refuses without its data."""
    getattr(_module(config), "check_config", lambda config: None)(config)


def _module(config: ml_collections.ConfigDict) -> ModuleType:
    name = config.get("task", "images")
    if ":" in name:
        settings.imported(name, "task")
        return importlib.import_module(name.partition(":")[0])
    try:
        return importlib.import_module(f"experiments.tasks.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"config.task must be a file of experiments/tasks or PACKAGE.MODULE:FUNCTION; got "
            f"{name!r} ({error})."
        ) from error

"""Tasks: one file per kind of data, each with ``task(config) -> ttt_jax.task.Task``.

``config.task`` names the file (``images`` where it is left out) or a function of a user's own as
``package.module:name``. A file may have ``fingerprint(config)`` too: what tells its data apart,
where ``config.data`` does not.
"""

import importlib
import json
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
    return _module(name).task(config)


def fingerprint(config: ml_collections.ConfigDict) -> Any:
    """What tells the data of a config apart, as JSON has it.

    Raises:
      ValueError: no such task.
    """
    name = config.get("task", "images")
    module = None if ":" in name else _module(name)
    if hasattr(module, "fingerprint"):
        return module.fingerprint(config)
    return json.loads(config.data.to_json())


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"experiments.tasks.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"config.task must be a file of experiments/tasks or PACKAGE.MODULE:FUNCTION; got "
            f"{name!r} ({error})."
        ) from error

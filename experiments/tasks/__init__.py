"""Tasks: one file per kind of data, each with ``task(config) -> ttt_jax.task.Task``.

``config.task`` names the file (``images`` where it is left out) or a function of a user's own as
``package.module:name``.
"""

import importlib

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
    try:
        module = importlib.import_module(f"experiments.tasks.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"config.task must be a file of experiments/tasks or PACKAGE.MODULE:FUNCTION; got "
            f"{name!r} ({error})."
        ) from error
    return module.task(config)

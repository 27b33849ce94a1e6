"""Config files: the flags that name one, and what is wrong with one."""

import itertools
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments import launch

DEFAULT_CONFIG = pathlib.Path(__file__).parent / "configs" / "digits.py"


def define_flags() -> tuple[Any, Any]:
    """Defines ``--config`` and ``--workdir``; returns their holders."""
    config = define_config(str(DEFAULT_CONFIG))
    workdir = flags.DEFINE_string("workdir", None, "Folder for everything the run writes.")
    flags.mark_flag_as_required("workdir")
    return config, workdir


def define_config(default: str | None) -> Any:
    """Defines ``--config``, whose keys ``--config.KEY=VALUE`` overrides; returns its holder."""
    _check_files(sys.argv)
    try:
        return config_flags.DEFINE_config_file(
            "config", default, "Config file; override with --config.KEY=VALUE."
        )
    except launch.OVERRIDE_ERRORS as error:
        launch.refuse(error)


def config_file(name: str | os.PathLike[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a config file defines, and the arguments of its ``get_config``.

    Args:
      name: ``PATH`` or ``PATH:ARGUMENT``.

    Raises:
      UserError: no such file, one that fails, or one without ``get_config``.
    """
    path, *arguments = str(name).split(":", 1)
    if not pathlib.Path(path).is_file():
        raise launch.UserError(f"there is no file {path}; --config names a config file.")
    try:
        namespace = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        if os.environ.get("TTT_JAX_TRACEBACK"):
            raise
        said = f"--config={path} fails: {type(error).__name__}: {error}."
        raise launch.UserError(said) from error
    if not callable(namespace.get("get_config")):
        raise launch.UserError(f"--config={path} has no function get_config(); add it.")
    return namespace, tuple(arguments)


def config_from(name: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """The ``get_config()`` of a config file, ``PATH`` or ``PATH:ARGUMENT``.

    Raises:
      UserError: there is none, or it fails or gives something else.
    """
    namespace, arguments = config_file(name)
    try:
        config = namespace["get_config"](*arguments)
    except Exception as error:
        if os.environ.get("TTT_JAX_TRACEBACK"):
            raise
        raise launch.UserError(
            f"get_config() of --config={name} fails: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise launch.UserError(
            f"get_config() of --config={name} must return a ConfigDict; got {config!r}. End it "
            "with return config."
        )
    return config


def configs_named(argv: Sequence[str]) -> list[str]:
    """The config files that a command line names."""
    given = (re.fullmatch(r"--?config=(.*)", argument) for argument in argv)
    names = [match[1] for match in given if match]
    return names + [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]


def _check_files(argv: Sequence[str]) -> None:
    """Says what is wrong with a config file, where ml_collections has other words."""
    for name in configs_named(argv):
        try:
            config_from(name)
        except launch.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

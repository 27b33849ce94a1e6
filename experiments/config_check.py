"""Holds a config against the table of its keys, as a whole, before anything is read or written."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from experiments import launch, settings, tasks
from experiments.config_keys import ABSENT, ARGUMENTS, COMMON, METHOD, MODEL, NEEDED, Key, Rule
from ttt_jax import methods

# What the task alone reads, and one of a user's own need not.
_FREE = ("model.name", "train.batch_size")
_SECTIONS = ("data", "model", "train", "adapt")


class ConfigError(launch.UserError, ValueError):
    """A config that cannot be run."""


def check(config: ml_collections.ConfigDict, *, adapts: bool = True) -> None:
    """Refuses a config that cannot be run, before anything is read, trained or written.

    Every key, of sections and of methods, must be known, and every value of its type and range.
    A task of a user's own says its keys as ``KEYS`` of its module; without that, what it reads
    itself is not checked.

    Args:
      config: see ``experiments/configs``.
      adapts: whether its methods are run, so that it must have some.

    Raises:
      ConfigError: naming the key, its rule, the value, and the nearest key where it is unknown.
    """
    try:
        _check(config, adapts)
    except ValueError as error:
        # Of a model, a method or a task.
        raise ConfigError(f"{error}") from error


def _check(config: ml_collections.ConfigDict, adapts: bool) -> None:
    _require_sections(config, _SECTIONS + ("methods",) * adapts)
    _values({"task": COMMON["task"]}, config)
    own = tasks.keys(config)
    keys = {**COMMON, **(own or {})}
    if own is not None:
        sections = {name.partition(".")[0] for name in keys if "." in name}
        _require_sections(config, sorted(sections))
        _known(config, keys)
    else:
        keys = {name: key for name, key in keys.items() if name not in _FREE}
    if ":" in str(config.model.get("name", "")):
        # Options of a model of a user's own are what its class says.
        keys = {name: key for name, key in keys.items() if name not in MODEL}
    _present(keys, config)
    _values(keys, config)
    _methods(config)
    tasks.check_config(config)


def check_domains(config: ml_collections.ConfigDict, domains: Sequence[str]) -> None:
    """Refuses streams that a config does not have, where its task can say them without its data.

    Raises:
      UserError: naming the first, or text in the place of a list.
    """
    if isinstance(domains, str):
        raise launch.UserError(
            f"domains must be a list of names; got the text {domains!r}. Write "
            f"domains=({domains!r},)."
        )
    known = tasks.stream_names(config)
    if known is not None and domains:
        launch.chosen("domain", domains, sorted(known))


def _require_sections(config: ml_collections.ConfigDict, names: Iterable[str]) -> None:
    for name in names:
        if name not in config:
            near = launch.nearest(name, config)
            raise ConfigError(
                f"the config has no section {name!r}{near}{'' if near else '.'} Add it, as "
                "experiments/configs/digits.py has it."
            )
        if not isinstance(config[name], ml_collections.ConfigDict):
            raise ConfigError(
                f"config.{name} must be a section of keys; got {config[name]!r}. Write "
                f"config.{name} = ml_collections.ConfigDict({{...}})."
            )


def _known(config: ml_collections.ConfigDict, keys: Mapping[str, Key]) -> None:
    """Of the sections: a key of the model is its module's."""
    options = tasks.model_options(config)
    known = [name for name in keys if options is None or not name.startswith("model.")]
    known += ["model.name", *(f"model.{name}" for name in options or ())]
    tops = {name.partition(".")[0] for name in known} | {"methods"}
    for top in config:
        if top not in tops:
            raise _unknown(top, tops)
    for name in launch.flat(config):
        section = name.partition(".")[0]
        # A key that is itself a section, such as data.periods, is one.
        within = any(name.startswith(f"{key}.") for key in known)
        if section == "methods" or name in known or within:
            continue
        if section == "model" and options == tasks.ANY_OPTION:
            continue
        raise _unknown(name, known)


def _unknown(name: str, known: Iterable[str]) -> ConfigError:
    near = launch.nearest(name, known)
    section = f"{name.partition('.')[0]}." if "." in name else ""
    there = ", ".join(sorted(key for key in known if key.startswith(section)))
    return ConfigError(f"unknown key {name!r} in the config{near or f'; there are {there}.'}")


def _found(config: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or part not in config:
            return ABSENT
        config = config[part]
    return config


def _present(keys: Mapping[str, Key], config: ml_collections.ConfigDict) -> None:
    for name, key in keys.items():
        if _found(config, name) is not ABSENT:
            continue
        if key.default is NEEDED:
            raise ConfigError(f"the config lacks {name}, {key.meaning}; it must {key.rule.says}.")
        if key.needed_with:
            other, value = key.needed_with
            held = _found(config, other)
            if (keys[other].default if held is ABSENT else held) == value:
                raise ConfigError(
                    f"the config lacks {name}, {key.meaning}, which {other}={value!r} needs; it "
                    f"must {key.rule.says}."
                )


def _values(keys: Mapping[str, Key], config: ml_collections.ConfigDict) -> None:
    for name, key in keys.items():
        value = _found(config, name)
        if value is not ABSENT:
            _hold(f"config.{name}" if "." not in name else name, key.rule, value, key.meaning)


def _hold(name: str, rule: Rule, value: Any, meaning: str = "") -> None:
    if not rule.holds(value):
        said = f" Meaning: {meaning}." if meaning else ""
        raise ConfigError(f"{rule.sentence(name, value)}{said}")


def _methods(config: ml_collections.ConfigDict) -> None:
    of_heads = tasks.head_keys(config)
    for label, options in config.get("methods", {}).items():
        where = f"methods.{label}"
        if not isinstance(options, Mapping | ml_collections.ConfigDict):
            raise ConfigError(
                f"{where} must be a mapping of settings, {{}} for none; got {options!r}."
            )
        try:
            name, function = settings.function_of(options, label)
            arguments = inspect.signature(function).parameters
            grid = settings.grid_of(options)
            if of_heads is not None:
                known = {*arguments, *METHOD, *of_heads}
                launch.require_known(name, options, known)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {error}") from error
        rules = {key: entry.rule for key, entry in {**METHOD, **(of_heads or {})}.items()}
        if name in methods.__all__:
            rules |= {key: rule for key, rule in ARGUMENTS.items() if key in arguments}
        for candidate in grid:
            for key in candidate.keys() & rules.keys():
                _hold(f"{where}.{key}", rules[key], candidate[key])

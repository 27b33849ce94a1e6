"""What a sweep runs: its trials, the models they share, and what identifies each.

A trial is one variant of a config, as ``sweep(add)`` of the config file yields it, and makes the
rows of some of its methods and domains. Trials whose training is the same share one model, which is
trained once.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import ml_collections

from experiments import adapt, config_check, config_files, launch, tasks
from experiments.sweeping.unit import Unit

# What a trained model depends on; all else of a config only adapts it.
TRAINING = ("task", "data", "model", "views", "train")
# What makes no row. The values of a config count by themselves.
_NO_RESULTS = ("configs/**/*.py", "report/**/*.py", "prepare/**/*.py")
_ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


NOTHING: Mapping[str, Any] = {}


class Variant(NamedTuple):
    """A config with its overrides applied, and the part of its rows that is made."""

    config: ml_collections.ConfigDict
    part: adapt.Part
    overrides: dict[str, Any]

    @property
    def seed(self) -> int:
        """The one seed of the variant."""
        return self.config.seeds[0]


def variants(path: str, given: Mapping[str, Any] = NOTHING) -> list[Variant]:
    """The variants of a config file, in the order of its ``sweep(add)``.

    ``add(methods=(), domains=(), **overrides)`` adds one; an override is named by its dotted key,
    and replaces a value of the same type. Without ``sweep`` there is one variant per seed.

    Args:
      path: of the file, ``PATH:ARGUMENT`` with an argument of its ``get_config``.
      given: values of ``--config.KEY=VALUE`` by dotted key, for all variants.

    Raises:
      UserError: no such file, no variant, an unknown key, method or domain, a config that cannot
        be run, two variants that are the same, one with several seeds, or a key that both ``given``
        and an override have.
    """
    namespace, _ = config_files.config_file(path)
    found: list[Variant] = []

    def configured() -> ml_collections.ConfigDict:
        config = config_files.config_from(path)
        config.update_from_flattened_dict(given)
        return config

    def add(methods: Sequence[str] = (), domains: Sequence[str] = (), **overrides: Any) -> None:
        config = configured()
        known = launch.flat(config)
        for key in overrides:
            if key not in known:
                near = launch.nearest(key, known)
                raise launch.UserError(f"sweep(add) of {path}: no key {key!r} in the config{near}.")
            if key in given and sweep is not None:
                raise launch.UserError(
                    f"sweep(add) of {path} sets {key} in its trials, and --config.{key} in all of "
                    "them; leave one out."
                )
        if isinstance(methods, str):
            raise launch.UserError(
                f"sweep(add) of {path}: methods must be a list of names; got the text {methods!r}. "
                f"Write methods=({methods!r},)."
            )
        try:
            config.update_from_flattened_dict(overrides)
        except (TypeError, ValueError) as error:
            raise launch.UserError(f"sweep(add) of {path}: {error}") from error
        try:
            config_check.check(config)
            config_check.check_domains(config, domains)
        except launch.UserError as error:
            raise launch.UserError(f"sweep(add) of {path}: {error}") from error
        if methods:
            launch.chosen("method", methods, config.methods)
        if len(config.seeds) != 1:
            raise launch.UserError(
                f"sweep(add) of {path}: a trial has one seed; got seeds={tuple(config.seeds)}. Add "
                "a trial per seed."
            )
        part = adapt.Part(tuple(methods), tuple(domains))
        named = {name: value for name, value in part._asdict().items() if value}
        found.append(Variant(config, part, {**overrides, **named}))

    sweep = namespace.get("sweep")
    if sweep is None:
        for seed in configured().seeds:
            add(seeds=(seed,))
    else:
        sweep(add)
    if not found:
        raise launch.UserError(f"sweep(add) of {path} adds no trial.")
    seen: dict[str, int] = {}
    for index, variant in enumerate(found):
        first = seen.setdefault(digest(variant), index)
        if first != index:
            raise launch.UserError(
                f"sweep(add) of {path}: trials {first} and {index} are the same ({label(variant)})."
            )
    return found


def label(variant: Variant) -> str:
    """The overrides of a variant on one line."""

    def short(value: Any) -> str:
        values = value if isinstance(value, tuple | list) else (value,)
        return ",".join(map(str, values))

    return " ".join(f"{key}={short(value)}" for key, value in variant.overrides.items())


@functools.cache
def code_version() -> str:
    """A digest of what makes results: source files (configs count by their values), libraries."""
    programs = _ROOT / "experiments"
    others = {file for pattern in _NO_RESULTS for file in programs.glob(pattern)}
    files = {*(_ROOT / "ttt_jax").rglob("*.py"), *programs.rglob("*.py")} - others
    crc = hashlib.sha256()
    for file in sorted(files):
        crc.update(f"{file.relative_to(_ROOT)}\0".encode())
        crc.update(file.read_bytes())
    for package in ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "pillow"):
        crc.update(f"{package} {metadata.version(package)}\0".encode())
    return crc.hexdigest()[:12]


def digest(variant: Variant) -> str:
    """A digest of a variant's whole configuration, its part and the code."""
    return _hash(json.loads(variant.config.to_json()), variant.part, code_version())


def pack_key(variant: Variant) -> str:
    """Equal for variants that one process may run in turn, sharing data and compiled programs.

    They differ in the settings of their methods, in seed and in part alone.
    """
    return _sections(variant.config, [*{*variant.config} - {"seeds", "methods"}])


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def data_version(config: ml_collections.ConfigDict) -> str:
    """A digest of the data of a config, as its task tells them apart."""
    return _hash(tasks.fingerprint(config))


def _sections(config: ml_collections.ConfigDict, names: Sequence[str]) -> str:
    values = json.loads(config.to_json())
    return _hash({name: values[name] for name in names if name in values})


def units(found: Sequence[Variant]) -> list[Unit]:
    """The models and trials of some variants, every model before the trials that need it."""
    versions: dict[str, str] = {}
    models: dict[str, Unit] = {}
    trials = []
    for variant in found:
        config, own = variant.config, digest(variant)
        sets = _sections(config, ("task", "data"))
        if sets not in versions:
            versions[sets] = data_version(config)
        training = _sections(config, TRAINING)
        model = _hash(training, variant.seed, versions[sets], code_version())
        if model not in models:
            models[model] = Unit("model", model, own, None, f"model, seed {variant.seed}")
        trial = _hash(own, versions[sets])
        trials.append(Unit("trial", trial, own, model, label(variant), pack_key(variant)))
    return [*models.values(), *trials]

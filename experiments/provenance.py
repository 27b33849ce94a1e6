"""Where numbers come from, and which configuration a work folder belongs to."""

import datetime
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import ml_collections

from experiments import launch
from experiments.config_keys import DEFAULTS

CHUNK_SIZES = "chunk_sizes"
# Of the processes that a program starts: the command that a person typed.
COMMAND = "TTT_JAX_COMMAND"
ORIGIN = ("command", "device", "device_count", "versions", "commit", "started")


def version(package: str) -> str | None:
    """Of an installed package, None for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command() -> str:
    """The command that a person typed, so that it can be repeated; paths are as from here."""
    names = pathlib.Path(sys.argv[0]).with_suffix("").parts
    tops = [at for at, name in enumerate(names[:-1]) if name in ("benchmarks", "experiments")]
    module = ".".join(names[tops[-1] :] if tops else ("experiments", names[-1]))
    arguments = [argument.replace(f"{pathlib.Path.cwd()}/", "") for argument in sys.argv[1:]]
    typed = f"python -m {module.removesuffix('.__main__')} {shlex.join(arguments)}".rstrip()
    return os.environ.get(COMMAND, typed)


def _commit() -> str | None:
    root = pathlib.Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return None
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")
    except OSError:
        return None


def of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Command, device, versions, commit and configuration of this run."""
    import jax  # what only starts programs needs none

    packages = ("ttt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "command": command(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "versions": {"python": sys.version.split()[0], **{p: version(p) for p in packages}},
        "commit": _commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": json.loads(config.to_json()),
    }


def origin(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record of :func:`of` says where it comes from: all but the configuration."""
    return {name: record[name] for name in ORIGIN if name in record}


Difference = tuple[str, Any, Any]
"""``(name, stored value, present value)``."""


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """In what two records differ; a name that one of them lacks has None there."""
    names = dict.fromkeys((*now, *was))
    return [(n, was.get(n), now.get(n)) for n in names if was.get(n) != now.get(n)]


def require_same(
    differing: Sequence[Difference], path: pathlib.Path, mend: str = "remove the file"
) -> None:
    """Refuses to go on with what was made otherwise.

    Args:
      differing: what differs.
      path: the file or folder that was made otherwise.
      mend: what helps beside another work folder.

    Raises:
      launch.UserError: naming each difference, its stored and its present value.
    """
    if differing:
        changed = "; ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in differing)
        raise launch.UserError(
            f"{path} was made otherwise: {changed}. Use another --workdir, or {mend}."
        )


# What a folder holds once a configuration has made something of it, and what is measured beside.
_MADE = ("results*.jsonl", "selection.json", "checkpoints/*", "training/*/*")
_MEASURED = (*_MADE, "diagnostics*.jsonl", "feature_shift.jsonl")


def claim(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    data: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Writes ``run.json``, or refuses a folder whose results were made with another config or data.

    The file is of the program that began the rows, or of the last one while there are none. Its
    ``runs`` are the origins of all that claimed the folder, in order, without those that differ
    from the one before in their time alone. ``data`` are fingerprints by name, which a name that
    both have must keep. ``more`` is written too, and need not stay the same.

    Raises:
      launch.UserError: naming each differing key, its stored and its present value.
    """
    path = folder / "run.json"
    record = of(config) | more
    found = dict(data or {})
    latest = origin(record) | more
    old = _run(path)
    begun = [origin(old) | {k: old[k] for k in more if k in old}] if old else []
    runs = list(old.get("runs", begun))
    if "config" in old and any(any(folder.glob(pattern)) for pattern in _MADE):
        configs = (ml_collections.ConfigDict(held["config"]) for held in (old, record))
        before, after = (DEFAULTS | launch.flat(config) for config in configs)
        before["seeds"] = after["seeds"]  # which may grow
        require_same(differences(before, after), folder, "the old values")
        if CHUNK_SIZES in old:
            record[CHUNK_SIZES] = old[CHUNK_SIZES]
    found = _kept(folder, old, found)
    if any(folder.glob("results*.jsonl")):
        record = (old if "config" in old else record | old) | {"config": record["config"]}
    if not runs or _without_time(runs[-1]) != _without_time(latest):
        runs.append(latest)
    launch.write_json(path, record | ({"data": found} if found else {}) | {"runs": runs})


def note_data(
    folder: pathlib.Path, config: ml_collections.ConfigDict, splits: Mapping[str, str]
) -> None:
    """Adds to ``run.json`` what a program measures beside the rows, or refuses replaced data.

    Such a program claims no folder: another configuration may go on there. So a split is noted by
    its set and its name, and as ``data.ROLE`` too where that is the split of the folder's rows.

    Args:
      folder: the work folder.
      config: of the measurement.
      splits: fingerprints by role.

    Raises:
      launch.UserError: naming the split, its stored and its present fingerprint.
    """
    path = folder / "run.json"
    values = DEFAULTS | launch.flat(config)
    with launch.locked(folder, ".lock.run", wait=True):
        old = _run(path)
        before = DEFAULTS | launch.flat(ml_collections.ConfigDict(old.get("config", {})))
        found = {}
        for role, fingerprint in splits.items():
            names = ("data.name", f"data.{role}", *["data.imbalance"] * (role == "train"))
            if all(before.get(name) == values[name] for name in names):
                found[f"data.{role}"] = fingerprint
            found[", ".join(str(values[name]) for name in names)] = fingerprint
        data = _kept(folder, old, found)
        launch.write_json(path, {"runs": []} | old | {"data": data})


def _run(path: pathlib.Path) -> dict[str, Any]:
    """What ``run.json`` holds, ``{}`` where there is none.

    Raises:
      launch.UserError: it is damaged.
    """
    if not path.exists():
        return {}
    try:
        old: dict[str, Any] = json.loads(path.read_text())
        parts = [dict(old.get("data", {})), dict(old.get("config", {})), list(old.get("runs", []))]
        if not any(parts):
            raise ValueError("it has no config, data or runs")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise launch.UserError(
            f"{path} is damaged ({error}). Use another --workdir, or remove the file if its "
            "rows are of this config."
        ) from error
    return old


def _kept(folder: pathlib.Path, old: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprints to keep: those that there are and the new ones, once anything was made."""
    if not any(any(folder.glob(pattern)) for pattern in _MEASURED):
        return dict(found)
    noted = old.get("data", {})
    differing = {}
    for name in sorted(noted.keys() & found.keys()):
        was, now = noted[name], found[name]
        # One split may stand there under two names.
        if was != now:
            differing.setdefault(
                (str(was), str(now)), (f"the images or labels of {name}", was, now)
            )
    require_same([*differing.values()], folder, "the old data")
    return {**noted, **found}


def _without_time(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "started"}


class ChunkSizes(dict[str, dict[int, float]]):
    """Seconds per instance by instances in flight, fastest first, of the methods of a work folder.

    They stand in ``run.json`` from the moment that they are known, before the first row that is
    made with them, and the first process that writes those of a method decides for all.
    """

    def __init__(self, folder: pathlib.Path):
        super().__init__()
        self._folder = folder

    def __contains__(self, name: object) -> bool:
        if not super().__contains__(name):
            self.update(self._read())
        return super().__contains__(name)

    def setdefault(self, name: str, seconds: Any = None) -> dict[int, float]:
        """Writes what the file lacks; returns what it holds."""
        with launch.locked(self._folder, ".lock.run", wait=True):
            self.update({name: seconds} | self._read())
            path = self._folder / "run.json"
            launch.write_json(path, json.loads(path.read_text()) | {CHUNK_SIZES: dict(self)})
        return self[name]

    def _read(self) -> dict[str, dict[int, float]]:
        noted = json.loads((self._folder / "run.json").read_text()).get(CHUNK_SIZES, {})
        return {name: {int(size): s for size, s in each.items()} for name, each in noted.items()}

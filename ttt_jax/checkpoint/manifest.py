"""The manifest ``ttt_jax.json``: what a checkpoint holds, and the check of every file in it."""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import re
import zlib
from collections.abc import Collection, Mapping
from typing import Any

from ttt_jax._version import __version__
from ttt_jax.checkpoint import trees
from ttt_jax.checkpoint.errors import CheckpointError
from ttt_jax.checkpoint.leaves import Leaf

NAME = "ttt_jax.json"
FORMAT = "ttt_jax checkpoint 1"
# The crc32 covers every byte after this fixed head, spaces and line ends included.
_HEAD = '{{"crc32": "{:08x}",\n'
_HEAD_PATTERN = re.compile(rb'\{"crc32": "([0-9a-f]{8})",\n')
_CHUNK = 1 << 22
# What helps where a file is damaged.
MEND = "Put back a copy of the checkpoint, or remove it and make it again."


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of one manifest.

    Attributes:
      leaves: the record of every leaf by path.
      folders: the folder of every leaf that has bytes, relative to the checkpoint.
      tree: the containers, as :func:`trees.skeleton` gives them.
      files: (bytes, crc32) of every file but the manifest, by relative path.
      metadata: the caller's own.
      versions: package versions at the time of saving.
    """

    leaves: dict[str, Leaf]
    folders: dict[str, str]
    tree: Any
    files: dict[str, tuple[int, str]]
    metadata: dict[str, Any]
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Returns the versions of the packages that shape a checkpoint, where installed."""
    found = {"ttt_jax": __version__}
    for package in ("jax", "flax", "numpy", "orbax-checkpoint"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def jsonable(value: Any, key: str) -> Any:
    """Returns a copy of a metadata value as JSON gives it back (tuples become lists).

    Raises:
      CheckpointError: naming the key of a value, or of a dict key, that JSON cannot hold.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if math.isfinite(value):
            return value
        raise CheckpointError(f"metadata {key!r} is {value}, which JSON cannot hold. Use None.")
    if type(value) in (list, tuple):
        return [jsonable(item, f"{key}/{i}") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if type(name) is not str:
                raise CheckpointError(
                    f"metadata {key!r} has the key {name!r} of type {type(name).__name__}. "
                    "Keys of metadata are strings."
                )
        return {n: jsonable(item, f"{key}/{n}" if key else n) for n, item in value.items()}
    fix = (
        "Use .tolist()"
        if hasattr(value, "tolist")
        else "Convert it to dicts, lists, numbers and strings"
    )
    raise CheckpointError(
        f"metadata {key!r} is a {type(value).__name__}, which JSON cannot hold. {fix}."
    )


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the caller's metadata as JSON holds it; raises naming the key that it cannot."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise CheckpointError(f"metadata is a {type(metadata).__name__}. Give a dict or None.")
    return jsonable(metadata or {}, "")


def file_crc32(path: pathlib.Path) -> str:
    """Returns the crc32 of a file's bytes as eight hex digits."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def list_files(root: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Returns (bytes, crc32) of every file below a folder, by relative path."""
    found = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): (p.stat().st_size, file_crc32(p)) for p in found}


def write(root: pathlib.Path, manifest: Manifest) -> None:
    """Writes the manifest, the last file of a checkpoint, and forces it to disk."""
    body = {
        "format": FORMAT,
        "metadata": manifest.metadata,
        "versions": manifest.versions,
        "leaves": {
            path: {**leaf._asdict(), "folder": manifest.folders.get(path)}
            for path, leaf in manifest.leaves.items()
        },
        "tree": manifest.tree,
        "files": manifest.files,
    }
    rest = json.dumps(body, indent=1, allow_nan=False)[1:].lstrip("\n").encode()
    with (root / NAME).open("wb") as file:
        file.write(_HEAD.format(zlib.crc32(rest)).encode() + rest)
        file.flush()
        os.fsync(file.fileno())


def read(root: pathlib.Path) -> Manifest:
    """Reads and checks the manifest; every failure names its file."""
    path = root / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{root} has no {NAME}: an unfinished save, or not a checkpoint of ttt_jax. {MEND}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    head = _HEAD_PATTERN.match(data)
    if head is None or int(head[1], 16) != zlib.crc32(data[head.end() :]):
        raise CheckpointError(f"{path} is damaged or truncated: its crc32 does not match. {MEND}")
    body = json.loads(data)
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has the format {body['format']!r}; this version of ttt_jax reads {FORMAT!r}."
        )
    rows = {path: dict(row) for path, row in body["leaves"].items()}
    folders = {path: row.pop("folder") for path, row in rows.items()}
    return Manifest(
        leaves={p: Leaf(**{**row, "shape": tuple(row["shape"])}) for p, row in rows.items()},
        folders={p: folder for p, folder in folders.items() if folder is not None},
        tree=body["tree"],
        files={name: (size, crc) for name, (size, crc) in body["files"].items()},
        metadata=body["metadata"],
        versions=body["versions"],
    )


def verify(root: pathlib.Path, manifest: Manifest, wanted: Collection[str]) -> None:
    """Checks the files of a checkpoint before anything is read from them.

    Every file must be there with its size, and nothing else may be; the bytes are checked for
    the wanted leaves and for all files that belong to no leaf.

    Raises:
      CheckpointError: naming the leaf whose file is damaged, or the file that serves them all.
    """
    owners = {folder: path for path, folder in manifest.folders.items()}

    def owner(name: str) -> str | None:
        return owners.get("/".join(name.split("/")[:2]))

    for name, (size, crc) in manifest.files.items():
        leaf = owner(name)
        problem = _problem(root / name, size, crc if leaf is None or leaf in wanted else None)
        if problem:
            subject = f"file {name}" if leaf is None else f"{trees.leaf_name(leaf)}: file {name}"
            raise CheckpointError(f"{subject} of the checkpoint {root} {problem}. {MEND}")
    known = {NAME, *manifest.files}
    known.update(parent.as_posix() for n in manifest.files for parent in pathlib.Path(n).parents)
    for found in sorted(root.rglob("*")):
        name = found.relative_to(root).as_posix()
        if name not in known:
            raise CheckpointError(
                f"file {name} does not belong to the checkpoint {root}. "
                "Move it away: a checkpoint is never changed after it was saved."
            )


def _problem(path: pathlib.Path, size: int, crc: str | None) -> str | None:
    """Returns what is wrong with one file, or None."""
    try:
        if path.is_dir():
            return "is a folder"
        found = path.stat().st_size
        if found != size:
            return f"is {'truncated' if found < size else 'too long'}: {found} of {size} bytes"
        if crc is not None and file_crc32(path) != crc:
            return "is damaged: its crc32 does not match"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None

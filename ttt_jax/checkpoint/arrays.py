"""Orbax: the only code that writes and reads the arrays of a checkpoint."""

import contextlib
import errno
import gc
import logging
import os
import pathlib
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from ttt_jax.checkpoint.errors import CheckpointError

FOLDER = "params"
# Names that orbax itself puts beside the leaves' folders (besides those that begin with "_").
_TAKEN = "array_metadatas"

_ORBAX_DIR = os.path.dirname(ocp.__file__)
# Of a disk; libraries give the system's words among many of their own.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_POLL_S, _STILL_POLLS, _MOST_POLLS = 0.05, 5, 200


def keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the dict keys under which orbax stores a leaf.

    Usual names are kept, so other orbax programs see the tree as it is. What would make two
    leaves share a folder, or a folder share the name of an orbax file, is percent-encoded.
    """
    parts = [jax.tree_util.keystr((entry,), simple=True) for entry in path] or [""]
    quoted = [urllib.parse.quote(part, safe="").replace(".", "%2E") or "%" for part in parts]
    if quoted[0].startswith("_") or quoted[0] == _TAKEN:
        quoted[0] = f"%{ord(quoted[0][0]):02X}{quoted[0][1:]}"
    return tuple(quoted)


def folder(names: tuple[str, ...]) -> str:
    """Returns a leaf's folder, relative to the checkpoint."""
    return f"{FOLDER}/{'.'.join(names)}"


def write(root: pathlib.Path, arrays: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Writes host arrays, given by their orbax keys, below ``root/params``."""
    if not arrays:
        return
    args = ocp.args.PyTreeSave(_nest(arrays))
    _orbax("write", root, lambda checkpointer: checkpointer.save(root / FOLDER, args=args))


def read(
    root: pathlib.Path,
    wanted: Mapping[tuple[str, ...], tuple[jax.ShapeDtypeStruct, Sharding | None]],
) -> dict[tuple[str, ...], Any]:
    """Reads the wanted arrays: JAX arrays on their sharding, NumPy arrays where it is None."""
    if not wanted:
        return {}
    # Without restore arguments orbax takes the sharding of the saving machine from a file.
    how = {
        names: ocp.RestoreArgs(restore_type=np.ndarray)
        if sharding is None
        else ocp.ArrayRestoreArgs(sharding=sharding, global_shape=struct.shape, strict=True)
        for names, (struct, sharding) in wanted.items()
    }
    structs = {names: struct for names, (struct, _) in wanted.items()}
    args = ocp.args.PyTreeRestore(_nest(structs), restore_args=_nest(how), partial_restore=True)
    tree = _orbax("read", root, lambda checkpointer: checkpointer.restore(root / FOLDER, args=args))
    found = {}
    for names in wanted:
        node = tree
        for name in names:
            node = node[name]
        found[names] = node
    return found


def _nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for names, value in flat.items():
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = value
    return tree


def _orbax(action: str, root: pathlib.Path, call: Callable[[ocp.Checkpointer], Any]) -> Any:
    """Calls with a checkpointer for this process alone; its failures become CheckpointErrors."""
    # Each process saves and loads by itself: a barrier would wait for processes that do not.
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"ttt_jax_{index}"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=False, multiprocessing_options=options
    )
    with _quiet():
        try:
            with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
                return call(checkpointer)
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = _reason(error)
        # With the error its tasks are gone, but for what they had begun.
        _settle(root)
        gc.collect()
    raise CheckpointError(f"Orbax could not {action} {root / FOLDER}: {reason}")


def _reason(error: Exception) -> str:
    """What is behind an error, on one line."""
    text = str(error).strip() or type(error).__name__
    words = (os.strerror(number) for number in _DISK_ERRORS)
    return next((said for said in words if said in text), text.splitlines()[0][:400])


def _settle(root: pathlib.Path) -> None:
    """Waits until nothing below a folder changes: after an error, orbax's threads write on."""
    before, still = None, 0
    for _ in range(_MOST_POLLS):
        time.sleep(_POLL_S)
        now = [(place, *names, *files) for place, names, files in os.walk(root)]
        still = still + 1 if now == before else 0
        if still == _STILL_POLLS:
            return
        before = now


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what orbax and its threads log and print: what matters comes back as an exception."""

    def keep(entry: logging.LogRecord) -> bool:
        return not entry.pathname.startswith(_ORBAX_DIR)

    def unraisable(told: Any) -> None:
        if "Event loop is closed" not in str(told.exc_value):
            before(told)

    before = sys.unraisablehook
    filters = {"absl": keep, "asyncio": lambda entry: False}
    for name, drop in filters.items():
        logging.getLogger(name).addFilter(drop)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = before
        for name, drop in filters.items():
            logging.getLogger(name).removeFilter(drop)

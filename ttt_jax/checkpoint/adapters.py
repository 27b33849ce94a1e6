"""Adapters on disk: the leaves that one task has of its own, and the base they belong to."""

import os
import re
from collections.abc import Mapping
from typing import Any

from ttt_jax import _arguments
from ttt_jax.base import AdapterState, PyTree
from ttt_jax.checkpoint import leaves, manifest, store
from ttt_jax.checkpoint.errors import CheckpointError
from ttt_jax.checkpoint.held import Pristine

_BASE = "base"


def _state_or_tree(place: str, name: str, value: Any) -> Any:
    return value if isinstance(value, AdapterState) else _arguments.tree(place, name, value)


def _tree_or_text(place: str, name: str, value: Any) -> Any:
    return value if isinstance(value, str) else _arguments.tree(place, name, value)


@_arguments.checked(path=_arguments.path, adapter=_state_or_tree, base=_tree_or_text, metadata=None)
def save_adapter(
    path: str | os.PathLike[str],
    adapter: PyTree,
    *,
    base: PyTree,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter to a new folder, with the fingerprint of the base it was made on.

    Args:
      path: the folder to make.
      adapter: a whole :class:`~ttt_jax.AdapterState`, which goes on as if it had never been away,
        or its ``fast`` alone.
      base: the parameters without the adapter's leaves, ``select.split(params)[1]``, or their
        :func:`fingerprint`, which need not be taken again for every adapter.
      metadata: as for :func:`save`. The factor ``alpha / rank`` of low-rank leaves is no parameter:
        put it here, and ask for it with ``require``.

    Raises:
      CheckpointError: what :func:`save` refuses, or metadata with the name ``"base"``.
    """
    metadata = manifest.check_metadata(metadata)
    if _BASE in metadata:
        raise CheckpointError(
            f"metadata {_BASE!r} is the base's fingerprint; got {metadata[_BASE]!r}: choose "
            "another name."
        )
    tree = adapter._asdict() if isinstance(adapter, AdapterState) else adapter
    store.save(path, tree, metadata={**metadata, _BASE: _fingerprint(base)})


@_arguments.checked(path=_arguments.path, base=_tree_or_text, like=None)
def load_adapter(path: str | os.PathLike[str], *, base: PyTree, like: PyTree = None) -> Pristine:
    """Reads an adapter, and refuses one that was made on another base.

    Args:
      path: a folder that :func:`save_adapter` made.
      base: as for :func:`save_adapter`.
      like: an adapter of the same layout, such as ``adapter.init(params)``: the result then has
        its containers (an ``AdapterState`` with its optimizer's), and its shapes are checked.

    Returns:
      The :class:`Pristine` adapter; ``.params`` is the tree that was saved.

    Raises:
      CheckpointError: what :func:`load` refuses, a folder that holds no adapter, or another base.
    """
    held = store.load(path, like=like)
    if _BASE not in held.metadata:
        raise CheckpointError(
            f"{held.path} names no base, so it is no adapter: read it with checkpoint.load."
        )
    there, here = held.metadata[_BASE], _fingerprint(base)
    if there != here:
        raise CheckpointError(
            f"The adapter {held.path} was made on the base with fingerprint {there[:12]}, and this "
            f"one has {here[:12]}: load that base, and pass it without the adapter's leaves "
            "(select.split(params)[1])."
        )
    return held


def _fingerprint(base: PyTree) -> str:
    if not isinstance(base, str):
        return leaves.fingerprint(base)
    if not re.fullmatch("[0-9a-f]{64}", base):
        raise CheckpointError(
            f"base must be parameters or a fingerprint, 64 hex digits; got {base!r}. Take it with "
            "checkpoint.fingerprint."
        )
    return base

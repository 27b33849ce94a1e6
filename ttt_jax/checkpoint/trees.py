"""Paths of a pytree, the containers around them, and how a stored tree meets a wanted one."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Sharding
from jax.tree_util import DictKey, SequenceKey, keystr, tree_flatten_with_path

from ttt_jax.base import PyTree
from ttt_jax.checkpoint.errors import CheckpointError


def leaf_name(path: str) -> str:
    """Returns how messages call a leaf."""
    return f"leaf {path!r}" if path else "the only leaf (the tree is a bare array)"


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a hint with the names nearest to an unknown one, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" Nearest: {', '.join(map(repr, close))}." if close else ""


def join(path: tuple[Any, ...]) -> str:
    """Returns a key path as ``a/b/c``."""
    return keystr(path, simple=True, separator="/")


def flatten_with_path(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """``jax.tree_util.tree_flatten_with_path``; what it refuses is a CheckpointError."""
    try:
        return tree_flatten_with_path(tree, is_leaf=is_leaf)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The tree is not a pytree JAX can flatten: {error}") from error


def flatten(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns (path, leaf) of every leaf; two leaves with one path are refused."""
    pairs = [(join(path), leaf) for path, leaf in flatten_with_path(tree)[0]]
    seen: set[str] = set()
    for path, _ in pairs:
        if path in seen:
            raise CheckpointError(f"Two leaves have the path {path!r}. Rename one of them.")
        seen.add(path)
    return pairs


def skeleton(node: PyTree, path: tuple[Any, ...] = ()) -> Any:
    """Returns the containers of a tree as JSON: what :func:`rebuild` turns back into a tree.

    Dicts (keys: str or int), lists, tuples and ``None`` keep their kind; every other container
    (a NamedTuple, a FrozenDict, a dataclass) becomes a dict of the parts of its paths.
    """
    if node is None:
        return None
    if jax.tree_util.all_leaves([node]):
        return join(path)
    children = flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    parts = [(entry[0], skeleton(child, path + entry)) for entry, child in children]
    if type(node) in (list, tuple):
        return {type(node).__name__: [part for _, part in parts]}
    return {"dict": [[_key(entry, path), part] for entry, part in parts]}


def _key(entry: Any, path: tuple[Any, ...]) -> str | int:
    if isinstance(entry, SequenceKey):
        return entry.idx
    if not isinstance(entry, DictKey):
        return join((entry,))
    if type(entry.key) not in (str, int):
        raise CheckpointError(
            f"The dict at {join(path)!r} has the key {entry.key!r} of type "
            f"{type(entry.key).__name__}. Keys of a checkpoint are str or int."
        )
    return entry.key


def rebuild(bones: Any, leaves: Mapping[str, Any]) -> PyTree:
    """Puts leaves, by path, back into the containers of :func:`skeleton`."""
    if bones is None:
        return None
    if isinstance(bones, str):
        return leaves[bones]
    [(kind, children)] = bones.items()
    if kind == "dict":
        return {key: rebuild(child, leaves) for key, child in children}
    parts = [rebuild(child, leaves) for child in children]
    return tuple(parts) if kind == "tuple" else parts


def _inside(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + "/")


def match(like: PyTree, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Finds which stored leaves a wanted tree asks for.

    Args:
      like: a pytree whose leaves stand for the wanted ones; ``None`` means "do not read this
        leaf, or anything below".
      stored: the stored leaves by path.

    Returns:
      The leaves of ``like`` by path, all of them stored.

    Raises:
      CheckpointError: ``like`` has a leaf that is not stored, or lacks one that is.
    """
    wanted = dict(flatten(like))
    flat = flatten_with_path(like, is_leaf=lambda x: x is None)[0]
    holes = [join(path) for path, leaf in flat if leaf is None]
    for path in wanted:
        if path not in stored:
            raise CheckpointError(
                f"{leaf_name(path)} of `like` is not in the checkpoint.{nearest(path, stored)}"
            )
    for path, leaf in stored.items():
        if path not in wanted and not any(_inside(path, hole) for hole in holes):
            raise CheckpointError(
                f"`like` lacks the stored {leaf_name(path)} ({leaf})."
                f"{nearest(path, [p for p, _ in flatten(like)])} "
                "Add it, or put None in its place to leave it unread."
            )
    if not wanted:
        raise CheckpointError("`like` asks for no leaf: all of it is None. Keep at least one.")
    return wanted


def fill(like: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Returns the containers of ``like`` around the leaves, ``None`` where it has holes."""
    flat, treedef = flatten_with_path(like, is_leaf=lambda x: x is None)
    return treedef.unflatten([leaves.get(join(path)) for path, _ in flat])


def shardings(
    sharding: PyTree, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Sharding | None]:
    """Gives every wanted leaf its sharding.

    Args:
      sharding: one ``jax.sharding.Sharding`` for all, or a pytree of them laid out like the
        parameters or like their upper part; ``None`` leaves the choice to JAX.
      shapes: the shapes of the wanted leaves by path.

    Raises:
      CheckpointError: an entry is no sharding, belongs to no leaf, leaves a leaf without an
        entry, does not divide a leaf's shape, or lies on other processes.
    """
    flat = flatten_with_path(sharding, is_leaf=lambda x: x is None or isinstance(x, Sharding))[0]
    given = {join(path): value for path, value in flat}
    for path, value in given.items():
        if value is not None and not isinstance(value, Sharding):
            raise CheckpointError(
                f"`sharding` at {path!r} is a {type(value).__name__}. "
                "Give a jax.sharding.Sharding, such as NamedSharding(mesh, spec), "
                "a pytree of them, or None."
            )
        if value is not None and not any(_inside(leaf, path) for leaf in shapes):
            raise CheckpointError(
                f"`sharding` at {path!r} belongs to no leaf that is read.{nearest(path, shapes)}"
            )
    found: dict[str, Sharding | None] = {}
    for path, shape in shapes.items():
        roots = [root for root in given if _inside(path, root)]
        if not roots:
            raise CheckpointError(
                f"{leaf_name(path)} has no entry in `sharding`.{nearest(path, given)} "
                "Add a sharding for it, or None."
            )
        found[path] = check_sharding(path, shape, given[max(roots, key=len)])
    return found


def check_sharding(path: str, shape: tuple[int, ...], sharding: Sharding | None) -> Sharding | None:
    """Returns the sharding of one leaf; raises where it cannot hold the leaf."""
    if sharding is None:
        return None
    if not sharding.is_fully_addressable:
        raise CheckpointError(
            f"{leaf_name(path)} is wanted on devices of other processes, where its bytes cannot "
            "be checked. Load on each process, then place it with jax.device_put."
        )
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise CheckpointError(
            f"{leaf_name(path)} of shape {shape} does not fit its sharding: {error}"
        ) from error
    return sharding

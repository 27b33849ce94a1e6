"""Write parameters to a folder, and read them back with every bit checked."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from ttt_jax import _arguments
from ttt_jax.base import PyTree
from ttt_jax.checkpoint import arrays, leaves, manifest, trees
from ttt_jax.checkpoint.errors import CheckpointError
from ttt_jax.checkpoint.held import Pristine, inspect
from ttt_jax.checkpoint.leaves import Leaf


@_arguments.checked(path=_arguments.path, metadata=None)
def save(
    path: str | os.PathLike[str], params: PyTree, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes parameters to a new folder, all or nothing.

    The folder is written under a temporary name beside its own and renamed when complete, so
    a process killed in the middle leaves at most a hidden ``.NAME.*.tmp`` that can be deleted.
    With several processes, one of them saves.

    Args:
      path: the folder to make, on a local or mounted file system; parents are made as needed.
      params: a pytree of JAX or NumPy arrays of any shape and byte-wide dtype, typed PRNG keys
        included; ``None`` holes are kept.
      metadata: anything JSON can hold, by string keys: normalization constants, the model's
        configuration. Package versions are added by themselves.

    Raises:
      CheckpointError: the path exists, cannot be written or has no space left; a leaf is no
        array, not finite, traced, deleted or shares its path; or a metadata value is not JSON.
    """
    target = _absolute(path)
    metadata = manifest.check_metadata(metadata)
    found = inspect(params)
    names = {trees.join(p): arrays.keys(p) for p, _ in trees.flatten_with_path(params)[0]}
    # Orbax refuses arrays without elements; shape and dtype say all there is to them.
    stored = {path: array for path, (_, array) in found.items() if array.size}
    tree = trees.skeleton(params)
    with _all_or_nothing(target) as root:
        arrays.write(root, {names[path]: array for path, array in stored.items()})
        manifest.write(
            root,
            manifest.Manifest(
                leaves={path: leaf for path, (leaf, _) in found.items()},
                folders={path: arrays.folder(names[path]) for path in stored},
                tree=tree,
                files=manifest.list_files(root),
                metadata=metadata,
                versions=manifest.versions(),
            ),
        )


@_arguments.checked(path=_arguments.path, like=None, sharding=None)
def load(path: str | os.PathLike[str], *, like: PyTree = None, sharding: PyTree = None) -> Pristine:
    """Reads a checkpoint and checks every bit of it; no dtype is ever cast.

    Args:
      path: the folder :func:`save` made.
      like: a pytree of arrays or ``jax.ShapeDtypeStruct`` with the expected paths, shapes and
        dtypes, whose containers the result takes. ``None`` in place of a leaf or of a whole
        subtree (as ``Selection.split`` leaves it) means "do not read this", and the result has
        ``None`` there; any other difference raises. Without ``like`` all is read, into dicts,
        lists and tuples (a NamedTuple or other container comes back as a dict).
      sharding: one ``jax.sharding.Sharding`` for all leaves, or a pytree of them laid out like
        the parameters or their upper part. Each leaf is read straight onto it. ``None`` takes
        the sharding of the leaf in ``like`` where that has one (a ``ShapeDtypeStruct`` with a
        sharding, a committed array), otherwise the default device, uncommitted.

    Returns:
      The :class:`Pristine` parameters as JAX arrays.

    Raises:
      CheckpointError: a file is missing, damaged, truncated or foreign; a leaf is damaged, or
        differs from ``like`` in path, shape or dtype; or a sharding does not fit.
    """
    root = _absolute(path)
    _check_folder(root)
    if like is not None:
        like = _abstract(like)
    content = manifest.read(root)
    wanted = content.leaves
    if like is not None:
        asked = trees.match(like, content.leaves)
        wanted = {path: leaf for path, leaf in content.leaves.items() if path in asked}
        _check_like(asked, wanted)
    for leaf_path, leaf in wanted.items():
        leaves.check_width(leaf_path, leaf.dtype)
    shapes = {leaf_path: leaf.shape for leaf_path, leaf in wanted.items()}
    if sharding is None and like is not None:
        targets = {p: trees.check_sharding(p, shapes[p], asked[p].sharding) for p in wanted}
    else:
        targets = trees.shardings(sharding, shapes)
    manifest.verify(root, content, wanted)
    held = _read(root, content, wanted, targets)
    return Pristine(
        params=trees.rebuild(content.tree, held) if like is None else trees.fill(like, held),
        metadata=content.metadata,
        fingerprint=leaves.summarize(wanted),
        leaves=wanted,
        versions=content.versions,
        path=root,
        reload=lambda: load(root, like=like, sharding=sharding),
    )


def _absolute(path: str | os.PathLike[str]) -> pathlib.Path:
    text = os.fspath(path)
    if "://" in text:
        raise CheckpointError(f"{text} is not a local path. Copy it, or mount it, and use that.")
    return pathlib.Path(os.path.abspath(os.path.expanduser(text)))


@contextlib.contextmanager
def _all_or_nothing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that becomes ``target``, or vanishes with all it made."""
    if os.path.lexists(target):
        raise CheckpointError(
            f"{target} exists and a checkpoint is never overwritten. "
            "Choose another path, or remove it first."
        )
    parents = [p for p in [target.parent, *target.parent.parents] if not p.exists()]
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    done = False
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, target)
        done = True
    except (OSError, CheckpointError) as error:
        reason = str(error).replace(str(temporary), str(target)).rstrip(".")
        raise CheckpointError(
            f"Cannot save {target}, and nothing of it was kept: {reason}. "
            "Choose a folder that can be written and has room."
        ) from error
    finally:
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _check_folder(root: pathlib.Path) -> None:
    try:
        if root.is_dir():
            return
        if root.exists():
            raise CheckpointError(f"{root} is a file; a checkpoint is a folder.")
        near = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"Cannot read {root}: {error.strerror}.") from error
    raise CheckpointError(f"There is no checkpoint at {root}.{trees.nearest(root.name, near)}")


def _abstract(like: PyTree) -> PyTree:
    """Replaces the leaves of ``like`` by their shape, dtype and sharding, to hold no arrays."""

    def one(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise CheckpointError(
                f"{trees.leaf_name(trees.join(path))} of `like` is a {type(leaf).__name__}. "
                "Give arrays, jax.ShapeDtypeStruct, or None for what is not to be read."
            )
        # An uncommitted array only happens to be where it is.
        free = isinstance(leaf, jax.Array) and not leaf.committed
        place = None if free else getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(one, like)


def _check_like(asked: Mapping[str, Any], stored: Mapping[str, Leaf]) -> None:
    for path, leaf in stored.items():
        struct = asked[path]
        if (tuple(struct.shape), leaves.dtype_name(struct.dtype)) != (leaf.shape, leaf.dtype):
            wanted = leaves.describe(tuple(struct.shape), leaves.dtype_name(struct.dtype))
            raise CheckpointError(
                f"{trees.leaf_name(path)} is stored as {leaf}, `like` expects {wanted}. "
                "Build the model as it was saved; a cast or reshape is yours to make after it."
            )


def _read(
    root: pathlib.Path,
    content: manifest.Manifest,
    wanted: Mapping[str, Leaf],
    targets: Mapping[str, Sharding | None],
) -> dict[str, jax.Array]:
    """Reads the wanted leaves, checks each against its record, and places it."""
    names = {
        path: tuple(content.folders[path].removeprefix(f"{arrays.FOLDER}/").split("."))
        for path in wanted
        if path in content.folders
    }
    asked = {}
    for path in names:
        leaf = wanted[path]
        if leaf.impl is None:
            struct = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
            asked[names[path]] = (struct, targets[path])
        else:  # a key lies on disk as its words; it is placed once it is a key again
            words = jax.random.key_data(jax.random.key(0, impl=leaf.impl)).shape
            asked[names[path]] = (jax.ShapeDtypeStruct(leaf.shape + words, jnp.uint32), None)
    found = arrays.read(root, asked)
    held = {}
    for path, leaf in wanted.items():
        value = found[names[path]] if path in names else np.zeros(leaf.shape, leaf.dtype)
        held[path] = _place(path, leaf, value, targets[path])
    return held


def _place(path: str, leaf: Leaf, value: Any, sharding: Sharding | None) -> jax.Array:
    """Checks one leaf as orbax gave it and returns it as a JAX array on its sharding."""
    host = np.asarray(value)
    if leaf.impl is None:
        read = Leaf(host.shape, leaves.dtype_name(host.dtype), leaves.crc32(host))
    else:
        read = leaf._replace(shape=host.shape[:-1], crc32=leaves.crc32(host))
    leaves.check_same(path, read, leaf, where="came back wrong from orbax")
    if isinstance(value, jax.Array):
        return value
    if leaf.impl is None:
        return jax.device_put(host, sharding)
    key = jax.random.wrap_key_data(jnp.asarray(host), impl=leaf.impl)
    return key if sharding is None else jax.device_put(key, sharding)

"""What one leaf is: its bytes on the host, its shape, dtype and crc32, and their fingerprint."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ttt_jax import _arguments
from ttt_jax.base import PyTree
from ttt_jax.checkpoint import trees
from ttt_jax.checkpoint.errors import CheckpointError

# Tensorstore's zarr driver has no encoding for these (orbax-checkpoint 0.12.8).
_NO_ENCODING = frozenset({"uint1", "int1", "uint2", "uint4"})


class Leaf(NamedTuple):
    """The record of one leaf.

    Attributes:
      shape: the leaf's shape (for a typed PRNG key, without the axis of its words).
      dtype: the dtype's name, such as ``"bfloat16"`` or ``"key<fry>"``.
      crc32: eight hex digits over the row-major bytes.
      impl: the generator of a typed PRNG key, ``None`` for every other leaf.
    """

    shape: tuple[int, ...]
    dtype: str
    crc32: str
    impl: str | None = None

    def __str__(self) -> str:
        return describe(self.shape, self.dtype)


def describe(shape: tuple[int, ...], dtype: str) -> str:
    """Returns the short form used in messages, such as ``float32[3, 4]``."""
    return f"{dtype}[{', '.join(map(str, shape))}]"


def dtype_name(dtype: Any) -> str:
    """Returns one name per dtype, whatever its byte order; extended dtypes included."""
    return str(dtype) if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).name


def check_width(path: str, dtype: str) -> None:
    """Raises where JAX, as it is configured now, would narrow the dtype."""
    if not dtype.startswith("key<") and jax.dtypes.canonicalize_dtype(dtype).name != dtype:
        raise CheckpointError(
            f"{trees.leaf_name(path)} is {dtype}, which JAX would cast to 32 bits. "
            "Cast it before saving, or enable jax_enable_x64."
        )


def check_alive(path: str, leaf: Any) -> None:
    """Raises where the leaf is a JAX array whose buffer is gone."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
        raise CheckpointError(
            f"{trees.leaf_name(path)} was deleted or donated to a compiled function. "
            "Never donate pristine parameters; load them again."
        )


def crc32(array: np.ndarray) -> str:
    """Returns the crc32 of the array's row-major bytes as eight hex digits."""
    flat = np.asarray(array, order="C").reshape(-1)
    return f"{zlib.crc32(flat.view(np.uint8).data):08x}"


def to_host(path: str, leaf: Any) -> tuple[np.ndarray, str | None]:
    """Copies one leaf to the host.

    Returns:
      The bytes as a row-major array of native byte order, and the generator's name where the
      leaf is a typed PRNG key (whose array is then its uint32 words).

    Raises:
      CheckpointError: the leaf is no array, is traced, deleted, or not all on this process.
    """
    name, impl = trees.leaf_name(path), None
    if isinstance(leaf, jax.core.Tracer):
        raise CheckpointError(f"{name} is traced. Call this outside jit, grad and vmap.")
    if isinstance(leaf, jax.Array):
        check_alive(path, leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise CheckpointError(
                f"{name} has shards on other processes. Gather it first with "
                "jax.experimental.multihost_utils.process_allgather(x, tiled=True)."
            )
    elif not isinstance(leaf, np.ndarray | np.generic):
        raise CheckpointError(
            f"{name} is a {type(leaf).__name__}; a checkpoint holds JAX and NumPy arrays. "
            "Convert it with jnp.asarray, or keep it in the metadata."
        )
    array = np.asarray(leaf)
    number = jax.dtypes.issubdtype(array.dtype, np.number) or array.dtype == np.bool_
    if not number or array.dtype.name in _NO_ENCODING:
        raise CheckpointError(
            f"{name} has dtype {array.dtype}, which cannot be stored. "
            "Cast it to a floating, integer or boolean dtype of a whole byte."
        )
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C"), impl


def record(path: str, leaf: Any) -> tuple[Leaf, np.ndarray]:
    """Returns the record of one leaf and its bytes on the host; raises as :func:`to_host`."""
    array, impl = to_host(path, leaf)
    shape, dtype = tuple(leaf.shape), dtype_name(leaf.dtype)
    check_width(path, dtype)
    return Leaf(shape, dtype, crc32(array), impl), array


def check_finite(path: str, array: np.ndarray) -> None:
    """Raises where a floating or complex leaf holds NaN or an infinity."""
    if not jax.dtypes.issubdtype(array.dtype, np.inexact):
        return
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise CheckpointError(
            f"{trees.leaf_name(path)} holds {bad} non-finite of {array.size} values. "
            "Pristine parameters must be finite: save an earlier state."
        )


def check_same(path: str, found: Leaf, stored: Leaf, *, where: str) -> None:
    """Raises where a leaf is not the recorded one, bit for bit."""
    if found != stored:
        raise CheckpointError(
            f"{trees.leaf_name(path)} {where}: recorded {stored} crc32 {stored.crc32}, "
            f"found {found} crc32 {found.crc32}."
        )


def summarize(records: Mapping[str, Leaf]) -> str:
    """Returns sha256, in hex, over the sorted (path, shape, dtype, crc32) of every leaf."""
    rows = [[path, list(r.shape), r.dtype, r.crc32] for path, r in sorted(records.items())]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


@_arguments.checked()
def fingerprint(params: PyTree) -> str:
    """Names a tree of parameters by its content.

    It depends on path, shape, dtype and bytes of every leaf only: not on the containers'
    types, the order of keys, ``None`` holes, devices or the layout of files.

    Args:
      params: a pytree of JAX or NumPy arrays.

    Returns:
      64 hex digits, equal to :attr:`Pristine.fingerprint` of a checkpoint of this tree.

    Raises:
      CheckpointError: a leaf is no array, is deleted, traced, or shares its path.
    """
    return summarize({path: record(path, leaf)[0] for path, leaf in trees.flatten(params)})

"""Pristine parameters as they are held in memory, and the three ways to restore them."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ttt_jax import _arguments
from ttt_jax.base import PyTree
from ttt_jax.checkpoint import leaves, manifest, trees
from ttt_jax.checkpoint.errors import CheckpointError
from ttt_jax.checkpoint.leaves import Leaf

MODES = ("memory", "fingerprint", "orbax")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pristine:
    """Parameters that no call may change, and the means to prove that none did.

    Attributes:
      params: the parameters; from :func:`load`, immutable JAX arrays.
      metadata: what the caller saved with them (JSON: tuples are lists).
      fingerprint: 64 hex digits, equal to :func:`fingerprint` of ``params``; belongs in every
        row of results.
      leaves: the record of every held leaf by path.
      versions: the package versions at the time of saving.
      path: the checkpoint's folder, ``None`` for :func:`pristine`.
      reload: reads the checkpoint again; ``None`` for :func:`pristine`.
    """

    params: PyTree
    metadata: dict[str, Any]
    fingerprint: str
    leaves: Mapping[str, Leaf]
    versions: Mapping[str, str]
    path: pathlib.Path | None = None
    reload: Callable[[], "Pristine"] | None = None

    def __repr__(self) -> str:
        where = self.path or "in memory"
        return f"Pristine({where}, {len(self.leaves)} leaves, fingerprint {self.fingerprint[:12]})"

    def restore(self, mode: str) -> PyTree:
        """Returns the pristine parameters, in new containers around the leaves.

        Args:
          mode: ``"memory"`` gives the held leaves (no cost; an error only where one was
            deleted or donated), trusting that nobody rebound an entry of ``params``;
            ``"fingerprint"`` first checks path, shape, dtype and crc32 of every held leaf;
            ``"orbax"`` reads the files again, with all the checks of :func:`load`.

        Returns:
          A tree like ``params``.

        Raises:
          ValueError: the mode is unknown.
          CheckpointError: a held leaf changed, a file is damaged, or the checkpoint on disk
            is another than the one that was loaded.
        """
        if mode not in MODES:
            raise ValueError(
                f"Unknown restore mode {mode!r}; it is one of {', '.join(MODES)}."
                f"{trees.nearest(str(mode), MODES)}"
            )
        if mode == "orbax":
            return self._from_disk()
        held = trees.flatten(self.params)
        for path, leaf in held:
            leaves.check_alive(path, leaf)
        if mode == "fingerprint":
            self._check(dict(held))
        return jax.tree.map(lambda leaf: leaf, self.params)

    def require(self, **expected: Any) -> None:
        """Checks metadata against what the caller is about to use.

        A wrong normalization moves published error rates by more than the methods under
        comparison do; so the constants are stored with the weights and asked for::

            pristine.require(mean=0.5, std=0.5, model={"depth": 26})

        Raises:
          CheckpointError: a key is not in the metadata, or holds another value.
        """
        for key, value in expected.items():
            if key not in self.metadata:
                raise CheckpointError(
                    f"The checkpoint ({self.path or 'in memory'}) has no metadata {key!r}."
                    f"{trees.nearest(key, self.metadata)} Save it with metadata={{{key!r}: ...}}."
                )
            stored = self.metadata[key]
            if manifest.jsonable(value, key) != stored:
                raise CheckpointError(
                    f"metadata {key!r} of the checkpoint ({self.path or 'in memory'}) is "
                    f"{stored!r}, expected {value!r}. Use the checkpoint's value."
                )

    def _check(self, held: Mapping[str, Any]) -> None:
        for path in [*self.leaves, *held]:
            if path not in held or path not in self.leaves:
                was = "removed from" if path in self.leaves else "added to"
                raise CheckpointError(f"{trees.leaf_name(path)} was {was} the held parameters.")
        for path, stored in self.leaves.items():
            found = leaves.record(path, held[path])[0]
            leaves.check_same(path, found, stored, where="changed in memory")

    def _from_disk(self) -> PyTree:
        if self.reload is None:
            raise CheckpointError(
                "These parameters come from memory and have no file to restore from. Use mode "
                "'memory' or 'fingerprint', or save and load them."
            )
        again = self.reload()
        if again.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"The checkpoint {self.path} is another than the one that was loaded: "
                f"fingerprint {again.fingerprint[:12]}, loaded {self.fingerprint[:12]}."
            )
        return again.params


@_arguments.checked(metadata=None)
def pristine(params: PyTree, metadata: Mapping[str, Any] | None = None) -> Pristine:
    """Holds parameters that have no file; ``restore("orbax")`` then raises.

    The leaves are held, not copied: a NumPy leaf that its owner changes later is what
    ``restore("fingerprint")`` finds.

    Args:
      params: a pytree of JAX or NumPy arrays, all finite.
      metadata: anything JSON can hold, by string keys.

    Raises:
      CheckpointError: a leaf is no array, not finite, deleted, traced or shares its path, or a
        metadata value is not JSON.
    """
    records = {path: leaf for path, (leaf, _) in inspect(params).items()}
    return Pristine(
        params=jax.tree.map(lambda leaf: leaf, params),
        metadata=manifest.check_metadata(metadata),
        fingerprint=leaves.summarize(records),
        leaves=records,
        versions=manifest.versions(),
    )


def inspect(params: PyTree) -> dict[str, tuple[Leaf, np.ndarray]]:
    """Returns record and host array of every leaf; raises where the tree cannot be pristine."""
    found = {path: leaves.record(path, leaf) for path, leaf in trees.flatten(params)}
    if not found:
        raise CheckpointError("The params have no leaves. Give a pytree of arrays.")
    for path, (_, array) in found.items():
        leaves.check_finite(path, array)
    return found

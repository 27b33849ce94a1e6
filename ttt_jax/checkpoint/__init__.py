"""Pristine parameters on disk and in memory: written once, read with every bit checked.

Orbax writes and reads the arrays; it stores no checksum, restores flipped bytes silently and
casts to whatever dtype is asked for. So this package keeps a manifest beside the arrays,
``ttt_jax.json``, with shape, dtype and crc32 of every leaf, size and crc32 of every file, the
caller's metadata, the package versions, and a crc32 of itself::

    from ttt_jax import checkpoint

    checkpoint.save("runs/digits/pristine", params, metadata={"mean": 0.5, "std": 0.5})
    pristine = checkpoint.load("runs/digits/pristine")
    pristine.require(mean=0.5, std=0.5)         # the preprocessing the model was trained with
    params = pristine.restore("memory")         # or "fingerprint", or "orbax"

On disk::

    PATH/ttt_jax.json                the manifest
    PATH/params/                     an orbax checkpoint of its own (zarr, use_ocdbt=False)
    PATH/params/encoder.conv.kernel/ one folder per leaf, so damage names its leaf

Every failure is a :class:`CheckpointError` that names the leaf or the file.
"""

from ttt_jax.checkpoint.adapters import load_adapter, save_adapter
from ttt_jax.checkpoint.errors import CheckpointError
from ttt_jax.checkpoint.held import MODES, Pristine, pristine
from ttt_jax.checkpoint.leaves import Leaf, fingerprint
from ttt_jax.checkpoint.saves import Saves
from ttt_jax.checkpoint.store import load, save

__all__ = [
    "MODES",
    "CheckpointError",
    "Leaf",
    "Pristine",
    "Saves",
    "fingerprint",
    "load",
    "load_adapter",
    "pristine",
    "save",
    "save_adapter",
]

r"""Writes a packed image set in random order.

Usage::

    python -m experiments.shuffle_pack --source=train_jpegpack.npz --target=DIR/train.npz \
        --title="CIFAR-10, JPEG q75"

A set whose rows are sorted by class cannot be sliced into a training and a validation part. The
order is a permutation drawn from ``--seed``; ``ids`` keeps each image's place in the source file.
Rows of results carry ``--title``. No pixel is decoded.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import launch


def shuffled(arrays: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The arrays of a packed set (``header, data, offsets, labels``) in random order."""
    offsets = arrays["offsets"].astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(arrays["labels"]))
    pieces = [arrays["data"][offsets[i] : offsets[i + 1]] for i in order]
    ends = np.cumsum([0] + [len(piece) for piece in pieces])
    return arrays | {
        "data": np.concatenate(pieces),
        "offsets": ends.astype(arrays["offsets"].dtype),
        "labels": arrays["labels"][order],
        "ids": order.astype(np.int64),
    }


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    source = pathlib.Path(_SOURCE.value)
    if not source.exists():
        raise launch.UserError(f"there is no file {source}; --source names a packed npz set.")
    with np.load(source) as archive:
        arrays = {name: archive[name] for name in archive.files}
    missing = {"header", "data", "offsets", "labels"} - arrays.keys()
    if missing:
        raise launch.UserError(
            f"{source} is not a packed set: it lacks {', '.join(sorted(missing))}."
        )
    target = pathlib.Path(_TARGET.value)
    with launch.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if _TITLE.value:
            arrays["title"] = np.asarray(_TITLE.value)
        np.savez(target, **shuffled(arrays, _SEED.value))
    print(f"{len(arrays['labels'])} images in {target}")
    return 0


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", None, "A packed npz set.", required=True)
    _TARGET = flags.DEFINE_string("target", None, "The file to write.", required=True)
    _TITLE = flags.DEFINE_string("title", "", "What results call the set.")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the order.")
    launch.run(main)

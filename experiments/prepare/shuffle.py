r"""Writes a packed image set in random order.

Usage::

    python -m experiments.prepare.shuffle --source=train_jpegpack.npz --target=DIR/train.npz \
        --title="CIFAR-10, JPEG q75"

A set whose rows are sorted by class cannot be sliced into a training and a validation part. The
order is a permutation drawn from ``--seed``; ``ids`` keeps each image's id, or its place in the
source. Rows of results carry ``--title``. No pixel is decoded.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import launch

# Arrays of a packed set that are not one entry per image, whatever their length.
_WHOLE = ("header", "data", "offsets", "class_names", "title")


def shuffled(arrays: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The arrays of a packed set (``header, data, offsets, labels``) in random order.

    Whatever else has an entry per image goes with it, ``ids`` too; without them an image's id
    becomes its place in the set.
    """
    offsets = arrays["offsets"].astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(arrays["labels"]))
    pieces = [arrays["data"][offsets[i] : offsets[i + 1]] for i in order]
    ends = np.cumsum([0] + [len(piece) for piece in pieces])
    count = len(order)
    moved = {
        name: array[order]
        for name, array in arrays.items()
        if name not in _WHOLE and array.ndim and len(array) == count
    }
    places = {"ids": order.astype(np.int64)}
    return (
        arrays
        | places
        | moved
        | {"data": np.concatenate(pieces), "offsets": ends.astype(arrays["offsets"].dtype)}
    )


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    source = pathlib.Path(_SOURCE.value)
    if not source.exists():
        raise launch.UserError(f"there is no file {source}; --source names a packed npz set.")
    arrays = launch.read_npz(source, "Make or fetch it again.")
    missing = {"header", "data", "offsets", "labels"} - arrays.keys()
    if missing:
        raise launch.UserError(
            f"{source} is not a packed set: it lacks {', '.join(sorted(missing))}."
        )
    target = pathlib.Path(_TARGET.value)
    if target.suffix != ".npz" or (target.exists() and target.samefile(source)):
        raise launch.UserError(
            f"--target is an .npz file other than --source; got {target} for {source}."
        )
    if _TITLE.value:
        arrays["title"] = np.asarray(_TITLE.value)
    launch.write_npz(target, shuffled(arrays, _SEED.value))
    print(f"{len(arrays['labels'])} images in {target}")
    return 0


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", None, "A packed npz set.", required=True)
    _TARGET = flags.DEFINE_string("target", None, "The file to write.", required=True)
    _TITLE = flags.DEFINE_string("title", "", "What results call the set.")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the order.")
    launch.run(main)

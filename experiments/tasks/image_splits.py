"""What holds between splits: none has images of the reported one, all have the same classes."""

import os
import zlib
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from ttt_jax import data
from ttt_jax.data import npz, splits
from ttt_jax.source import is_test_split

# Public sets hold a few of their images twice: CIFAR-10 has some of its test images in training.
_SHARED = 0.1
_ROLES = ("train", "validation")


def place(config: ml_collections.ConfigDict, role: str) -> tuple[str, str]:
    """The set and the un-sliced split that a role lies in: positions there name an image."""
    base = splits.parse(config.data[role]).base
    name = config.data.name.replace("{split}", base)
    # A file has one split, whatever it is called.
    return (name, "") if name.startswith("npz:") else (name, base)


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses splits that overlap the reported one, as far as names and ranges show it.

    Raises:
      ValueError: naming both splits.
    """
    if is_test_split(config.data.train):
        raise ValueError(
            f"data.train must not be test data; got {config.data.train!r}. Name the split that "
            "trains."
        )
    for role in _ROLES:
        if place(config, role) == place(config, "test"):
            first, second = (splits.parse(config.data[name]) for name in (role, "test"))
            if _overlap(first, second):
                raise _refused(config, role, "they overlap")


def _refused(config: ml_collections.ConfigDict, role: str, how: str) -> ValueError:
    does = {"train": "trains on", "validation": "chooses settings on"}[role]
    return ValueError(
        f"data.{role} {does} the images that data.test reports: {how}; got data.{role}="
        f"{config.data[role]!r} and data.test={config.data.test!r}. Take images that are not in "
        "data.test."
    )


def _overlap(first: splits.Split, second: splits.Split) -> bool:
    """Whether two parts of one split share an example, where that needs no length."""
    bounds = [text for split in (first, second) for text in split[1:] if text is not None]
    if first[1:] == second[1:] or not bounds:
        return True
    if any(text.startswith("-") for text in bounds) or len({t[-1] == "%" for t in bounds}) > 1:
        return False
    limit = 100 if bounds[0].endswith("%") else float("inf")
    (a, b), (c, d) = (
        (float((s.start or "0").rstrip("%")), float((s.stop or f"{limit}").rstrip("%")))
        for s in (first, second)
    )
    return max(a, c) < min(b, d)


def classes(config: ml_collections.ConfigDict) -> tuple[int, tuple[str, ...] | None]:
    """The classes of a set of one npz file per split: as they are named, else as training shows.

    Raises:
      ValueError: splits with other names than each other, or a label that training does not have.
    """
    found = {}
    for role in ("train", "validation", "test"):
        path = place(config, role)[0].removeprefix("npz:")
        if os.path.exists(path):
            found[role] = npz.classes(path)
    named = {role: names for role, (_, names) in found.items() if names is not None}
    if len({*named.values()}) > 1:
        raise ValueError(
            "all splits must have the same class_names; got "
            + "; ".join(f"data.{role}: {', '.join(names)}" for role, names in named.items())
            + ". Save them alike."
        )
    counts = {role: count for role, (count, _) in found.items()}
    names = next(iter(named.values()), None)
    known = len(names) if names else counts.get("train", max(counts.values(), default=0))
    for role, count in counts.items():
        if count > known:
            raise ValueError(
                f"data.{role} must have the classes of data.train, 0 to {known - 1}; got the label "
                f"{count - 1}. Add class_names to the files, or take that class away."
            )
    return known, names


def check_images(
    config: ml_collections.ConfigDict, sources: Mapping[str, data.Source]
) -> dict[str, str]:
    """Refuses splits that share their images with the reported one; the fingerprint of each.

    Args:
      config: of the sources.
      sources: by role, those at hand: ``test``, and any of ``train`` and ``validation``.

    Raises:
      ValueError: naming both splits and how many images they share.
    """
    test = sources["test"]
    seen = None
    for role in _ROLES:
        if role not in sources:
            continue
        source = sources[role]
        if place(config, role) == place(config, "test"):
            shared = np.isin(source.ids, test.ids).sum()
            if shared:
                raise _refused(config, role, f"they share {shared} images")
        seen = _contents(test) if seen is None else seen
        found = _contents(source)
        shared, smaller = len(seen & found), min(len(seen), len(found))
        if shared > _SHARED * smaller:
            raise _refused(config, role, f"{shared} images are in both, pixel by pixel")
    return {role: source.fingerprint for role, source in sources.items()}


def _contents(source: data.Source) -> set[Any]:
    def digest(index: int) -> tuple[Any, ...]:
        image = source[index].image
        return image.shape, zlib.crc32(image.tobytes()), float(image.sum())

    return {digest(index) for index in range(len(source))}

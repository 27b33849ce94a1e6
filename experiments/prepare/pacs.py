"""Writes PACS with one domain left out: three to train on, the fourth as the test.

Usage::

    python -m experiments.prepare.pacs --source='DIR/{domain}_32.npz' [--target=data/pacs]
    [--held_out=sketch]

Reads one ``npz`` set (``images``, ``labels``, ``class_names``) for each of photo, art_painting,
cartoon and sketch (Li et al. 2017), and writes ``TARGET/HELD_OUT/train.npz``, ``validation.npz``
and ``test.npz``. Test is the whole held-out domain. Of each class of each other domain a tenth is
validation and the rest training; which tenth, and the order, are drawn from ``--seed``. ``ids``
counts through the four domains, so an image has the same id whichever domain is left out.
"""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from experiments import launch

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
VALIDATION_SHARE = 0.1

Arrays = dict[str, np.ndarray]


def leave_one_out(sets: Mapping[str, Arrays], held_out: str, seed: int) -> dict[str, Arrays]:
    """The three splits with one domain as the test.

    Args:
      sets: per domain ``images`` ``[N, H, W, C]``, ``labels`` ``[N]`` and ``class_names``.
      held_out: the domain that is left out of training.
      seed: of the validation images and of the order.

    Returns:
      ``{"train", "validation", "test"}``, each with ``images``, ``labels``, ``class_names``,
      ``ids`` and ``domains``, the domain's name of every image.
    """
    images, labels = (
        np.concatenate([arrays[name] for arrays in sets.values()]) for name in ("images", "labels")
    )
    domains = np.concatenate(
        [np.full(len(arrays["labels"]), name) for name, arrays in sets.items()]
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    split = np.where(domains == held_out, "test", "train").astype("<U10")
    for domain in sets.keys() - {held_out}:
        for label in np.unique(labels):
            members = order[(domains[order] == domain) & (labels[order] == label)]
            split[members[: round(VALIDATION_SHARE * len(members))]] = "validation"
    parts = {name: order[split[order] == name] for name in ("train", "validation", "test")}
    return {
        name: {
            "images": images[places],
            "labels": labels[places],
            "class_names": next(iter(sets.values()))["class_names"],
            "ids": places.astype(np.int64),
            "domains": domains[places],
        }
        for name, places in parts.items()
    }


def _read(pattern: str) -> dict[str, Arrays]:
    if "{domain}" not in pattern:
        raise launch.UserError(
            f"--source names one file per domain with {{domain}} in its place; got {pattern!r}."
        )
    sets = {}
    for domain in DOMAINS:
        path = pathlib.Path(pattern.replace("{domain}", domain))
        if not path.exists():
            raise launch.UserError(f"there is no file {path}; --source gave {pattern!r}.")
        sets[domain] = launch.read_npz(path, "Make or fetch it again.")
        missing = {"images", "labels", "class_names"} - sets[domain].keys()
        if missing:
            raise launch.UserError(f"{path} lacks the arrays {', '.join(sorted(missing))}.")
        if not np.array_equal(sets[domain]["class_names"], sets[DOMAINS[0]]["class_names"]):
            raise launch.UserError(f"{path} has other class_names than {DOMAINS[0]}.")
    return sets


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    sets = _read(_SOURCE.value)
    for held_out in _HELD_OUT.value:
        folder = pathlib.Path(_TARGET.value) / held_out
        for name, arrays in leave_one_out(sets, held_out, _SEED.value).items():
            title = {"title": np.asarray(f"PACS, {arrays['images'].shape[1]} px")}
            launch.write_npz(folder / f"{name}.npz", arrays | title, compressed=True)
            print(f"{len(arrays['labels'])} images in {folder / name}.npz")
    return 0


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string(
        "source", None, "An npz set per domain, {domain} in the place of its name.", required=True
    )
    _TARGET = flags.DEFINE_string("target", "data/pacs", "The folder to write.")
    _HELD_OUT = flags.DEFINE_multi_enum(
        "held_out", list(DOMAINS), list(DOMAINS), "The domain to leave out; default: each in turn."
    )
    _SEED = flags.DEFINE_integer("seed", 0, "Of the validation images and the order.")
    launch.run(main)

"""The rows of parts of a table as one table.

Usage::

    python -m experiments.merge --workdir=WHOLE --parts=PART0,PART1,...

A part is the work folder of an ``experiments.adapt`` with the same config, over some methods or
domains (``--methods``, ``--domains``), over some seeds, or over a range of the test images
(``--config.data.test='test[:5000]'``). Rows of one part alone are taken as they are; rows of
several ranges become one, as if its images had been adapted in one run: an image's corruption and
keys depend on its place in the split, not on the range it came with. ``WHOLE`` can be reported on,
and resumed with the config whose ``data.test`` is the whole.

Only what takes one image at a time can be cut into ranges, and no gradual sequence, where the place
in the range says how severe an image's corruption is. A row per range is missing, ranges that
overlap, rows that differ where they should not: each is refused, and nothing is written.

Settings with candidates are chosen once: parts of other seeds begin with the ``selection.json`` of
the first part in their work folder, as one run over all seeds takes the choice of its first one.
"""

import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from experiments import journal, launch
from ttt_jax.data import splits

# A share of a row's images.
_SHARES = ("error", "turned_right", "turned_wrong")
_MEANS = ("aux_loss_before", "aux_loss_after")
_SUMS = ("num_examples", "seconds", "non_finite", "resets")
# Of work that ranges do at different times, or each for itself.
_LONGEST = ("compile_seconds", "source_seconds")
_TIMES = ("seconds", "samples_per_second", "compile_seconds", "source_seconds")
# Where a part may differ: its images and seeds, and what changes no result.
_FREE = ("data.test", "seeds", "data.dir", "data.in_memory")
_FREE += ("adapt.chunk_size", "adapt.parallel_streams")
# Mean losses of two machines differ by rounding.
_ROUNDING = 1e-4
_ENDLESS = float("inf")


class Range(NamedTuple):
    """The images ``[start, stop)`` of a split.

    Attributes:
      base: the split.
      unit: ``"%"``, ``"images"``, or ``""`` for the whole split, which is the same in both.
      start: the first one.
      stop: the one after the last, infinite for the end of the split.
    """

    base: str
    unit: str
    start: float
    stop: float

    def __str__(self) -> str:
        if not self.unit:
            return self.base
        sign = "%" if self.unit == "%" else ""
        start = f"{self.start:.0f}{sign}" if self.start else ""
        stop = f"{self.stop:.0f}{sign}" if self.stop != _ENDLESS else ""
        return f"{self.base}[{start}:{stop}]"


def range_of(text: str) -> Range:
    """A split string as a range.

    Raises:
      UserError: bounds that count from the end, or one in percent and one in images.
    """
    split = splits.parse(text)
    bounds = [bound for bound in (split.start, split.stop) if bound is not None]
    units = {"%" if bound.endswith("%") else "images" for bound in bounds}
    if len(units) > 1 or any(bound.startswith("-") for bound in bounds):
        raise launch.UserError(
            "data.test of a part is 'test', 'test[100:200]' or 'test[10%:20%]', counted from the "
            f"beginning; got {text!r}."
        )
    start = float(split.start.rstrip("%")) if split.start else 0.0
    stop = float(split.stop.rstrip("%")) if split.stop else _ENDLESS
    if units == {"%"} and stop == 100:
        stop = _ENDLESS
    whole = (start, stop) == (0, _ENDLESS)
    return Range(split.base, "" if whole else units.pop(), start, stop)


def _over(ranges: Iterable[Range]) -> Range:
    """From the first image of some ranges to their last.

    Raises:
      UserError: they are of two splits or in two units.
    """
    ranges = list(ranges)
    units = {one.unit for one in ranges if one.unit}
    bases = {one.base for one in ranges}
    if len(units) > 1 or len(bases) > 1:
        there = ", ".join(sorted({str(one) for one in ranges}))
        raise launch.UserError(
            f"ranges of data.test are of one split, all in percent or all in images; got {there}."
        )
    start, stop = min(one.start for one in ranges), max(one.stop for one in ranges)
    unit = "" if (start, stop) == (0, _ENDLESS) else units.pop()
    return Range(bases.pop(), unit, start, stop)


def union(ranges: Iterable[Range]) -> Range:
    """The one range that several make.

    Raises:
      UserError: they overlap, leave images out, are of two splits or in two units.
    """
    ordered = sorted(ranges, key=lambda one: (one.start, one.stop))
    whole = _over(ordered)
    for before, after in itertools.pairwise(ordered):
        if before.stop != after.start:
            what = "overlap" if before.stop > after.start else "leave images out between them"
            raise launch.UserError(f"the ranges {before} and {after} {what}; they must adjoin.")
    return whole


class Part(NamedTuple):
    """A work folder with rows.

    Attributes:
      folder: where it is.
      images: which test images it is about.
      rows: its rows.
      record: its ``run.json``.
      selection: its ``selection.json``.
    """

    folder: pathlib.Path
    images: Range
    rows: list[dict[str, Any]]
    record: dict[str, Any]
    selection: dict[str, Any]


def _json(path: pathlib.Path, **keys: type) -> dict[str, Any]:
    """A file that has some keys, with values of some types."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in keys.items():
            if not isinstance(record[key], kind):
                raise TypeError(f"{key} is {record[key]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise launch.UserError(f"{path} is damaged ({error!r}); run that part again.") from error
    return record


def read(folder: pathlib.Path) -> Part:
    """A part, all of whose rows are finished.

    Raises:
      UserError: files are missing or damaged, or there are failed rows.
    """
    for name in ("results.jsonl", "run.json", "selection.json"):
        if not (folder / name).exists():
            raise launch.UserError(
                f"a part is the work folder of experiments.adapt; {folder} has no {name}."
            )
    rows, _ = journal.read(folder / "results.jsonl")
    failed = [row for row in rows if row.get("status") != "ok"]
    if failed or not rows:
        raise launch.UserError(
            f"{folder} has {len(failed)} failed of {len(rows)} rows; run that part again first."
        )
    record = _json(folder / "run.json", config=dict)
    try:
        images = range_of(record["config"]["data"]["test"])
        list(record["config"]["seeds"])
    except (KeyError, TypeError) as error:
        raise launch.UserError(
            f"{folder / 'run.json'} is damaged ({error!r}); run that part again."
        ) from error
    return Part(
        folder, images, rows, record, _json(folder / "selection.json", chosen=dict, tried=list)
    )


def _require_equal(parts: Sequence[Part]) -> None:
    """Parts of one table share config, settings and the models of their seeds.

    Raises:
      UserError: naming what differs between two parts.
    """

    def settings(part: Part) -> dict[str, Any]:
        config = launch.DEFAULTS | launch.flat(ml_collections.ConfigDict(part.record["config"]))
        return {name: v for name, v in config.items() if name not in _FREE}

    first, mine = parts[0], settings(parts[0])
    chosen: dict[str, tuple[Part, Any]] = {}
    models: dict[Any, tuple[Part, str]] = {}
    for part in parts:
        theirs = settings(part)
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                raise launch.UserError(
                    f"parts of a table differ in {', '.join(_FREE)} alone; {name} is "
                    f"{mine.get(name)!r} in {first.folder} and {theirs.get(name)!r} in "
                    f"{part.folder}."
                )
        for name, params in part.selection["chosen"].items():
            other, before = chosen.setdefault(name, (part, params))
            if params != before:
                raise launch.UserError(
                    f"settings are chosen once for a table, but for {name} they are {before} in "
                    f"{other.folder} and {params} in {part.folder}; put the selection.json of "
                    "the first part into the other work folders, then run experiments.adapt there."
                )
        for row in part.rows:
            other, model = models.setdefault(row["seed"], (part, row["checkpoint"]))
            if row["checkpoint"] != model:
                raise launch.UserError(
                    f"a seed is one model, but rows of seed {row['seed']} are of checkpoint "
                    f"{model} in {other.folder} and of {row['checkpoint']} in {part.folder}; make "
                    "both parts with the same --checkpoint."
                )


def joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one key over several ranges of images, as the row of all of them.

    Args:
      rows: finished rows as ``experiments.adapt`` writes them. Shares (``error``, ``turned_right``,
        ``turned_wrong``, ``error_by_step``) become those of all images, mean losses the mean over
        them; numbers of images and seconds are added; of ``compile_seconds`` and
        ``source_seconds`` the longest is taken. Every other field is equal in all rows.

    Returns:
      The row, with ``samples_per_second`` of the whole.

    Raises:
      ValueError: rows of a method that takes several images at once or of a gradual sequence, rows
        that differ in what is no measurement, or rows with errors of groups of classes, whose
        sizes they do not say.
    """
    first = rows[0]
    if first["scope"] != "per_sample":
        raise ValueError(
            "its images adapt together (a batch or a stream), so one part must have them all"
        )
    if first.get("sequence") == "gradual":
        raise ValueError(
            "an image's place in a gradual sequence says how severe its corruption is, so one part "
            "must have them all; cut by --methods instead"
        )
    measured = {*_SHARES, *_MEANS, *_SUMS, *_LONGEST, "samples_per_second", "error_by_step"}
    for row in rows[1:]:
        for name in sorted({*first, *row}):
            if name.startswith("error_") and name not in measured:
                raise ValueError(
                    "it has errors of groups of classes, but not how many images these have in a "
                    "range; cut by --domains instead"
                )
            here, there = (name in one for one in (first, row))
            if here != there or (name not in measured and first[name] != row[name]):
                raise ValueError(f"{name} is {first.get(name)!r} and {row.get(name)!r}")
    counts = [row["num_examples"] for row in rows]
    total = sum(counts)

    def share(values: Sequence[float]) -> float:
        # Numbers of images, so that the whole's share is the very one of a single run.
        return sum(round(v * n) for v, n in zip(values, counts, strict=True)) / total

    whole = dict(first)
    for name in first:
        values = [row[name] for row in rows]
        if name in _SHARES:
            whole[name] = share(values)
        elif name == "error_by_step":
            whole[name] = [share(step) for step in zip(*values, strict=True)]
        elif name in _MEANS:
            whole[name] = sum(v * n for v, n in zip(values, counts, strict=True)) / total
        elif name in _SUMS:
            whole[name] = sum(values)
        elif name in _LONGEST:
            whole[name] = max(values)
    whole["samples_per_second"] = total / whole["seconds"]
    return whole


def _row(here: Sequence[tuple[Part, dict[str, Any]]], images: Range) -> dict[str, Any]:
    """The one row of a key.

    Raises:
      ValueError: rows that contradict each other, or do not cover the images.
    """
    rows = [row for _, row in here]
    (first, row), folders = here[0], " and ".join(str(part.folder) for part, _ in here)
    if row["split_role"] != "reported":
        for part, other in here[1:]:
            for name in sorted({*row, *other} - {*_TIMES}):
                mine, theirs = row.get(name), other.get(name)
                if mine != theirs and not (name in _MEANS and _close(mine, theirs)):
                    raise ValueError(
                        f"of the same images {name} is {mine!r} in {first.folder} and {theirs!r} "
                        f"in {part.folder}; make them with the same checkpoint and code"
                    )
        return row
    ranges = [part.images for part, _ in here]
    if len(set(ranges)) < len(ranges):
        raise ValueError(f"{folders} both have it")
    covered = union(ranges)
    if covered != images:
        raise ValueError(
            f"it is there for {covered}, and the parts are of {images}; run what is missing, and "
            "write a range up to the end of the split as test[100:]"
        )
    return joined(rows) if len(rows) > 1 else row


def _close(mine: Any, theirs: Any) -> bool:
    return None not in (mine, theirs) and math.isclose(mine, theirs, rel_tol=_ROUNDING)


def merged(parts: Sequence[Part]) -> tuple[Range, list[dict[str, Any]]]:
    """The test images of all parts and their rows, in order of appearance.

    Raises:
      UserError: the parts are not those of one table.
    """
    _require_equal(parts)
    # Beside ranges, a part with all images may have what cannot be cut.
    images = _over(part.images for part in parts)
    found: dict[tuple[Any, ...], list[tuple[Part, dict[str, Any]]]] = {}
    for part in parts:
        for row in part.rows:
            found.setdefault(journal.Journal.key(row), []).append((part, row))
    rows = []
    for key, here in found.items():
        try:
            rows.append(_row(here, images))
        except (ValueError, launch.UserError) as error:
            row = dict(zip(journal.KEY, key, strict=True))
            raise launch.UserError(
                "the rows of {method} on {domain} (severity {severity}, seed {seed}, {split_role}) "
                "cannot be joined: ".format(**row)
                + f"{error}".rstrip(".")
                + "."
            ) from error
    return images, rows


def _selection(parts: Sequence[Part]) -> dict[str, Any]:
    """What was chosen in any part, and tried for it."""
    whole = dict(parts[0].selection)
    for part in parts[1:]:
        new = part.selection["chosen"].keys() - whole["chosen"].keys()
        more = {name: part.selection["chosen"][name] for name in sorted(new)}
        whole["chosen"] = whole["chosen"] | more
        whole["tried"] = whole["tried"] + [
            tried for tried in part.selection["tried"] if tried["method"] in new
        ]
    return whole


def run(folder: str, parts: Sequence[str]) -> int:
    """Writes the table of some parts into a work folder; returns the exit status.

    Args:
      folder: the work folder to write, new or of an earlier merge.
      parts: the work folders to read.

    Raises:
      UserError: as :func:`merged`, or the folder has rows that were not merged.
    """
    if len(set(parts)) < len(parts) or not parts:
        raise launch.UserError(
            f"--parts lists the work folders, each once; got {', '.join(parts) or 'none'}."
        )
    read_parts = [read(pathlib.Path(part)) for part in parts]
    images, rows = merged(read_parts)
    workdir = launch.open_workdir(folder)
    with launch.locked(workdir):
        path = workdir / "run.json"
        results = workdir / "results.jsonl"
        if results.exists() and "parts" not in (_json(path) if path.exists() else {}):
            raise launch.UserError(
                f"{workdir} has rows that experiments.merge did not make; choose another --workdir."
            )
        first = read_parts[0].record
        config = json.loads(json.dumps(first["config"]))
        config["data"]["test"] = str(images)
        config["seeds"] = sorted({seed for p in read_parts for seed in p.record["config"]["seeds"]})
        kept = ("command", "device", "device_count", "versions", "commit", "started")
        record = first | {
            "command": " ".join(["python -m experiments.merge", *sys.argv[1:]]),
            "config": config,
            "parts": [
                {"folder": str(p.folder), "test": str(p.images)}
                | {name: p.record.get(name) for name in kept}
                for p in read_parts
            ],
        }
        launch.write_json(path, record)
        launch.write_json(workdir / "selection.json", _selection(read_parts))
        launch.write_atomically(results, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} rows of {len(parts)} parts in {results}")
    return 0


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    return run(_WORKDIR.value, _PARTS.value)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The work folder to write.", required=True)
    _PARTS = flags.DEFINE_list("parts", None, "The work folders to read.", required=True)
    launch.run(main)

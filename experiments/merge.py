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

With ``--program=diagnose`` a part is the work folder of an ``experiments.diagnose``, over some
corruptions, severities or seeds; the record of all and its page are made from the rows.
"""

import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from experiments import journal, launch, provenance
from experiments.merging import diagnostics, ranges, records, rows as rows_lib

# Where a part may differ: its images and seeds, and what changes no result.
_FREE = ("data.test", "seeds", "data.dir", "data.in_memory")
_FREE += ("adapt.chunk_size", "adapt.parallel_streams")


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
    images: ranges.Range
    rows: list[dict[str, Any]]
    record: dict[str, Any]
    selection: dict[str, Any]


def read(folder: pathlib.Path) -> Part:
    """A part, all of whose rows are finished.

    Raises:
      UserError: files are missing or damaged, or there are failed rows.
    """
    for name in ("results.jsonl", "run.json", "selection.json"):
        if not (folder / name).exists():
            raise launch.UserError(
                f"a part is the work folder of experiments.adapt; {folder} has no {name}. "
                "With parts of experiments.diagnose say --program=diagnose."
            )
    rows, _ = journal.read(folder / "results.jsonl")
    failed = [row for row in rows if row.get("status") != "ok"]
    if failed or not rows:
        raise launch.UserError(
            f"{folder} has {len(failed)} failed of {len(rows)} rows; run that part again first."
        )
    record = records.read(folder / "run.json", config=dict)
    try:
        images = ranges.range_of(record["config"]["data"]["test"])
        list(record["config"]["seeds"])
    except (KeyError, TypeError) as error:
        raise launch.UserError(
            f"{folder / 'run.json'} is damaged ({error!r}); run that part again."
        ) from error
    return Part(
        folder,
        images,
        rows,
        record,
        records.read(folder / "selection.json", chosen=dict, tried=list),
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


def _row(here: Sequence[tuple[Part, dict[str, Any]]], images: ranges.Range) -> dict[str, Any]:
    """The one row of a key.

    Raises:
      ValueError: rows that contradict each other, or do not cover the images.
    """
    rows = [row for _, row in here]
    (first, row), folders = here[0], " and ".join(str(part.folder) for part, _ in here)
    if row["split_role"] != "reported":
        for part, other in here[1:]:
            if difference := rows_lib.difference(row, other):
                name, mine, theirs = difference
                raise ValueError(
                    f"of the same images {name} is {mine!r} in {first.folder} and {theirs!r} in "
                    f"{part.folder}; make them with the same checkpoint and code"
                )
        return row
    several = [part.images for part, _ in here]
    if len(set(several)) < len(several):
        raise ValueError(f"{folders} both have it")
    covered = ranges.union(several)
    if covered != images:
        raise ValueError(
            f"it is there for {covered}, and the parts are of {images}; run what is missing, and "
            "write a range up to the end of the split as test[100:]"
        )
    return rows_lib.joined(rows) if len(rows) > 1 else row


def merged(parts: Sequence[Part]) -> tuple[ranges.Range, list[dict[str, Any]]]:
    """The test images of all parts and their rows, in order of appearance.

    Raises:
      UserError: the parts are not those of one table.
    """
    _require_equal(parts)
    # Beside ranges, a part with all images may have what cannot be cut.
    images = ranges.over(part.images for part in parts)
    found: dict[tuple[Any, ...], list[tuple[Part, dict[str, Any]]]] = {}
    for part in parts:
        for row in part.rows:
            found.setdefault(journal.key_of(row), []).append((part, row))
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


def _origins(part: Part) -> list[dict[str, Any]]:
    """Where the rows of a part were made: of a merged one, its parts and what was added to it."""
    nested: list[dict[str, Any]] = part.record.get("parts", [])
    runs = {"runs": part.record["runs"]} if "runs" in part.record else {}
    if nested and not runs:
        return nested
    own = {"folder": str(part.folder), "test": str(part.images)}
    return [*nested, own | provenance.origin(part.record) | runs]


def _require_more(
    workdir: pathlib.Path, images: ranges.Range, rows: Sequence[dict[str, Any]]
) -> None:
    """Refuses to replace rows that were measured.

    Raises:
      UserError: rows that are no merge's, or that the new table lacks.
    """
    path = workdir / "run.json"
    record = records.read(path) if path.exists() else {}
    if "parts" not in record:
        raise launch.UserError(
            f"{workdir} has rows that experiments.merge did not make; choose another --workdir."
        )
    old = read(workdir)
    new = {journal.key_of(row) for row in rows}
    lost = [row for row in old.rows if journal.key_of(row) not in new]
    if lost or ranges.over([old.images, images]) != images:
        raise launch.UserError(
            f"{workdir} is a table of {old.images} with {len(old.rows)} rows, {len(lost)} of which "
            f"these parts lack; they are of {images}. Name all parts, or choose another --workdir."
        )


def _write_table(folder: str, folders: Sequence[pathlib.Path]) -> int:
    """As :func:`run`, of work folders of ``experiments.adapt``."""
    read_parts = [read(part) for part in folders]
    images, rows = merged(read_parts)
    workdir = launch.open_workdir(folder)
    with launch.locked(workdir):
        path = workdir / "run.json"
        results = workdir / "results.jsonl"
        if results.exists():
            _require_more(workdir, images, rows)
        first = read_parts[0].record
        config = json.loads(json.dumps(first["config"]))
        config["data"]["test"] = str(images)
        config["seeds"] = sorted({seed for p in read_parts for seed in p.record["config"]["seeds"]})
        record = {name: value for name, value in first.items() if name != "runs"} | {
            "command": f"python -m experiments.merge {shlex.join(sys.argv[1:])}",
            "config": config,
            "parts": [origin for part in read_parts for origin in _origins(part)],
        }
        launch.write_json(path, record)
        launch.write_json(workdir / "selection.json", _selection(read_parts))
        launch.write_atomically(results, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} rows of {len(folders)} parts in {results}")
    return 0


PROGRAMS = {"adapt": _write_table, "diagnose": diagnostics.run}


def run(folder: str, parts: Sequence[str], program: str = "adapt") -> int:
    """Writes what some parts have together into a work folder; returns the exit status.

    Args:
      folder: the work folder to write, new or of an earlier merge.
      parts: the work folders to read.
      program: what made them, one of :data:`PROGRAMS`.

    Raises:
      UserError: parts that do not belong together, or the folder has rows that were not merged.
    """
    if len(set(parts)) < len(parts) or not parts:
        raise launch.UserError(
            f"--parts lists the work folders, each once; got {', '.join(parts) or 'none'}."
        )
    target = pathlib.Path(folder)
    if target.exists() and any(target.samefile(part) for part in parts if os.path.exists(part)):
        raise launch.UserError(
            f"{target} is one of --parts, which a merge reads only; choose another --workdir."
        )
    return PROGRAMS[program](folder, [pathlib.Path(part) for part in parts])


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    return run(_WORKDIR.value, _PARTS.value, _PROGRAM.value)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The work folder to write.", required=True)
    _PARTS = flags.DEFINE_list("parts", None, "The work folders to read.", required=True)
    _PROGRAM = flags.DEFINE_enum("program", "adapt", list(PROGRAMS), "What made the parts.")
    launch.run(main)

"""The records of several ``experiments.diagnose`` as one.

Rows stay as they are. Those of ranges of images make no row of all: its medians, choices and
numbers of classes cannot be had from theirs.
"""

import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections

from experiments import diagnose_record, journal, launch, provenance
from experiments.merging import records


class Part(NamedTuple):
    """A work folder with a record of one method.

    Attributes:
      folder: where it is.
      method: what the rows are of.
      rows: its rows, at least one.
      record: its ``diagnostics.json``.
    """

    folder: pathlib.Path
    method: str
    rows: list[dict[str, Any]]
    record: dict[str, Any]


def read(folder: pathlib.Path) -> Part:
    """A part in which ``experiments.diagnose`` has finished, or a merged one.

    Raises:
      UserError: files are missing or damaged, or there are rows that the record lacks.
    """
    book, path = folder / "diagnostics.jsonl", folder / "diagnostics.json"
    for file in (book, path):
        if not file.exists():
            raise launch.UserError(
                "a part is a work folder in which experiments.diagnose has finished; "
                f"{folder} has no {file.name}."
            )
    record = records.read(path, config=dict, rows=list)
    rows = record["rows"]
    try:
        method = rows[0]["method"]
    except (LookupError, TypeError) as error:
        raise launch.UserError(f"{path} is damaged ({error!r}); run that part again.") from error
    if [row for row in journal.read(book)[0] if row["method"] == method] != rows:
        raise launch.UserError(
            f"{path} lacks rows of {method} that {book} has, or has others; run "
            "experiments.diagnose there again, to its end."
        )
    if any("config" not in row for row in rows):
        raise launch.UserError(
            f"{book} has rows that do not say what made them, of an older version; run that part "
            "again in a new folder."
        )
    return Part(folder, method, rows, record)


def _require_same(one: Part, other: Part) -> None:
    """Parts of one record are about the same images, settings and models.

    Raises:
      UserError: naming what differs between the two.
    """

    def kinds(part: Part) -> list[dict[str, Any]]:
        # The others of a part differ from one of these in their cells alone.
        return list({(row["seed"], row["split_role"]): row for row in part.rows}.values())

    config = ml_collections.ConfigDict(other.record["config"])
    differences = [("method", one.method, other.method)] if one.method != other.method else []
    for row in kinds(one):
        for fields in kinds(other):
            differences += diagnose_record.differences(row, fields, config)
    for name, mine, theirs in differences[:1]:
        raise launch.UserError(
            "parts of a record differ in corruptions, severities, split and seeds alone, and rows "
            f"of two ranges of images cannot be joined; {name} is {mine!r} in {one.folder} and "
            f"{theirs!r} in {other.folder}."
        )


def merged(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The rows of all parts, in their order.

    Raises:
      UserError: the parts are not those of one record, or two have the same row.
    """
    found: dict[tuple[Any, ...], Part] = {}
    for place, part in enumerate(parts):
        for other in parts[:place]:
            _require_same(other, part)
        for row in part.rows:
            first = found.setdefault(journal.key_of(row), part)
            if first is not part:
                raise launch.UserError(
                    "a row is of one part, but that of {method} on {domain} (severity {severity}, "
                    "seed {seed}, {split_role}) is in ".format(**row)
                    + f"{first.folder} and in {part.folder}; leave one of the two out."
                )
    return [row for part in parts for row in part.rows]


def _require_more(workdir: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Refuses to replace rows that were measured.

    Raises:
      UserError: rows that are no merge's, or that the new record lacks.
    """
    path = workdir / "diagnostics.json"
    record = records.read(path, rows=list) if path.exists() else {}
    if "parts" not in record and (record or (workdir / "diagnostics.jsonl").exists()):
        raise launch.UserError(
            f"{workdir} has diagnostics that experiments.merge did not make; choose another "
            "--workdir."
        )
    lost = {journal.key_of(row) for row in record.get("rows", [])} - set(map(journal.key_of, rows))
    if lost:
        raise launch.UserError(
            f"{workdir} has {len(lost)} rows that these parts lack. Name all parts, or choose "
            "another --workdir."
        )


def run(folder: str, folders: Sequence[pathlib.Path]) -> int:
    """Writes the record of some parts and its page into a work folder; returns the exit status.

    Args:
      folder: the work folder to write, new or of an earlier merge.
      folders: the parts.

    Raises:
      UserError: as :func:`merged`, or the folder has rows that were not merged.
    """
    parts = [read(part) for part in folders]
    rows = merged(parts)
    workdir = launch.open_workdir(folder)
    with launch.locked(workdir):
        _require_more(workdir, rows)
        origins = []
        for part in parts:
            own = {"folder": str(part.folder), "rows": len(part.rows)}
            origins += part.record.get("parts", [own | provenance.origin(part.record)])
        config = parts[0].record["config"] | {"seeds": sorted({row["seed"] for row in rows})}
        command = f"python -m experiments.merge {shlex.join(sys.argv[1:])}"
        origin = provenance.origin(parts[0].record) | {"command": command, "config": config}
        # Its rows last: with the record alone the merge can be made again.
        diagnose_record.write(workdir, origin | {"parts": origins}, rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        launch.write_atomically(workdir / "diagnostics.jsonl", lines)
    return 0
